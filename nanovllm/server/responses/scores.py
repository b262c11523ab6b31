"""Which tokens a text is of, where markup between texts is of tokens, too."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nanovllm.server.chat.logprobs import ChatTokenLogprob

MAX_HELD = 1 << 12
"""Tokens, the last ones: all of them are looked at with each text that comes."""


class HeldScores:
    """Log probabilities of tokens of which it is not known yet what they are part of."""

    def __init__(self) -> None:
        self._scores: list[ChatTokenLogprob] = []
        self._ahead = b""

    def push(self, scores: Sequence[ChatTokenLogprob]) -> None:
        """Hold those of new tokens."""
        self._scores += scores
        del self._scores[:-MAX_HELD]

    def drop(self) -> None:
        """Forget the tokens: they were none of a text."""
        self._scores.clear()
        self._ahead = b""

    def take(self, text: str) -> list[ChatTokenLogprob]:
        """Return those of a text; tokens before it were markup, those behind it may be yet."""
        wanted = text.encode()
        if self._ahead.startswith(wanted):
            self._ahead = self._ahead[len(wanted) :]
            return []
        wanted = wanted.removeprefix(self._ahead)  # the last token has had it
        if not self._scores:
            return []
        ends = list(accumulate(len(score["bytes"]) for score in self._scores))
        written = b"".join(bytes(score["bytes"]) for score in self._scores)
        start = written.find(wanted)
        if start < 0:  # blanks from before a call part it from other text
            wanted = wanted.lstrip()
            start = written.find(wanted)
        if start < 0 or not wanted:
            return []
        end = start + len(wanted)
        first, last = bisect_right(ends, start), bisect_left(ends, end)
        taken, self._scores = self._scores[first : last + 1], self._scores[last + 1 :]
        self._ahead = written[end : ends[last]] if last < len(ends) else b""
        return taken
