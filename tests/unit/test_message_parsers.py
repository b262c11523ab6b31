"""Thoughts, text and calls, told apart whatever pieces the text comes in."""

import ast
import io
import json
import math
import time
import tokenize
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.text.deltas import ContentDelta, ToolCallDelta
from nanovllm.text.message_format import REASONING_PARSERS
from nanovllm.text.message_parser import MessageParser
from nanovllm.text.parsers.calls import MAX_CALLS, CallParser, Function
from nanovllm.text.parsers.json_calls import HermesParser, Llama3JsonParser, MistralParser
from nanovllm.text.parsers.json_values import MAX_DEPTH
from nanovllm.text.parsers.pythonic import PythonicParser
from nanovllm.text.parsers.qwen3_coder import Qwen3CoderParser
from nanovllm.text.parsers.reader import MAX_HELD
from tests.message_parts import Parts, total

FORMATS: dict[str, type[CallParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen3_coder": Qwen3CoderParser,
}
FUNCTIONS: list[Function] = [
    {"name": "f", "parameters": {"properties": {"a": {}, "s": {"type": "string"}}}}
]


def parser(
    name: str,
    reasoning: str = "none",
    begun: bool = False,
    functions: Sequence[Function] = FUNCTIONS,
) -> MessageParser:
    calls = FORMATS[name](["<|end|>"], functions)
    return MessageParser(REASONING_PARSERS[reasoning], begun, calls)


def parse(make: Callable[[], MessageParser], *pieces: str) -> Parts:
    each = make()
    deltas = [delta for piece in pieces for delta in each.push(piece)]
    return total(deltas + each.finish())


def check(make: Callable[[], MessageParser], text: str) -> Parts:
    """Parse a text as a whole, by characters, and in two at every place."""
    whole = parse(make, text)
    assert parse(make, *text) == whole
    for split in range(0, len(text), max(1, len(text) // 50)):
        assert parse(make, text[:split], text[split:]) == whole, split
    return whole


F: tuple[str, str] = ("f", '{"a": 1}')
G: tuple[str, str] = ("g", "{}")

MESSAGES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello  \n", "Hello  \n", []),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F]),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>{"name":"g","arguments":{}}</tool_call>\n',
        "Let me see.",
        [F, G],
    ),
    ("hermes", '<tool_call>{ "arguments": {"a": 1}, "name": "f"}</tool_call> ', "", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    ("hermes", '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [G]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [G]),
    ("hermes", '<tool_call>\n{"name": "g", "arguments": {}}}\n</tool_call>', "", [G]),
    ("hermes", '<tool_call>{"name": "g", "arguments": {}</tool_call>', "", [G]),
    ("hermes", '<tool_call>{"name": "g", "arguments": {}}', "", [G]),
    ("hermes", 'A\n<tool_call>{"name": "g"}</tool_call>\nB', "A\nB", [G]),
    ("hermes", 'A<tool_call>\n{"name": "g"}\n</tool_call> B', "A B", [G]),
    (
        "hermes",
        '<tool_call>{"name": "g", "arguments": {"a": [1, ",]", ], "b": {},\n}}</tool_call>',
        "",
        [("g", '{"a": [1, ",]"], "b": {}}')],
    ),
    ("hermes", 'A \n<tool_call>\n{"name": "g"}\n</tool_call>B', "A \nB", [G]),
    ("hermes", ' <tool_call>\n{"name": "g"}\n</tool_call>B', "B", [G]),
    ("hermes", '<tool_call>[{"name": "g"}, ]</tool_call>', "", [G]),
    ("mistral", '[TOOL_CALLS][{"name": "g"},\n{"name": "g"}, ]', "", [G, G]),
    ("hermes", '<tool_call>\n<tool_call>{"name": "g"}</tool_call>', "<tool_call>", [G]),
    ("hermes", '<tool_call>[{"name": "g"}, {"name": "g"}]</tool_call>', "", [G, G]),
    # What other languages write is JSON in the end.
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": [NaN, -Infinity, -1, True]}}</tool_call>',
        "",
        [("f", '{"a": [null, null, -1, true]}')],
    ),
    ("hermes", '<tool_call>{"name": "g", "arguments": None}</tool_call>', "", [G]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "it\\\'s \\d\t\\\\\n\\\n"}}</tool_call>',
        "",
        [("f", '{"a": "it\'s \\\\d\\t\\\\\\n\\n"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": NaN}"}</tool_call>',
        "",
        [("f", '{"a": null}')],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{} {}"}</tool_call>', "", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": Nay', "Nay", [("f", '{"a": ')]),
    # What is no call is text, and nothing of it is lost; so it need not be said again.
    ("hermes", "<tool_call>no</tool_call>", "<tool_call>no</tool_call>", []),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "", []),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("hermes", '<tool_call>{"name": 1}</tool_call>', "", []),
    ("hermes", '<tool_call>{"name": "\\ud83d"}</tool_call>', "", []),
    ("hermes", "a < b <tool_", "a < b <tool_", []),
    # A call that has begun keeps what there is of it.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call><|end|>', "", [G]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    ("llama3_json", '{"name": "f", "arguments": {"a": 1}}', "", [F]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        "",
        [F, G],
    ),
    ("llama3_json", '{"type": "function", "name": "g", "parameters": {}}\n', "", [G]),
    ("llama3_json", 'Sure:\n{"name": "g", "parameters": {}}', "Sure:", [G]),
    ("llama3_json", '{"name": "g", "parameters": {}}\n{"name": "g", "parameters": {}}', "", [G, G]),
    ("llama3_json", '{"name": "Bob"}', '{"name": "Bob"}', []),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", 'is {"name": "g", "parameters": {}}', "", []),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', "", [F]),
    (
        "mistral",
        'Yes. [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"arguments": {}, "name": "g"}]',
        "Yes.",
        [F, G],
    ),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}', "", [F, G]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [F]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', "", [F]),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"a": 1}}', "", [F]),
    ("mistral", "[TOOL_CALLS]no call", "[TOOL_CALLS]no call", []),
    ("mistral", '[TOOL_CALLS][{"name": "g"}, {no}]', ", {no}]", [G]),
    (
        "qwen3_coder",
        "Yes.\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "Yes.",
        [F, G],
    ),
    # Tags that models leave out.
    ("qwen3_coder", "<function=f><parameter=a>1</function></tool_call>", "", [F]),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>1</tool_call> B", "B", [F]),
    (
        "qwen3_coder",
        "<function=f>\n<parameter=a>\n1\n<parameter=b>\n</parameter></function>",
        "",
        [("f", '{"a": 1, "b": ""}')],
    ),
    (
        "qwen3_coder",
        '<function=f><parameter=s>\n\n"x" </p>\n\n</parameter><parameter=t>5</function>',
        "",
        [("f", '{"s": "\\n\\"x\\" </p>\\n", "t": "5"}')],
    ),
    ("qwen3_coder", "<function=f><parameter=s>\nab\n", "", [("f", '{"s": "ab')]),
    ("qwen3_coder", "<function=f><parameter=a>\n12", "", [("f", '{"a": 12')]),
    ("qwen3_coder", "<function=f>no", "no", [("f", "{")]),
    ("qwen3_coder", "<function=f><parameter=a", "<parameter=a", [("f", "{")]),
    ("qwen3_coder", "<tool_call>\n<function=f", "", []),
    ("qwen3_coder", "<tool_call>no</tool_call> <function=> <function=", "", []),
    ("pythonic", "[f(a=1), g()]", "", [F, G]),
    ("pythonic", "<|python_start|>[f(a = 1,), g( ) ,]<|python_end|>", "", [F, G]),
    ("pythonic", "Sure.\n[f(a=1)]\n", "Sure.", [F]),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[f(a==1)]", "[f(a==1)]", []),
    ("pythonic", "[a link](f) and [f(a=1)]", "[a link](f) and [f(a=1)]", []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[f(a=1), g", ", g", [F]),
    ("pythonic", "[f(a=eval('1'))]", "eval('1'))]", [("f", '{"a": ')]),
    ("pythonic", "[f(a=1, a=b)]", "b)]", [("f", '{"a": 1, "a": ')]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), MESSAGES)
def test_messages(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    parts = check(lambda: parser(name), text)
    assert parts.calls == calls
    assert parts.content == (content if calls else text)


THOUGHTS: list[tuple[str, bool, str, str, str]] = [
    ("qwen3", False, "<think>\nhm\n</think>\n\nYes", "hm", "Yes"),
    ("qwen3", False, "\n<think>hm</think>Yes", "hm", "Yes"),
    ("qwen3", False, "Yes <think>hm</think>", "", "Yes <think>hm</think>"),
    ("qwen3", False, "  Yes", "", "  Yes"),
    ("qwen3", False, "<think>hm\n\n", "hm", ""),
    ("qwen3", False, "<thin", "", "<thin"),
    ("qwen3", True, "\nhm\n\nhm\n</think>\n\nYes", "hm\n\nhm", "Yes"),
    ("qwen3", True, "<think>hm</think>Yes", "hm", "Yes"),
    ("qwen3", True, "\n</think>\n\nYes\n", "", "Yes\n"),
    ("qwen3", True, "a </think b </think>c", "a </think b ", "c"),
    ("mistral", False, "[THINK]hm[/THINK]Yes", "hm", "Yes"),
    ("none", False, "<think>hm</think>Yes", "", "<think>hm</think>Yes"),
]


@pytest.mark.parametrize(("marks", "begun", "text", "reasoning", "content"), THOUGHTS)
def test_thoughts(marks: str, begun: bool, text: str, reasoning: str, content: str) -> None:
    parts = check(lambda: parser("hermes", marks, begun), text)
    assert parts == Parts(reasoning, content, [])


def test_a_call_in_thoughts_is_a_thought() -> None:
    call = '<tool_call>{"name": "g"}</tool_call>'
    parts = check(lambda: parser("hermes", "qwen3"), f"<think>{call}</think>\n\n{call}")
    assert parts == Parts(call, "", [G])


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<think>", "</think>", "<|python_start|>", "<|python_end|>", "<|end|>", "<", "</"),
    *('{"name": "f", ', '"arguments": {', '"parameters":{"a":', '{"id": 1,', '"name":', '{"name"'),
    *("{", "}", "[", "]", "(", ")", '"', "'", "'''", '"""', "\\", "\\n", "\\u00e9", "\\ud83d"),
    *(
        "\\x4",
        "\\1",
        "12",
        ":",
        ",",
        ", ",
        ";",
        "=",
        " ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "[f(a=",
        "g()",
    ),
    *(
        "\n[",
        "\n{",
        "f",
        "a=",
        "b =",
        "2c=",
        "None",
        "True",
        "-1.5",
        "1_0",
        "0x1f",
        "1e5",
        "word",
        "é",
        "名",
    ),
    *("<function=f>", "<parameter=a>", "<parameter=s>", "</parameter>", "</function>"),
    *("NaN", "-", "Infinity", "True", "N", "\\d", "\\u12"),
    *("1, 2, 3", "'s'", '"t"', "{'k': ", '{"k": 1}', "\\'", '\\"', "null", "🙂", ",\n"),
]
BEGINNINGS = [
    "",
    '<tool_call>{"name": "f", "arguments": {',
    '{"name": "f", "parameters": {"a":',
    '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}',
    "[TOOL_CALLS]f{",
    "[f(a=",
    "[f(a='",
    "text\n[f(a=[",
    "<think>\n",
    "<tool_call>\n<function=f>\n<parameter=s>\n",
    "<function=f>\n<parameter=a>\n",
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reasoning", ["none", "qwen3"])
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_do_not_matter(name: str, reasoning: str, data: st.DataObject) -> None:
    fragments = data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=25))
    text = data.draw(st.sampled_from(BEGINNINGS)) + "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def make() -> MessageParser:
        return parser(name, reasoning)

    whole = parse(make, text)
    assert parse(make, *pieces) == whole
    assert parse(make, *text) == whole
    if not whole.calls and reasoning == "none":
        # It stays within what had begun like a call.
        assert whole.content.replace("<|end|>", "") == text.replace("<|end|>", "")


PYTHON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates are in no text; JSON knows lists, no tuples.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab'\"\\\n"), inner, max_size=3)
    ),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(
    st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True), PYTHON_VALUES, max_size=4
)


