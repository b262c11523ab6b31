"""An answer as Anthropic's server-sent events: blocks that begin, grow and end, one at a time."""

from collections.abc import Iterator
from typing import Any

from nanovllm.server.chat.run import ChatChoice, ChatNews
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

SIGNATURE = "unsigned"
"""Of thoughts. Clients send none back that have no signature; here nobody looks at it."""


class BlockEvents:
    """The blocks of one answer.

    Args:
        choice: The answer.
        shows_thoughts: Whether thoughts are told, or only that there were some.
    """

    def __init__(self, choice: ChatChoice, shows_thoughts: bool) -> None:
        self._choice = choice
        self._shows_thoughts = shows_thoughts
        self._index = 0
        self._open: str | None = None

    def of_news(self, news: ChatNews) -> Iterator[dict[str, Any]]:
        """Yield the events of what has been added."""
        for delta in news.deltas:
            yield from self._of_delta(delta)
        if news.finished:
            yield from self._close()

    def _of_delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                call = self._choice.tool_calls[delta.index]
                yield from self._begin("tool_use", id=call.id, name=call.name, input={})
            if delta.arguments:
                yield self._add("input_json_delta", partial_json=delta.arguments)
        elif isinstance(delta, ReasoningDelta):
            if self._open != "thinking":
                yield from self._begin("thinking", thinking="", signature="")
            if self._shows_thoughts:
                yield self._add("thinking_delta", thinking=delta.text)
        elif isinstance(delta, ContentDelta):
            if self._open != "text":
                yield from self._begin("text", text="")
            yield self._add("text_delta", text=delta.text)

    def _begin(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._open = kind
        block = {"type": kind, **fields}
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _add(self, kind: str, **fields: str) -> dict[str, Any]:
        delta = {"type": kind, **fields}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._add("signature_delta", signature=SIGNATURE)
        yield {"type": "content_block_stop", "index": self._index}
        self._open = None
        self._index += 1
