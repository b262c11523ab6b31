"""Calls written as JSON: `{"name": ..., "arguments": {...}}`, with more or less around them."""

import re

from nanovllm.text.parsers.calls import NAME, CallParser, begin
from nanovllm.text.parsers.json_values import decode_string, mended, read_string, read_value
from nanovllm.text.parsers.reader import BLANK, NotACallError, Reader, Steps
from nanovllm.text.parsers.writer import Writer

NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("id", "type")


class JsonCallParser(CallParser):
    """Objects, or lists of them; their keys may be in any order.

    `arguments` and `parameters` are the same. Other keys are passed over. Arguments that come
    before the name are held back until it comes.
    """

    separators = re.compile(r"[ \t\r\n};,]*")

    marked = True
    """Whether something tells that an object is a call, whatever keys it has."""

    def read_calls(self, reader: Reader, writer: Writer) -> Steps[None]:
        if (yield from reader.expect("{", "[")) == "{":
            yield from self._read_object(reader, writer)
            return
        expected = ["{"]
        while (yield from reader.expect(*expected)) == "{":
            yield from self._read_object(reader, writer)
            reader.hold()
            if (yield from reader.expect(",", "]")) == "]":
                break
            expected = ["{", "]"]  # the last one may have a comma, too
        reader.release()

    def _read_object(self, reader: Reader, writer: Writer) -> Steps[None]:
        """Read the rest of an object."""
        name, arguments, begun = "", "", False
        while (yield from self._next_key(reader)):
            key = yield from read_string(reader)
            yield from reader.expect(":")
            yield from reader.run(BLANK)
            following = yield from reader.peek()
            if key in NAME_KEYS and following == '"' and not name:
                name = yield from read_string(reader)
            elif key in ARGUMENT_KEYS and name and following == "{" and not begun:
                begun = True
                begin(reader, writer, name)
                yield from read_value(reader, writer.arguments)
            else:
                if not (self.marked or key in NAME_KEYS + ARGUMENT_KEYS + OTHER_KEYS):
                    raise NotACallError
                value: list[str] = []
                yield from read_value(reader, value.append)
                if key in ARGUMENT_KEYS and not arguments:
                    arguments = "".join(value)
        if not begun:
            if not name or not (arguments or self.marked):
                raise NotACallError
            arguments = _as_object(arguments)
            begin(reader, writer, name)
            writer.arguments(arguments)

    def _next_key(self, reader: Reader) -> Steps[bool]:
        """Read up to a key of an object; False if its end comes first."""
        yield from reader.run(BLANK)
        if (yield from reader.literal(",")):
            yield from reader.run(BLANK)
        following = yield from reader.peek()
        if following == "}":
            reader.take(reader.pos + 1)
        elif following != '"':
            raise NotACallError
        return following == '"'


class HermesParser(JsonCallParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as of Hermes and Qwen."""

    marks = ("<tool_call>",)
    ignored = ("</tool_call>",)


class Llama3JsonParser(JsonCallParser):
    """`{"name": ..., "parameters": {...}}`, several parted by ";", as of Llama 3 and 4."""

    marks = ("<|python_tag|>", "<|python_start|>")
    ignored = ("<|python_end|>",)
    opening = "{"
    marked = False

    def read_calls(self, reader: Reader, writer: Writer) -> Steps[None]:
        yield from reader.expect("{")
        yield from self._read_object(reader, writer)


class MistralParser(JsonCallParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` or `[TOOL_CALLS]name[ARGS]{...}`."""

    marks = ("[TOOL_CALLS]",)

    def read_calls(self, reader: Reader, writer: Writer) -> Steps[None]:
        yield from reader.run(BLANK)
        if (yield from reader.peek()) in ("[", "{"):
            yield from super().read_calls(reader, writer)
            return
        name = yield from reader.run(NAME)
        yield from reader.run(BLANK)
        if (yield from reader.literal("[CALL_ID]")):
            yield from reader.run(NAME)
        yield from reader.literal("[ARGS]")
        yield from reader.run(BLANK)
        if not name or (yield from reader.peek()) != "{":
            raise NotACallError
        begin(reader, writer, name)
        yield from read_value(reader, writer.arguments)


def _as_object(arguments: str) -> str:
    """Return the arguments of a call, which some models leave out or write into a string.

    Raises:
        NotACallError: They are no object.
    """
    if arguments.startswith('"'):
        arguments = decode_string(arguments).strip()
    if arguments in ("", "null", "[]"):
        return "{}"
    if not arguments.startswith("{"):
        raise NotACallError
    return mended(arguments)