def as_tag(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "hermes": lambda a: f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': a})}\n</tool_call>",
    "llama3_json": lambda a: json.dumps({"name": "f", "parameters": a}, ensure_ascii=False),
    "mistral": lambda a: f"[TOOL_CALLS]f[ARGS]{json.dumps(a, indent=1)}",
    "qwen3_coder": lambda a: (
        "<tool_call>\n<function=f>\n"
        + "".join(f"<parameter={k}>\n{as_tag(v)}\n</parameter>\n" for k, v in a.items())
        + "</function>\n</tool_call>"
    ),
    "pythonic": lambda a: f"[f({', '.join(f'{key}={value!r}' for key, value in a.items())})]",
}


@pytest.mark.parametrize("name", FORMATS)
@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_arguments(name: str, data: st.DataObject) -> None:
    arguments = {
        k: v for k, v in data.draw(ARGUMENTS).items() if k not in ("true", "false", "null")
    }
    text = RENDER[name](arguments)
    types: dict[str, Any]
    types = {k: {"type": ["null", "string"]} if v is None else {} for k, v in arguments.items()}
    types |= {k: {"type": "string"} for k, v in arguments.items() if isinstance(v, str)}
    function = {"name": "f", "parameters": {"type": "object", "properties": types}}
    for pieces in ([text], list(text)):
        parts = parse(lambda: parser(name, functions=[function]), *pieces)
        assert parts.content == ""
        ((called, written),) = parts.calls
        assert called == "f"
        assert json.loads(written) == arguments


