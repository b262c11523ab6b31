"""Calls written with tags: `<function=f>`, `<parameter=a>`, a value without quotes."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nanovllm.text.parsers.calls import NAME, CallParser, Function, begin
from nanovllm.text.parsers.fitting import Fitting
from nanovllm.text.parsers.json_values import ENCODER, mended
from nanovllm.text.parsers.parameter_types import STRING, Schema, alternatives, type_of, types_of
from nanovllm.text.parsers.reader import Markers, NotACallError, Reader, Steps, Write
from nanovllm.text.parsers.writer import Writer

KEY = re.compile(r"[^<>\n]*")
CALL, FUNCTION, PARAMETER = "<tool_call>", "<function=", "<parameter="
END, FUNCTION_END, CALL_END = "</parameter>", "</function>", "</tool_call>"
VALUE_ENDS = (END, PARAMETER, FUNCTION_END, CALL_END)
"""What a value ends at; some models leave out its own end."""


class Parameter(NamedTuple):
    """What a parameter may be.

    Args:
        types: The types that it may have; all of them if there are none.
        schema: Its schema.
        root: What references in the schema refer to.
    """

    types: frozenset[str]
    schema: Any
    root: Schema


TEXT = Parameter(frozenset((STRING,)), {"type": STRING}, {})


class Qwen3CoderParser(CallParser):
    """`<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`.

    Values are text in a line of its own or several. What they mean is told by the function's
    parameters: text where these allow nothing else or do not have it, JSON otherwise. Where they
    allow text among other things, it is JSON only if it fits one of these.
    """

    marks = (CALL, FUNCTION)
    ignored = (CALL_END,)

    def __init__(self, dropped: Iterable[str] = (), functions: Sequence[Function] = ()) -> None:
        super().__init__(dropped, functions)
        self._functions = {function["name"]: function for function in functions}
        self._parameters: dict[tuple[str, str], Parameter] = {}
        self._ends = Markers([*VALUE_ENDS, *self._dropped])

    def read_calls(self, reader: Reader, writer: Writer) -> Steps[None]:
        reader.rewind()  # to the mark, of which there are two
        reader.hold()
        yield from reader.literal(CALL)
        yield from reader.expect(FUNCTION)
        name = yield from reader.run(NAME)
        if not name or not (yield from reader.literal(">")):
            raise NotACallError
        begin(reader, writer, name)
        writer.arguments("{")
        separator = ""
        while key := (yield from self._read_key(reader)):
            writer.arguments(f"{separator}{ENCODER.encode(key)}: ")
            separator = ", "
            yield from self._read_value(reader, writer.arguments, self._parameter(name, key))
        writer.arguments("}")

    def _read_key(self, reader: Reader) -> Steps[str]:
        """Read what begins a parameter and return its name, or "" behind the last one."""
        reader.hold()
        key = ""
        if (yield from reader.expect(PARAMETER, FUNCTION_END, CALL_END)) == PARAMETER:
            key = yield from reader.run(KEY)
            if not key or not (yield from reader.literal(">")):
                raise NotACallError
        reader.release()
        return key

    def _read_value(self, reader: Reader, write: Write, parameter: Parameter) -> Steps[None]:
        pieces: list[str] = []
        is_text = parameter.types == {STRING}
        if is_text:
            write('"')
        value = TextValue(write if is_text else pieces.append, is_text)
        found = yield from reader.until(self._ends, value.add)
        if found != END:
            reader.pos -= len(found)
        if found not in VALUE_ENDS:
            write("".join(pieces))
            raise NotACallError
        write('"' if is_text else _as_json("".join(pieces), parameter))

    def _parameter(self, name: str, key: str) -> Parameter:
        found = self._parameters.get((name, key))
        if found is None:
            schema = self._functions.get(name, {}).get("parameters")
            properties = schema.get("properties") if isinstance(schema, dict) else None
            found = TEXT
            if isinstance(properties, dict) and key in properties:
                each = [types_of(one) for one in alternatives(properties[key], schema or {})]
                types = frozenset().union(*each) if all(each) else frozenset()
                found = Parameter(types, properties[key], schema or {})
            self._parameters[name, key] = found
        return found


class TextValue:
    """A value as it comes, less the newlines that it begins and ends with.

    Args:
        write: Takes it.
        escaped: Whether to write it as within a JSON string.
    """

    def __init__(self, write: Write, escaped: bool) -> None:
        self._write = write
        self._escaped = escaped
        self._newline = ""
        self._begun = False

    def add(self, text: str) -> None:
        """Add a piece; a newline at its end waits for more."""
        if text and not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
        if not text:
            return
        text = self._newline + text
        body = text.removesuffix("\n")
        self._newline = text[len(body) :]
        self._write(ENCODER.encode(body)[1:-1] if self._escaped else body)


def _as_json(text: str, parameter: Parameter) -> str:
    """Return what a value means: JSON, or text where it is none or not what it may be."""
    try:
        written = mended(text.strip())
        value = json.loads(written)
        is_text = STRING in parameter.types and (
            type_of(value) == STRING or not Fitting(parameter.root).fits(value, parameter.schema)
        )
    except (NotACallError, ValueError, RecursionError):
        is_text = True
    return ENCODER.encode(text) if is_text else written
