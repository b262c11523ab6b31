"""The keyword arguments of a Python call to JSON, as they come and without evaluating anything."""

import json
import math
import re
from contextlib import suppress

from nanovllm.text.parsers.json_values import MAX_DEPTH
from nanovllm.text.parsers.reader import BLANK, NotACallError, Reader, Steps, Write

ESCAPE = (
    r"\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U00(?:10|0[\da-fA-F])[\da-fA-F]{4}"
    r"|[0-7]{3}|[0-7]{1,2}(?=[^0-7])|[^xuUN0-7])"
)
LONGEST_ESCAPE = 10
"""Characters of the longest escape; what is as long and does not match, is none."""

TEXT = {
    quote: rf"[^{quote[0]}\\]*(?:(?:{ESCAPE}{inner})[^{quote[0]}\\]*)*"
    for quote, inner in (
        ("'", ""),
        ('"', ""),
        ("'''", "|'(?=[^']|'[^'])"),
        ('"""', '|"(?=[^"]|"[^"])'),
    )
}
"""What may stand between quotes, as far as it can be told where it ends."""
TEXT_PATTERNS = {quote: re.compile(pattern, re.ASCII) for quote, pattern in TEXT.items()}
ESCAPE_PATTERN = re.compile(ESCAPE.replace("(?=[^0-7])", ""), re.ASCII)
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""}

ENCODER = json.JSONEncoder(ensure_ascii=False)

CONSTANTS = {"True": "true", "False": "false", "None": "null"}
CONSTANTS |= {name: name for name in CONSTANTS.values()}  # of models that think in JSON
CLOSING = {"call": ")", "[": "]", "(": ")", "{": "}"}
WORD = re.compile(r"[-+.\w]*")
MAX_WORD = 512
"""Characters of a number, of which Python reads some thousand at most."""
JSON_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)

_SHORT = "|".join(f"{quote}{TEXT[quote]}{quote}(?!{quote})" for quote in ("'", '"'))
_LONG = "|".join(f"{quote}{TEXT[quote]}{quote}" for quote in ("'''", '"""'))
TOKEN = re.compile(
    rf"""[ \t\r\n]*(?:
    (?P<comma>,)
    |(?P<string>{_SHORT})
    |(?P<long_string>{_LONG})
    |(?P<word>[-+.\d][-+.\w]{{0,{MAX_WORD - 1}}}|True|False|None)(?=[ \t\r\n]*[,:\])}}])
    |(?P<keyword>[A-Za-z_]\w*)=(?=[^=])
    |(?P<mark>[][(){{}}:])
    )""",
    re.VERBOSE | re.ASCII,
)
"""What is whole and simple, which is nearly all."""
MORE_NUMBERS = re.compile(
    r"(?:[ ]?,[ ]?-?(?:0|[1-9]\d{0,15})(?:\.\d{1,15})?)+(?=[ ,\])])", re.ASCII
)
"""What follows in a list of numbers, which may be long."""


