"""The items of a response as they grow, and the events that tell a stream of it."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from nanovllm.server.chat.logprobs import ChatTokenLogprob
from nanovllm.server.chat.run import MadeCall
from nanovllm.server.responses.objects import (
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)
from nanovllm.server.responses.scores import HeldScores
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

Event = dict[str, Any]
"""One of OpenAI's streaming events, but for its number."""


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{uuid.uuid4().hex}"


class OpenItem(ABC):
    """An item that is being written.

    Args:
        index: Which of the response's items it is.
    """

    prefix: ClassVar[str]

    def __init__(self, index: int) -> None:
        self.id = new_id(self.prefix)
        self._index = index
        self._texts: list[str] = []

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """The item with what there is of it."""

    @abstractmethod
    def opening(self) -> Iterator[Event]:
        """What tells that it begins."""

    @abstractmethod
    def closing(self, status: ItemStatus) -> Iterator[Event]:
        """What tells that it ends."""

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "output_index": self._index, "item_id": self.id, **more}

    def _added(self, item: OutputItem) -> Event:
        return {"type": "response.output_item.added", "output_index": self._index, "item": item}

    def _done(self, item: OutputItem) -> Event:
        return {"type": "response.output_item.done", "output_index": self._index, "item": item}


class OpenText(OpenItem):
    """An item whose content is one text."""

    text_event: ClassVar[str]

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._has_part = False

    def opening(self) -> Iterator[Event]:
        yield self._added(self.item("in_progress"))
        self._has_part = True
        yield self._event("response.content_part.added", content_index=0, part=self._part())

    def add(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> Event:
        """Write on; `logprobs` are those of the tokens that the text is."""
        self._texts.append(text)
        scores = self._scores(logprobs)
        return self._event(f"{self.text_event}.delta", content_index=0, delta=text, **scores)

    def closing(self, status: ItemStatus) -> Iterator[Event]:
        part = self._part()
        scores = self._scores(part["logprobs"]) if part["type"] == "output_text" else {}
        yield self._event(f"{self.text_event}.done", content_index=0, text=part["text"], **scores)
        yield self._event("response.content_part.done", content_index=0, part=part)
        yield self._done(self.item(status))

    @abstractmethod
    def _part(self) -> OutputText | ReasoningText:
        """The content with what there is of it."""

    def _scores(self, logprobs: Sequence[ChatTokenLogprob]) -> dict[str, Any]:  # noqa: ARG002
        """What an event has besides the text."""
        return {}


class OpenReasoning(OpenText):
    """What the model thinks."""

    prefix = "rs"
    text_event = "response.reasoning_text"

    def item(self, status: ItemStatus) -> OutputReasoning:
        return {
            "id": self.id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": [self._part()] if self._has_part else [],
            "encrypted_content": None,
        }

    def _part(self) -> ReasoningText:
        return {"type": "reasoning_text", "text": "".join(self._texts)}


class OpenMessage(OpenText):
    """What the model answers."""

    prefix = "msg"
    text_event = "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[ChatTokenLogprob] = []

    def item(self, status: ItemStatus) -> OutputMessage:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()] if self._has_part else [],
        }

    def add(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> Event:
        self._logprobs += logprobs
        return super().add(text, logprobs)

    def _part(self) -> OutputText:
        return {
            "type": "output_text",
            "text": "".join(self._texts),
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def _scores(self, logprobs: Sequence[ChatTokenLogprob]) -> dict[str, Any]:
        return {"logprobs": list(logprobs)}


class OpenCall(OpenItem):
    """A call of a function.

    Args:
        index: Which of the response's items it is.
        call: The call, to which is added what is written.
    """

    prefix = "fc"

    def __init__(self, index: int, call: MadeCall) -> None:
        super().__init__(index)
        self._call = call

    def item(self, status: ItemStatus) -> OutputCall:
        is_broken = status == "completed" and self._call.whole_arguments() is None
        return {
            "id": self.id,
            "type": "function_call",
            "status": "incomplete" if is_broken else status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": "".join(self._texts),
        }

    def opening(self) -> Iterator[Event]:
        yield self._added(self.item("in_progress"))

    def add(self, arguments: str) -> Event:
        """Write on the JSON text of its arguments."""
        self._texts.append(arguments)
        return self._event("response.function_call_arguments.delta", delta=arguments)

    def closing(self, status: ItemStatus) -> Iterator[Event]:
        item = self.item(status)
        yield self._event(
            "response.function_call_arguments.done",
            name=self._call.name,
            arguments=item["arguments"],
        )
        yield self._done(item)


class Output:
    """The items of a response; those that have ended are in `items`."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open: OpenItem | None = None
        self._held = HeldScores()

    def push(
        self,
        deltas: Sequence[Delta],
        calls: Sequence[MadeCall],
        logprobs: Sequence[ChatTokenLogprob] = (),
    ) -> Iterator[Event]:
        """Take what is new, and yield the events for it.

        Args:
            deltas: What is added to the message.
            calls: All calls of it so far.
            logprobs: Of the tokens that are new. What they are part of may be known later.
        """
        self._held.push(logprobs)
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                yield from self._push_call(delta, calls)
            else:
                yield from self._push_text(delta)

    def close(self, cut_off: bool = False) -> Iterator[Event]:
        """End the last item; a response that was not cut off has at least a message.

        Args:
            cut_off: Whether more would have come.
        """
        if self._open is None and not self.items and not cut_off:
            yield from self._begin(OpenMessage(0))
        yield from self._end("incomplete" if cut_off else "completed")

    def _push_text(self, delta: ContentDelta | ReasoningDelta) -> Iterator[Event]:
        if not delta.text:
            return
        kind = OpenReasoning if isinstance(delta, ReasoningDelta) else OpenMessage
        if not isinstance(self._open, kind):
            yield from self._end("completed")
            yield from self._begin(kind(len(self.items)))
        if isinstance(self._open, OpenText):
            yield self._open.add(delta.text, self._held.take(delta.text))

    def _push_call(self, delta: ToolCallDelta, calls: Sequence[MadeCall]) -> Iterator[Event]:
        self._held.drop()
        if delta.name is not None:
            yield from self._end("completed")
            yield from self._begin(OpenCall(len(self.items), calls[delta.index]))
        if isinstance(self._open, OpenCall) and delta.arguments:
            yield self._open.add(delta.arguments)

    def _begin(self, item: OpenItem) -> Iterator[Event]:
        self._open = item
        yield from item.opening()

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.closing(status)
            self.items.append(self._open.item(status))
            self._open = None
