"""An answer as Anthropic has it: blocks that begin, grow and end, one at a time."""

from collections.abc import Iterator
from typing import Any, cast

from pydantic_core import from_json

from nanovllm.server.anthropic.responses import Content
from nanovllm.server.chat.run import ChatChoice, ChatNews
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

SIGNATURE = "unsigned"
"""Of thoughts. Clients send none back that have no signature; here nobody looks at it."""


class BlockEvents:
    """The blocks of one answer.

    Args:
        choice: The answer.
        shows_thoughts: Whether thoughts are told, or only that there were some.

    Attributes:
        content: The blocks that have ended.
    """

    def __init__(self, choice: ChatChoice, shows_thoughts: bool) -> None:
        self._choice = choice
        self._shows_thoughts = shows_thoughts
        self.content: list[Content] = []
        self._open: dict[str, Any] = {}
        self._texts: list[str] = []

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
                yield self._add("input_json_delta", "partial_json", delta.arguments)
        elif isinstance(delta, ReasoningDelta):
            if self._open.get("type") != "thinking":
                yield from self._begin("thinking", thinking="", signature="")
            if self._shows_thoughts:
                yield self._add("thinking_delta", "thinking", delta.text)
        elif isinstance(delta, ContentDelta):
            if self._open.get("type") != "text":
                yield from self._begin("text", text="")
            yield self._add("text_delta", "text", delta.text)

    def _begin(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._open, self._texts = {"type": kind, **fields}, []
        index, block = len(self.content), {**self._open}
        yield {"type": "content_block_start", "index": index, "content_block": block}

    def _add(self, kind: str, field: str, text: str) -> dict[str, Any]:
        self._texts.append(text)
        delta = {"type": kind, field: text}
        return {"type": "content_block_delta", "index": len(self.content), "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        kind, text = self._open["type"], "".join(self._texts)
        if kind == "tool_use":
            self._open["input"] = _as_far_as_it_goes(text)
        else:
            self._open[kind] = text
        if kind == "thinking":
            yield self._add("signature_delta", "signature", SIGNATURE)
            self._open["signature"] = SIGNATURE
        yield {"type": "content_block_stop", "index": len(self.content)}
        self.content.append(cast(Content, self._open))
        self._open = {}


def _as_far_as_it_goes(arguments: str) -> dict[str, Any]:
    """The arguments of a call; of one that was cut short, those that are there."""
    try:
        parsed = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