class PythonArguments:
    """Reads what stands between the parentheses of a call, and writes it as a JSON object.

    Values are text, numbers, True, False, None, and lists, tuples and dictionaries of values.

    Args:
        reader: Behind the opening parenthesis, or behind the "=" of the first argument.
        write: Takes the JSON text as it comes.
        keyword: Name of the first argument, if it has been read.
    """

    def __init__(self, reader: Reader, write: Write, keyword: str) -> None:
        self._reader = reader
        self._write = write
        self._open = ["call"]
        # What comes: "value", "colon" or "comma"; "first" or "next" of a container, each of which
        # may be its end as well; "end".
        self._wants = "first"
        write("{" + (self._keyword(keyword) if keyword else ""))

    def read(self) -> Steps[None]:
        """Read up to the closing parenthesis.

        Raises:
            NotACallError: There is something else, is nested too deeply, or ends too early.
        """
        while self._wants != "end":
            self._read_simple()
            if self._wants != "end":
                yield from self._read_any()

    def _read_simple(self) -> None:
        """Read what has come as far as it is simple, many times faster than `_read_any` does."""
        reader = self._reader
        text, pos, limit = reader.text, reader.pos, reader.limit
        written: list[str] = []
        try:
            while self._wants != "end":
                match = TOKEN.match(text, pos, limit)
                # What ends where the text does may go on.
                if match is None or match.end() == limit:
                    break
                kind = match.lastgroup or ""
                pos = match.start(kind)
                written.append(self._convert(kind, match[kind]))
                pos = match.end()
                in_list = kind == "word" and self._open[-1] in "[("
                if in_list and (more := MORE_NUMBERS.match(text, pos, limit)):
                    written += [f", {number.strip()}" for number in more[0].split(",")[1:]]
                    pos = more.end()
        finally:
            reader.take(pos)
            self._write("".join(written))

    def _read_any(self) -> Steps[None]:
        """Read one thing of whatever kind."""
        reader = self._reader
        yield from reader.run(BLANK)
        character = yield from reader.peek()
        if character in ("'", '"'):
            yield from self._read_string(character)
        elif character and character in "[](){},:":
            self._write(self._convert("comma" if character == "," else "mark", character))
            reader.take(reader.pos + 1)
        else:
            reader.hold()
            try:
                yield from self._read_word()
            except NotACallError:
                reader.rewind()  # to where `_read_simple` gives up
                raise
            reader.release()

    def _read_word(self) -> Steps[None]:
        """Read a number, a constant, or a keyword and its "="."""
        reader = self._reader
        word = yield from reader.run(WORD)
        blank = yield from reader.run(BLANK)
        following = yield from reader.peek()
        if following == "=":
            reader.take(reader.pos + 1)
            following = yield from reader.peek()
            self._write(self._keyword(word if following != "=" else ""))
        else:
            self._write(self._value() + _json_word(word if blank or following else ""))

    def _read_string(self, quote: str) -> Steps[None]:
        reader, write = self._reader, self._write
        write(self._value(is_text=True) + '"')
        reader.take(reader.pos + 1)
        if (yield from reader.literal(quote)):
            if not (yield from reader.literal(quote)):
                write('"')
                return
            quote *= 3
        while True:
            yield from reader.pass_on(TEXT_PATTERNS[quote], self._write_text)
            following = yield from reader.peek()
            if following == "\\":
                too_long = reader.limit - reader.pos >= LONGEST_ESCAPE
                if too_long or not (yield from reader.more()):
                    raise NotACallError
            elif not following:
                raise NotACallError
            elif (yield from reader.literal(quote)):
                write('"')
                return
            else:
                self._write_text(reader.take(reader.pos + 1))

    def _write_text(self, text: str) -> None:
        self._write(_json_text(text))

    def _convert(self, kind: str, token: str) -> str:
        """Return what something means in JSON.

        Raises:
            NotACallError: It does not belong here, or nowhere.
        """
        if kind == "comma":
            return self._between("comma", "next", "")
        if kind == "string" or kind == "long_string":
            num_quotes = 1 if kind == "string" else 3
            return f'{self._value(is_text=True)}"{_json_text(token[num_quotes:-num_quotes])}"'
        if kind == "word":
            return self._value() + _json_word(token)
        if kind == "keyword":
            return self._keyword(token)
        if token == ":":
            return self._between("colon", "value", ": ")
        return self._opening(token) if token in CLOSING else self._closing(token)

    def _between(self, wanted: str, wants: str, text: str) -> str:
        if self._wants != wanted:
            raise NotACallError
        self._wants = wants
        return text

    def _value(self, is_text: bool = False) -> str:
        """Say that a value begins, or the key of a dictionary; return what parts it from others."""
        wants, container = self._wants, self._open[-1]
        if wants == "value" or (wants in ("first", "next") and container in "[("):
            self._wants = "comma"
        elif wants in ("first", "next") and container == "{" and is_text:
            self._wants = "colon"
        else:
            raise NotACallError
        return ", " if wants == "next" else ""

    def _keyword(self, name: str) -> str:
        # Any name will do, if Python has it or not: a function's parameters may be called `2fa`.
        wants = self._wants
        if not name or wants not in ("first", "next") or self._open[-1] != "call":
            raise NotACallError
        self._wants = "value"
        return f'{", " if wants == "next" else ""}"{name}": '

    def _opening(self, mark: str) -> str:
        comma = self._value()
        if len(self._open) >= MAX_DEPTH:
            raise NotACallError
        self._open.append(mark)
        self._wants = "first"
        return comma + ("{" if mark == "{" else "[")

    def _closing(self, mark: str) -> str:
        container = self._open[-1]
        if self._wants not in ("first", "next", "comma") or CLOSING[container] != mark:
            raise NotACallError
        self._open.pop()
        self._wants = "comma" if self._open else "end"
        return "]" if container in "[(" else "}"


def _json_text(text: str) -> str:
    """Return what stands between quotes as JSON has it there."""
    if "\\" not in text:
        return ENCODER.encode(text)[1:-1]
    text = ENCODER.encode(ESCAPE_PATTERN.sub(_unescape, text))[1:-1]
    return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _unescape(match: re.Match[str]) -> str:
    escape = match[0][1:]
    if escape[0] in "xuU":
        return chr(int(escape[1:], 16))
    if escape[0] in "01234567":
        return chr(int(escape, 8))
    # Python leaves escapes that it does not know as they are, but "/" has one in JSON.
    return escape if escape in "\\'\"/" else ESCAPED.get(escape, match[0])


def _json_word(word: str) -> str:
    """Return a number or constant as JSON has it.

    Raises:
        NotACallError: It is neither.
    """
    if word in CONSTANTS:
        return CONSTANTS[word]
    if len(word) > MAX_WORD:
        raise NotACallError
    if JSON_NUMBER.fullmatch(word):
        return word
    with suppress(ValueError):
        return str(int(word, 0))
    try:
        number = float(word if "." in word or "e" in word.lower() else "")
    except ValueError as e:
        raise NotACallError from e
    if not math.isfinite(number):
        raise NotACallError
    return json.dumps(number)
