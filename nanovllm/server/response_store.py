"""Responses that are kept for a while, for clients that go on from them."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

MAX_RESPONSES = 1 << 12
"""However small they are."""
MAX_RESPONSE_SIZE = 1 << 22
"""Bytes of one with what it answers, as many as a body may have by default: a request that goes on
from it reads all of that, however small its own body is."""


class StoredResponse(NamedTuple):
    """A response, and what it answers; both as JSON."""

    response: bytes
    input: bytes

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return len(self.response) + len(self.input)

    def input_items(self) -> list[dict[str, Any]]:
        """All that was answered, that of earlier responses first."""
        items: list[dict[str, Any]] = msgspec.json.decode(self.input)
        return items

    def history(self) -> list[dict[str, Any]]:
        """What a conversation that goes on from it begins with."""
        output: list[dict[str, Any]] = msgspec.json.decode(self.response)["output"]
        return self.input_items() + output


class ResponseStore:
    """The responses that were used last, in bounded memory.

    Each has all of its conversation, so that it does not matter which others are forgotten.

    Args:
        max_bytes: Of all of them together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    @property
    def keeps_any(self) -> bool:
        return self._max_bytes > 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def put(self, response_id: str, response: bytes, input_items: Sequence[dict[str, Any]]) -> None:
        """Keep a response, if it is not too large, and forget those least recently asked for."""
        stored = StoredResponse(response, msgspec.json.encode(input_items))
        if stored.size > min(self._max_bytes, MAX_RESPONSE_SIZE):
            return
        self._responses[response_id] = stored
        self._num_bytes += stored.size
        while self._num_bytes > self._max_bytes or len(self._responses) > MAX_RESPONSES:
            _, forgotten = self._responses.popitem(last=False)
            self._num_bytes -= forgotten.size

    def get(self, response_id: str) -> StoredResponse | None:
        """The response of this id, unless it is not there or not there any more."""
        stored = self._responses.get(response_id)
        if stored is not None:
            self._responses.move_to_end(response_id)
        return stored

    def delete(self, response_id: str) -> bool:
        """Forget a response; False if it is not there."""
        stored = self._responses.pop(response_id, None)
        if stored is None:
            return False
        self._num_bytes -= stored.size
        return True
