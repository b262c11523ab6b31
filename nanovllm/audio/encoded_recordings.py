"""Latents of recordings, kept so that a voice is encoded once."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b

from nanovllm.audio.files import Side
from nanovllm.errors import OverloadedError

Encode = Callable[[bytes, str | None, Side], Awaitable[bytes]]
"""Makes latents of a recording: `(data, wav_format, side)`. Padded left, speech can go on from it;
padded right, it is a reference."""

MAX_CACHED_BYTES = 64 << 20
MAX_WAITING = 64
MAX_WAITING_BYTES = 256 << 20
"""Of recordings that are being encoded or wait for it; one alone may be larger."""
LARGE_FILE = 1 << 20
"""Bytes from which hashing, some ms each MB, is left to a thread."""


class EncodedRecordings:
    """The latents of the recordings used last, by content.

    Who asks for what is being encoded already waits for that; what nobody waits for any more is
    dropped.

    Args:
        encode: What does the work.
        max_bytes: Of latents kept.
        num_at_once: Recordings that are worked on at the same time. As samples they are up to 38 MB
            each, several times over.
    """

    def __init__(
        self, encode: Encode, max_bytes: int = MAX_CACHED_BYTES, num_at_once: int = 2
    ) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._places = asyncio.Semaphore(num_at_once)
        self._latents: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_bytes = 0
        self._running: dict[bytes, _Running] = {}
        self._num_waiting_bytes = 0

    async def __call__(self, data: bytes, wav_format: str | None, side: Side) -> bytes:
        """Latents of a recording; see `Encode`.

        Raises:
            OverloadedError: Too many recordings wait already.
        """
        if len(data) < LARGE_FILE:
            key = _digest(data, side)
        else:
            key = await asyncio.to_thread(_digest, data, side)
        if key in self._latents:
            self._latents.move_to_end(key)
            return self._latents[key]
        running = self._running.get(key) or self._begin(key, data, wav_format, side)
        running.num_waiters += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.num_waiters -= 1
            if not running.num_waiters and not running.task.done():
                running.task.cancel()
                # Who asks from now on begins anew.
                del self._running[key]

    def _begin(self, key: bytes, data: bytes, wav_format: str | None, side: Side) -> "_Running":
        num_bytes = self._num_waiting_bytes
        if len(self._running) >= MAX_WAITING or 0 < num_bytes > MAX_WAITING_BYTES - len(data):
            raise OverloadedError(
                f"{len(self._running)} recordings of {num_bytes >> 20} MiB are waiting to be "
                "encoded: try again later",
                reason="requests",
            )
        # A task of its own: the one who asked first may go before the others.
        task = asyncio.ensure_future(self._in_turn(data, wav_format, side))
        running = self._running[key] = _Running(task)
        self._num_waiting_bytes += len(data)
        task.add_done_callback(lambda done: self._ended(key, len(data), done))
        return running

    async def _in_turn(self, data: bytes, wav_format: str | None, side: Side) -> bytes:
        async with self._places:
            return await self._encode(data, wav_format, side)

    def _ended(self, key: bytes, num_bytes: int, task: asyncio.Task[bytes]) -> None:
        self._num_waiting_bytes -= num_bytes
        if (running := self._running.get(key)) is not None and running.task is task:
            del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._latents[key] = latents = task.result()
        self._num_bytes += len(latents)
        while self._num_bytes > self._max_bytes:
            _, forgotten = self._latents.popitem(last=False)
            self._num_bytes -= len(forgotten)


@dataclass
class _Running:
    """A recording that is being encoded, and how many wait for it."""

    task: asyncio.Task[bytes]
    num_waiters: int = 0


def _digest(data: bytes, side: Side) -> bytes:
    return blake2b(data, digest_size=32, person=side.encode()).digest()