@given(
    st.lists(st.sampled_from([*"abxuU0179nrtNf'\"\\\n/{}é", "\\", "\\x4", "\\u00", "\\U0001"])),
    st.sampled_from(["'", '"', "'''", '"""']),
)
@settings(max_examples=400, deadline=None)
@example(list("\\ud83d\\ude00"), "'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_python_strings(characters: list[str], quote: str) -> None:
    """Held to Python's own, of which no more is asked than what a string says."""
    literal = quote + "".join(characters) + quote
    if "\\/" in literal or "\\N" in literal:
        return  # an escape of JSON's, and one that we do not have
    try:
        expected = ast.literal_eval(literal)
        tokens = list(tokenize.generate_tokens(io.StringIO(literal).readline))
    except (SyntaxError, ValueError):
        return
    if sum(token.type == tokenize.STRING for token in tokens) > 1:
        return  # they would be one, which we leave to Python
    parts = check(lambda: parser("pythonic"), f"[f(a={literal})]")
    # JSON puts halves of characters together.
    whole = expected.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert json.loads(parts.calls[0][1])["a"] == whole


def text_or(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "string"}, schema]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, "\n[1, NaN]\n", [1, None]),
        ({"type": "array"}, "[1, [", "[1, ["),
        ({"type": "array"}, "[" * 1000, "[" * 1000),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, '"5"', '"5"'),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"const": "1"}, "1", "1"),
        ({"$ref": "#/$defs/Level"}, "3", "3"),
        ({"$ref": "#/$defs/Loop"}, "3", 3),
        ({"$ref": "#/nowhere"}, "3", 3),
        ({}, "3", 3),
        ({}, "three", "three"),
        ({}, "", ""),
        (None, "3", "3"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["true", 1]}, "true", "true"),
        (text_or({"type": "integer", "maximum": 3}), "5", "5"),
        (text_or({"type": "integer", "maximum": 3}), "3", 3),
        (text_or({"type": "number", "exclusiveMinimum": 3}), "3", "3"),
        ({"type": ["string", "integer"]}, "5.5", "5.5"),
        ({"type": ["string", "integer"]}, "5.0", 5),
        ({"type": ["string", "number"]}, "5.5", 5.5),
        (text_or({"type": "array", "items": {"type": "integer"}}), '["x"]', '["x"]'),
        (text_or({"type": "array", "items": {"type": "integer"}}), "[1, 2]", [1, 2]),
        (text_or({"type": "array", "maxItems": 1}), "[1, 2]", "[1, 2]"),
        (text_or({"prefixItems": [{}, {"$ref": "#/$defs/Level"}]}), '["x", "3"]', ["x", "3"]),
        (text_or({"type": "array", "prefixItems": [{"enum": [1]}]}), "[2]", "[2]"),
        (text_or({"type": "object", "required": ["k"]}), '{"x": 1}', '{"x": 1}'),
        (text_or({"type": "object", "required": ["k"]}), '{"k": 1}', {"k": 1}),
        (text_or({"type": "object", "additionalProperties": False}), '{"k": 1}', '{"k": 1}'),
        (text_or({"type": "object", "properties": {"k": {"const": 1}}}), '{"k": 2}', '{"k": 2}'),
        # What is no schema says nothing.
        (text_or({"type": "object", "required": [[]], "properties": 3}), '{"k": 1}', '{"k": 1}'),
        (text_or({"type": "integer", "minimum": "x", "maximum": True}), "5", 5),
    ],
)
def test_values_in_tags(schema: Any, text: str, value: object) -> None:
    definitions = {"Level": {"enum": ["3"]}, "Loop": {"$ref": "#/$defs/Loop"}}
    parameters = {"$defs": definitions, "properties": {} if schema is None else {"a": schema}}
    call = f"<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>"
    functions = [{"name": "f", "parameters": parameters}]
    parts = check(lambda: parser("qwen3_coder", functions=functions), call)
    assert json.loads(parts.calls[0][1]) == {"a": value}


