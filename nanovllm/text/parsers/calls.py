"""An answer's text and the calls in it, whatever form these have."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanovllm.text.parsers.reader import BLANK, Markers, NotACallError, Reader, Steps
from nanovllm.text.parsers.writer import Writer

Function = Mapping[str, Any]
"""A function's "name", and perhaps "parameters" and "strict"."""

MAX_CALLS = 1000
"""Calls in a message, and places where one is looked for. More are an attack, or a model astray."""
NAME = re.compile(r"[-.\w]*")
NO_BLANKS = re.compile(r"[^ \t\r\n]+")


class CallParser(ABC):
    """Reads an answer.

    What begins like a call and is none becomes text. A call's arguments are passed on as they
    come, so they are not checked: those of a call that breaks off are cut short.

    Args:
        dropped: Strings that end messages and are no part of them.
        functions: What may be called, for models that write arguments of all types alike.
    """

    opening: str | None = None
    """The character that calls begin with at the beginning of the answer or of a line."""
    marks: tuple[str, ...] = ()
    """What calls begin with elsewhere."""
    ignored: tuple[str, ...] = ()
    """What may stand behind calls."""
    separators = BLANK
    """Characters that may stand between calls."""

    def __init__(
        self,
        dropped: Iterable[str] = (),
        functions: Sequence[Function] = (),  # noqa: ARG002  # most formats tell types
    ) -> None:
        self._dropped = frozenset(dropped)
        self._line = "" if self.opening is None else f"\n{self.opening}"
        lines = [self._line] if self._line else []
        self._markers = Markers([*self.marks, *self.ignored, *lines, *self._dropped])
        self._num_attempts = 0

    @abstractmethod
    def read_calls(self, reader: Reader, writer: Writer) -> Steps[None]:
        """Read a call, or several in one.

        Args:
            reader: Behind the mark, if there is one; holds what is read until a call begins.
            writer: Takes the calls.

        Raises:
            NotACallError: Here is none, or it is broken.
        """

    def read(self, reader: Reader, writer: Writer) -> Steps[None]:
        """Read an answer to its end."""
        if self.opening is not None:
            yield from reader.pass_on(BLANK, writer.separator)
            if (yield from reader.peek()) == self.opening:
                yield from self._try_all(reader, writer, 0)
        while mark := (yield from reader.until(self._markers, writer.content)):
            if self._num_attempts >= MAX_CALLS:
                self._markers = Markers(self._dropped)
            if mark in self.marks:
                yield from self._try_all(reader, writer, len(mark))
            elif mark == self._line:
                writer.content("\n")
                reader.pos -= 1
                yield from self._try_all(reader, writer, 0)
            elif mark in self.ignored and writer.num_calls:
                writer.drop_blanks()
            elif mark in self.ignored:
                writer.content(mark)

    def _try_all(self, reader: Reader, writer: Writer, num_read: int) -> Steps[None]:
        """Read calls, and those that follow without a mark."""
        found = yield from self._try(reader, writer, num_read)
        while found and (yield from reader.peek()) == self.opening:
            found = yield from self._try(reader, writer, 0)

    def _try(self, reader: Reader, writer: Writer, num_read: int) -> Steps[bool]:
        """Read calls, if there are any; returns whether there are.

        What turns out to be none is text, with the characters of a mark that have been read.
        """
        self._num_attempts += 1
        num_calls = writer.num_calls
        reader.hold(num_read)
        try:
            yield from self.read_calls(reader, writer)
        except NotACallError:
            writer.content(reader.release())
        reader.release()
        if writer.num_calls == num_calls:
            return False
        yield from reader.pass_on(
            self.separators, lambda text: writer.separator(NO_BLANKS.sub("", text))
        )
        return True


def begin(reader: Reader, writer: Writer, name: str) -> None:
    """Begin a call: what has been read was no text.

    Raises:
        NotACallError: There are too many already.
    """
    if writer.num_calls >= MAX_CALLS:
        raise NotACallError
    reader.release()
    writer.call(name)
