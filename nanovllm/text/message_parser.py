"""A message taken apart into thoughts, text and calls."""

from collections.abc import Sequence

from nanovllm.text.deltas import ContentDelta, Delta, ToolCallDelta
from nanovllm.text.parsers.calls import CallParser
from nanovllm.text.parsers.reader import Markers, Reader, Steps
from nanovllm.text.parsers.thoughts import ThoughtMarks, read_thoughts
from nanovllm.text.parsers.writer import Writer


class MessageParser:
    """Tells thoughts, text and calls of one message apart, as it comes.

    The text may come in any pieces: what the deltas add up to is the same. It takes time linear in
    the text, and no more is held back than may yet become something else.

    Args:
        thoughts: How thoughts are marked; None to take them for text.
        begun: Whether the prompt has begun them.
        calls: Reads calls; None to take them for text.
        dropped: Strings that are no part of a message.
        parallel: Whether there may be more than one call; if not, the others are left out.
        only_calls: Whether there is nothing but calls and thoughts, so that all text has begun as
            a call; it is left out.
    """

    def __init__(
        self,
        thoughts: ThoughtMarks | None,
        begun: bool,
        calls: CallParser | None,
        dropped: Sequence[str] = (),
        *,
        parallel: bool = True,
        only_calls: bool = False,
    ) -> None:
        self._parallel = parallel
        self._only_calls = only_calls
        self._reader = Reader()
        self._writer = Writer()
        self._steps = self._read(thoughts, begun, calls, Markers(dropped))
        next(self._steps, None)

    def push(self, text: str) -> list[Delta]:
        """Return what the text adds."""
        self._reader.feed(text)
        next(self._steps, None)
        return self._drain()

    def finish(self) -> list[Delta]:
        """Return what has been held back, as no more text comes."""
        self._reader.end()
        next(self._steps, None)
        self._writer.finish()
        return self._drain()

    def _drain(self) -> list[Delta]:
        return [delta for delta in self._writer.drain() if self._is_wanted(delta)]

    def _is_wanted(self, delta: Delta) -> bool:
        if isinstance(delta, ContentDelta):
            return not self._only_calls
        return self._parallel or not (isinstance(delta, ToolCallDelta) and delta.index)

    def _read(
        self,
        thoughts: ThoughtMarks | None,
        begun: bool,
        calls: CallParser | None,
        dropped: Markers,
    ) -> Steps[None]:
        if thoughts is not None:
            yield from read_thoughts(self._reader, self._writer, thoughts, begun=begun)
        if calls is not None:
            yield from calls.read(self._reader, self._writer)
        while (yield from self._reader.until(dropped, self._writer.content)):
            pass