@pytest.mark.parametrize("leaf", [{"type": []}, {"enum": []}, {"anyOf": []}, {}])
def test_types_that_multiply(leaf: dict[str, Any]) -> None:
    definitions: dict[str, Any] = {"X9": leaf}
    for level in range(9):
        definitions[f"X{level}"] = {"anyOf": [{"$ref": f"#/$defs/X{level + 1}"}] * 100}
    parameters = {"$defs": definitions, "properties": {"a": {"$ref": "#/$defs/X0"}}}
    functions = [{"name": "f", "parameters": parameters}]
    call = "<function=f><parameter=a>3</parameter></function>"
    parts = parse(lambda: parser("qwen3_coder", functions=functions), call)
    assert json.loads(parts.calls[0][1]) == {"a": 3}


def test_alternatives_within_alternatives_are_not_all_looked_at() -> None:
    anything = text_or({"type": "array", "items": {"$ref": "#/$defs/Any"}})
    anything["anyOf"] += anything["anyOf"][1:] * 60
    parameters = {"$defs": {"Any": anything}, "properties": {"a": anything}}
    functions = [{"name": "f", "parameters": parameters}]
    call = f"<function=f><parameter=a>{'[' * 100}5{']' * 100}</parameter></function>"
    started = time.process_time()
    parts = parse(lambda: parser("qwen3_coder", functions=functions), call)
    assert time.process_time() - started < 1
    assert isinstance(json.loads(parts.calls[0][1])["a"], list)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("1_000", 1000),
        ("0x1F", 31),
        ("+5", 5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1e3", -1000.0),
        ("(1, 2,)", [1, 2]),
        ("()", []),
        ("{'a': (None,)}", {"a": [None]}),
        ("true", True),
        ("null", None),
        ("''", ""),
        ("'''it's'''", "it's"),
    ],
)
def test_python_values(literal: str, value: object) -> None:
    parts = check(lambda: parser("pythonic"), f"[f(a={literal}, b=1)]")
    assert json.loads(parts.calls[0][1]) == {"a": value, "b": 1}


