"""JSON values, read as they come."""

import json
import re

from nanovllm.text.parsers.reader import NotACallError, Reader, Steps, Write

ENCODER = json.JSONEncoder(ensure_ascii=False)

MAX_DEPTH = 128
"""Values in one another. Whoever reads the arguments does so recursively."""

QUIET = re.compile(r"(?:[+.,:\da-zE_ \t\r\n]+|-(?=[^I]))*", re.ASCII)
REST_OF_STRING = re.compile(r'[^"\\\x00-\x1f]*(?:\\["\\/bfnrtu][^"\\\x00-\x1f]*)*')
SCALAR = re.compile(r"[-+.\w]*", re.ASCII)

WORDS = {
    "-Infinity": "null",
    "False": "false",
    "Infinity": "null",
    "NaN": "null",
    "None": "null",
    "True": "true",
}
"""What models write where JSON has another word, or none."""
WORD = re.compile("|".join(WORDS))
NO_JSON = re.compile(r'[\x00-\x1f]|\\[^"\\/bfnrtu]')
"""What is in strings of models, but in none of JSON's."""
MORE_NO_JSON = re.compile(f"(?:{NO_JSON.pattern})+")
MAX_MENDED = 64
"""Characters that are put right at a time, and more than the longest word has."""
BLANKS = " \t\r\n"


def read_value(reader: Reader, write: Write) -> Steps[None]:
    """Read a value and write its text as it comes.

    Only what it takes to know its end is looked at: brackets, strings, and characters that JSON
    has nowhere else than in strings. Words, escapes and line breaks that are Python's and not
    JSON's are put right, and a comma behind the last of several values is left out.

    Raises:
        NotACallError: This is no JSON, is nested too deeply, or ends too early.
    """
    if (yield from reader.peek()) not in ("{", "[", '"'):
        scalar = yield from reader.run(SCALAR)
        if not scalar:
            raise NotACallError
        write(WORDS.get(scalar, scalar))
        return
    depth, in_string = 0, False
    while True:
        depth, in_string, ended = _scan(reader, write, depth, in_string)
        if ended:
            return
        if not (yield from reader.more()):
            write(reader.take(reader.limit))
            raise NotACallError


def read_string(reader: Reader) -> Steps[str]:
    """Read a string and return what it says.

    Raises:
        NotACallError: This is no string.
    """
    if (yield from reader.peek()) != '"':
        raise NotACallError
    pieces: list[str] = []
    yield from read_value(reader, pieces.append)
    return decode_string("".join(pieces))


def decode_string(text: str) -> str:
    """Return what a string says, as `read_value` has written it.

    Raises:
        NotACallError: It has an escape that there is none of, or half a character.
    """
    try:
        decoded = str(json.loads(text))
        decoded.encode()
    except ValueError as e:
        raise NotACallError from e
    return decoded


def mended(text: str) -> str:
    """Return a value as `read_value` writes it.

    Raises:
        NotACallError: It is none, or more than one.
    """
    reader = Reader()
    reader.feed(text)
    reader.end()
    pieces: list[str] = []
    for _ in read_value(reader, pieces.append):
        pass  # it waits for nothing, as all is there
    if reader.pos < len(text):
        raise NotACallError
    return "".join(pieces)


def _scan(reader: Reader, write: Write, depth: int, in_string: bool) -> tuple[int, bool, bool]:
    """Write as much of a value as has come; return the state behind it, and whether it has ended.

    Args:
        reader: Where the text comes from.
        write: Takes it.
        depth: Brackets that are open.
        in_string: Whether a string is open.
    """
    text, pos, limit = reader.text, reader.pos, reader.limit
    while True:
        match = (REST_OF_STRING if in_string else QUIET).match(text, pos, limit)
        pos = pos if match is None else match.end()
        character = text[pos : min(pos + 1, limit)]
        if character == '"':
            in_string = not in_string
        elif character and character in "{[":
            depth += 1
        elif character and character in "}]":
            write(reader.take(_before_comma(text, reader.pos, pos)))
            reader.take(pos)
            depth -= 1
        else:
            ends_open = not character and not in_string  # a comma there may be the last
            write(reader.take(_before_comma(text, reader.pos, pos) if ends_open else pos))
            wrong, right = _mend(text[pos : min(pos + MAX_MENDED, limit)], in_string)
            if not wrong:
                return depth, in_string, False
            pos += len(wrong)
            reader.take(pos)
            write(right)
            continue
        if depth > MAX_DEPTH:
            write(reader.take(pos))
            raise NotACallError
        pos += 1
        if depth == 0 and not in_string:
            write(reader.take(pos))
            return depth, in_string, True


def _before_comma(text: str, start: int, end: int) -> int:
    """Where a comma is that some text ends with, but for blanks; its end if it does not."""
    start = max(start, end - MAX_MENDED)
    rest = text[start:end].rstrip(BLANKS)
    return start + len(rest) - 1 if rest.endswith(",") else end


def _mend(text: str, in_string: bool) -> tuple[str, str]:
    """Return what a text begins with that is no JSON, and what to write for it.

    Both are "" where it is too short to tell.

    Raises:
        NotACallError: It begins with what nobody writes.
    """
    match = (MORE_NO_JSON if in_string else WORD).match(text)
    if match is not None:
        wrong = match[0]
        return wrong, NO_JSON.sub(_as_in_json, wrong) if in_string else WORDS[wrong]
    if in_string or not text or any(word.startswith(text) for word in WORDS):
        return "", ""
    raise NotACallError


def _as_in_json(match: re.Match[str]) -> str:
    """Write a character that JSON has to escape, or a backslash that escapes nothing."""
    character = match[0][-1]
    escapes_nothing = len(match[0]) == 2 and character >= " " and character != "'"
    return ENCODER.encode(match[0] if escapes_nothing else character)[1:-1]
