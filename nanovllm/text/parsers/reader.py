"""Text that comes in pieces, read as if all of it were there."""

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A reading that ends in a T; each `yield` waits for more text."""

Write = Callable[[str], None]

BLANK = re.compile(r"[ \t\r\n]*")

MAX_HELD = 32768
"""Characters of what may become a call that are held back; longer than that, it is none."""


class NotACallError(Exception):
    """What was being read is no call, or ends before it is one."""


class Markers:
    """Strings to look for.

    Args:
        strings: None of them empty. Of several that begin at the same place, the first listed is
            found.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        strings = tuple(strings)
        # A pattern of nothing would be found everywhere; this one is found nowhere.
        self.pattern = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self._beginnings = {text[:end] for text in strings for end in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def num_begun(self, text: str, start: int) -> int:
        """Characters at the end of `text[start:]` that may be the beginning of a marker."""
        for length in range(min(self._longest, len(text) - start), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


class Reader:
    """Text as far as it has come.

    Attributes:
        text: What has come and is not forgotten yet.
        pos: Where in it the reading is.
    """

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self._ended = False
        self._held_from: int | None = None

    def feed(self, text: str) -> None:
        """Add text."""
        start = self.pos if self._held_from is None else self._held_from
        self.text = self.text[start:] + text
        self.pos -= start
        if self._held_from is not None:
            self._held_from = 0

    def end(self) -> None:
        """Say that no more text comes."""
        self._ended = True

    @property
    def limit(self) -> int:
        """How far the text may be looked at: all that has come, or the most that may be held."""
        if self._held_from is None:
            return len(self.text)
        return min(len(self.text), self._held_from + MAX_HELD)

    def hold(self, num_read: int = 0) -> None:
        """Keep what is read from here on, and the last characters that have been read."""
        self._held_from = self.pos - num_read

    def release(self) -> str:
        """Hold nothing any more; return what has been read since `hold`."""
        held = "" if self._held_from is None else self.text[self._held_from : self.pos]
        self._held_from = None
        return held

    def rewind(self) -> None:
        """Go back to where `hold` was, and hold nothing any more."""
        if self._held_from is not None:
            self.pos, self._held_from = self._held_from, None

    def take(self, end: int) -> str:
        """Read up to a position."""
        start, self.pos = self.pos, end
        return self.text[start:end]

    def more(self) -> Steps[bool]:
        """Wait for text beyond `limit`; False if none comes.

        Raises:
            NotACallError: As much is held as may be.
        """
        if self._held_from is not None and self.limit - self._held_from >= MAX_HELD:
            raise NotACallError
        if self._ended:
            return False
        yield
        return True

    def peek(self) -> Steps[str]:
        """Return the next character without reading it; "" at the end."""
        while self.pos >= self.limit:
            if not (yield from self.more()):
                return ""
        return self.text[self.pos]

    def pass_on(self, run: re.Pattern[str], write: Write) -> Steps[None]:
        """Read characters while they match, and write them as they come.

        Args:
            run: A class of characters, any number of times.
            write: Takes them.
        """
        while True:
            limit = self.limit
            match = run.match(self.text, self.pos, limit)
            if match is not None and match.end() > self.pos:
                write(self.take(match.end()))
            if self.pos < limit or not (yield from self.more()):
                return

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read characters while they match; see `pass_on`."""
        pieces: list[str] = []
        yield from self.pass_on(pattern, pieces.append)
        return "".join(pieces)

    def literal(self, *strings: str) -> Steps[str]:
        """Read the one of the strings that comes next; read nothing and return "" if none does."""
        longest = max(map(len, strings))
        while True:
            rest = self.text[self.pos : min(self.limit, self.pos + longest)]
            for string in strings:
                if rest.startswith(string):
                    return self.take(self.pos + len(string))
            if not any(string.startswith(rest) for string in strings):
                return ""
            if not (yield from self.more()):
                return ""

    def expect(self, *strings: str) -> Steps[str]:
        """Read one of the strings behind blanks.

        Raises:
            NotACallError: Something else comes.
        """
        yield from self.run(BLANK)
        found = yield from self.literal(*strings)
        if not found:
            raise NotACallError
        return found

    def until(self, markers: Markers, write: Write) -> Steps[str]:
        """Write text as it comes up to a marker; read and return that, or "" at the end."""
        while True:
            match = markers.pattern.search(self.text, self.pos)
            if match is not None:
                write(self.take(match.start()))
                return self.take(match.end())
            write(self.take(len(self.text) - markers.num_begun(self.text, self.pos)))
            if not (yield from self.more()):
                write(self.take(len(self.text)))
                return ""