@pytest.mark.parametrize(
    "literal",
    ["007", "1j", "inf", "nan", "x", "f''", "[1", "{1: 2}", "{'a'}", "1 2", "'a' 'b'", "a.b"],
)
def test_python_that_is_no_value(literal: str) -> None:
    parts = check(lambda: parser("pythonic"), f"[f(a={literal})]")
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        json.loads(parts.calls[0][1])
    assert parts.content


def test_arguments_come_as_they_are_written() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"text": "'
    each = parser("hermes")
    assert each.push(call) == [ToolCallDelta(0, "f", '{"text": "')]
    assert each.push("more") == [ToolCallDelta(0, None, "more")]
    each = parser("pythonic")
    assert each.push("[f(text='") == [ToolCallDelta(0, "f", '{"text": "')]
    assert each.push("mo\nre") == [ToolCallDelta(0, None, "mo\\nre")]


def test_text_is_held_back_only_while_it_may_be_a_call() -> None:
    each = parser("hermes")
    assert each.push("a <to") == [ContentDelta("a")]
    assert each.push("n") == [ContentDelta(" <ton")]
    assert each.push(" " * 5000) != []
    each = parser("llama3_json")
    assert each.push('{"name": "f", "parameters": "' + "x" * MAX_HELD) != []
    each = parser("hermes")
    assert each.push('<tool_call>{"arguments": {"x": "' + "x" * MAX_HELD) != []


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_nested_too_deeply_is_no_value(name: str) -> None:
    begin = {"mistral": "[TOOL_CALLS]f", "pythonic": "[f(a="}.get(name, "")
    begin = begin or RENDER[name]({}).split("{}")[0]
    parts = parse(lambda: parser(name), begin + ('{"a":' * 10 * MAX_DEPTH))
    ((_, written),) = parts.calls
    assert written.count("{") <= MAX_DEPTH + 1
    assert parts.content


