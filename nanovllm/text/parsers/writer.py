"""A message's deltas, put together from what a parser makes out."""

from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

BLANKS = " \t\r\n"

MAX_BLANK = 1024
"""Blanks that are held back, as they may turn out to stand between the text and a call."""


class Writer:
    """Collects what a message consists of.

    Blanks around calls and around the text of a message with calls are left out, as are newlines
    around thoughts. Two texts with a call between them are kept apart by the blanks behind the
    call, or else by those before it. All of it may come in any pieces.

    Attributes:
        num_calls: Calls that have begun.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._deltas: list[Delta] = []
        self._pieces: list[str] = []
        self._begun: Delta | None = None
        self._has_content = False
        self._has_reasoning = False
        self._blank = ""
        self._before_call = ""

    def reasoning(self, text: str) -> None:
        """Add to the thoughts."""
        body = text.rstrip("\n")
        if body:
            if not self._has_reasoning:
                body, self._blank, self._has_reasoning = body.lstrip("\n"), "", True
            self._add(ReasoningDelta(""), self._blank + body)
            self._blank = ""
        self._blank += text[len(text.rstrip("\n")) :]
        if len(self._blank) > MAX_BLANK:
            surplus, self._blank = self._blank[:-MAX_BLANK], self._blank[-MAX_BLANK:]
            if self._has_reasoning:
                self._add(ReasoningDelta(""), surplus)

    def drop_blanks(self) -> None:
        """Forget the blanks that have been held back: markup follows."""
        self._blank = ""

    def content(self, text: str) -> None:
        """Add to the answer's text."""
        body = text.rstrip(BLANKS)
        if body:
            text = text[len(body) :]
            if self.num_calls and not self._has_content:
                self._blank, body = "", body.lstrip(BLANKS)
            parted = self._blank or body[0] in BLANKS
            self._add(ContentDelta(""), (self._blank if parted else self._before_call) + body)
            self._blank, self._before_call, self._has_content = "", "", True
        self.separator(text)

    def separator(self, text: str) -> None:
        """Add what is left out unless more of the answer's text follows."""
        self._blank += text
        if len(self._blank) > MAX_BLANK:
            surplus, self._blank = self._blank[:-MAX_BLANK], self._blank[-MAX_BLANK:]
            if self._has_content or not self.num_calls:
                self._add(ContentDelta(""), surplus)
                self._has_content = True

    def call(self, name: str) -> None:
        """Begin a call."""
        self._before_call = self._before_call or (self._blank if self._has_content else "")
        self.drop_blanks()
        self._add(ToolCallDelta(self.num_calls, name, ""), "")
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the JSON text of the arguments of the call that has begun last."""
        index = self.num_calls - 1
        begun = self._begun
        if not (isinstance(begun, ToolCallDelta) and begun.index == index):
            self._add(ToolCallDelta(index, None, ""), text)
        else:
            self._pieces.append(text)

    def finish(self) -> None:
        """Add the blanks that have been held back, if they belong to the text."""
        if self._blank and not self.num_calls:
            self._add(ContentDelta(""), self._blank)

    def drain(self) -> list[Delta]:
        """Return what has been added since the last time."""
        self._complete()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add(self, kind: Delta, text: str) -> None:
        """Add text to a delta of its kind, or begin one."""
        if isinstance(kind, ToolCallDelta) or type(kind) is not type(self._begun):
            self._complete()
            self._begun = kind
        self._pieces.append(text)

    def _complete(self) -> None:
        text, begun = "".join(self._pieces), self._begun
        self._pieces, self._begun = [], None
        if isinstance(begun, ToolCallDelta):
            if text or begun.name is not None:
                self._deltas.append(begun._replace(arguments=text))
        elif begun is not None and text:
            self._deltas.append(begun._replace(text=text))
