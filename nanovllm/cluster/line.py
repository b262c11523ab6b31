"""Where requests wait while every engine has as many as it may."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from nanovllm.worker.load import EngineRequest


class Line:
    """Requests without an engine, first come, first served.

    Args:
        patience: Seconds that a request waits at most.
        on_expired: Told of the sequences that have waited for so long, and are in line no more.
    """

    def __init__(self, patience: float, on_expired: Callable[[list[int]], None]) -> None:
        self._patience = patience
        self._on_expired = on_expired
        self._requests: deque[EngineRequest] = deque()
        self._expiry: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_open_sequences(self) -> int:
        return sum(request.num_open for request in self._requests)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return sum(len(request.keys) for request in self._requests)

    def append(self, request: EngineRequest) -> None:
        """Let a request wait; see that `watch` follows if it still does."""
        request.deadline = time.monotonic() + self._patience
        self._requests.append(request)

    def popleft(self) -> EngineRequest:
        """Take out the request that has waited longest."""
        return self._requests.popleft()

    def watch(self) -> None:
        """Begin to look for requests that wait too long, if any wait."""
        if self._requests and self._expiry is None:
            delay = self._requests[0].deadline - time.monotonic()
            self._expiry = asyncio.get_running_loop().call_later(delay, self._expire)

    def abort(self, seq_ids: set[int]) -> None:
        """Let sequences go; a request without any left goes, too."""
        for request in [request for request in self._requests if seq_ids & set(request.seq_ids)]:
            request.num_open -= len(seq_ids & set(request.seq_ids))
            if not request.num_open:
                self._requests.remove(request)

    def clear(self) -> list[int]:
        """Let all go; returns their sequences."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        seq_ids = [seq_id for request in self._requests for seq_id in request.seq_ids]
        self._requests.clear()
        return seq_ids

    def _expire(self) -> None:
        now = time.monotonic()
        expired: list[int] = []
        while self._requests and self._requests[0].deadline <= now:
            expired += self._requests.popleft().seq_ids
        self._expiry = None
        self.watch()
        self._on_expired(expired)