MEGABYTE = 1_000_000
UNITS = [
    *(
        "<tool_call>",
        "<tool_call>{",
        '<tool_call>{"name": "f"}',
        '<tool_call>{"name":',
        "</tool_call>",
    ),
    *("[TOOL_CALLS]", "[TOOL_CALLS][{", "[TOOL_CALLS]f{}", "<|python_tag|>", "<|python_start|>[f("),
    *("[", "{", "\n[", "\n{", "\n[f(", "\n[f(a=", '\n{"id":', '{"name":"f","parameters":{}};', "<"),
    *("f(a=1),", "a=1,", "[],", "{},", "1,", "1.5,", "'',", "''' ''',", "'\\n',", "\\x41", "\\0"),
    *("<function=f>", "<function=g></function>", "</parameter><parameter=a>1"),
    *("</parameter><parameter=s>", "</parameter", "<parameter="),
    *("NaN,", "-Infinity,", "True,", "N", "-", '"\\d",', "\\d", '"\n",', "\na"),
    *("\\", '"', "'", " ", "\n", "a", '{"a":1},', "{'a':1},", '"\\"",', '{"name":"f"},', "<think>"),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("begin", BEGINNINGS)
@pytest.mark.slow
def test_a_megabyte_of_anything_takes_less_than_a_second(name: str, begin: str) -> None:
    for unit in UNITS:
        text = begin + unit * (MEGABYTE // len(unit))
        each = parser(name, "qwen3")
        start = time.process_time()
        each.push(text)
        each.finish()
        assert time.process_time() - start < 1, unit


@pytest.mark.parametrize("name", FORMATS)
def test_time_is_linear_in_small_pieces(name: str) -> None:
    """Also where all of it is held back, as arguments are that come before the name."""
    for begin in BEGINNINGS:
        each = parser(name)
        start = time.process_time()
        each.push(begin)
        for _ in range(30_000):
            each.push('\\"')
        each.finish()
        assert time.process_time() - start < 2, begin


def test_so_many_calls_and_no_more() -> None:
    parts = parse(
        lambda: parser("hermes"), '<tool_call>{"name": "g"}</tool_call>\n' * (MAX_CALLS + 5)
    )
    assert len(parts.calls) == MAX_CALLS
    assert parts.content.count("<tool_call>") == 5
    parts = parse(lambda: parser("pythonic"), f"[{'g(), ' * (MAX_CALLS + 5)}]")
    assert len(parts.calls) == MAX_CALLS
    assert math.isclose(parts.content.count("g()"), 5)
