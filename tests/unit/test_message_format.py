"""How models write messages: told by their templates, read back, and held to grammars."""

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

import nanovllm
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.text.grammar_compiler import GrammarCompiler, Vocabulary
from nanovllm.text.grammars import MAX_GRAMMAR_SIZE, lark
from nanovllm.text.message_format import (
    MISTRAL_V11,
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    MessageFormat,
)
from nanovllm.text.tokenizer import Tokenizer
from tests.message_parts import Parts, total

DEMO = Path(nanovllm.__file__).parent / "demo_model"
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|python_tag|>", "<tool_call>"]
SPECIAL += ["</tool_call>", "<think>", "</think>", "<|eot_id|>"]


@cache
def make_tokenizer(*special: str) -> Tokenizer:
    """The bundled model's, with more special tokens."""
    plain = Tokenizer.from_directory(DEMO)
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, plain.special_tokens)


@cache
def compiler(*special: str) -> GrammarCompiler:
    tokenizer = make_tokenizer(*special)
    return GrammarCompiler(lambda: Vocabulary.of(tokenizer, tokenizer.end_id, ()))


def detect(template: str | None, *special: str, **names: str) -> MessageFormat:
    return MessageFormat.detect(template, make_tokenizer(*special), **names)


def parse(
    message_format: MessageFormat, text: str, prompt: str = "", *, tools: bool = True
) -> Parts:
    parser = message_format.parser(prompt, tools=tools, reasoning=True, functions=TOOLS)
    return total([delta for piece in text for delta in parser.push(piece)] + parser.finish())


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        ("chatml", "hermes", "none"),
        ("hermes", "hermes", "none"),
        ("llama-2", "hermes", "none"),
        ("llama-3.1", "llama3_json", "none"),
        ("llama-pythonic", "pythonic", "none"),
        ("mistral-tools", "mistral", "none"),
        ("qwen2.5", "hermes", "none"),
        ("qwen3", "hermes", "qwen3"),
        ("qwen3-tools", "hermes", "qwen3"),
        ("qwen3-coder", "qwen3_coder", "none"),
    ],
)
def test_templates_tell(template: str, calls: str, reasoning: str) -> None:
    found = detect(TEMPLATES[template])
    assert found.calls == TOOL_CALL_PARSERS[calls]
    assert found.thoughts == REASONING_PARSERS[reasoning]


def test_mistrals_newer_calls_and_thoughts() -> None:
    found = detect(TEMPLATES["mistral-v11"])
    assert found.calls == MISTRAL_V11
    assert found.thoughts == REASONING_PARSERS["mistral"]
    assert detect(None, "[TOOL_CALLS]", "[ARGS]").calls == MISTRAL_V11
    assert detect(TEMPLATES["mistral-tools"], "[ARGS]").calls == TOOL_CALL_PARSERS["mistral"]
    assert detect(None, "[TOOL_CALLS]").calls == TOOL_CALL_PARSERS["mistral"]


def test_deepseek_thinks_always() -> None:
    r1 = detect("{{ '<\uff5cAssistant\uff5c>' }}{# </think> #}")
    assert r1.thoughts == REASONING_PARSERS["deepseek_r1"]
    assert parse(r1, "hm</think>Yes") == Parts("hm", "Yes", [])
    assert parse(r1, "Yes", "<think>\n\n</think>\n\n") == Parts("", "Yes", [])
    v3 = detect("{% if thinking %}{{ '<\uff5cAssistant\uff5c><think>' }}{% endif %}")
    assert v3.thoughts == REASONING_PARSERS["qwen3"]


def test_a_way_of_calling_that_is_not_known_is_told(caplog: pytest.LogCaptureFixture) -> None:
    glm = "{% if tools %}<tool_call>f<arg_key>a</arg_key>{% endif %}"
    assert detect(glm).calls == TOOL_CALL_PARSERS["hermes"]
    assert "--tool-call-parser" in caplog.text
    caplog.clear()
    detect(glm, tool_call_parser="hermes")
    detect(TEMPLATES["chatml"])
    detect(None)
    assert not caplog.text


def test_names_win_and_unknown_ones_are_listed() -> None:
    found = detect(TEMPLATES["qwen3"], tool_call_parser="pythonic", reasoning_parser="none")
    assert found.calls == TOOL_CALL_PARSERS["pythonic"]
    assert found.thoughts is None
    with pytest.raises(InvalidRequestError, match="hermes, llama3_json") as caught:
        detect(None, tool_call_parser="herms")
    assert caught.value.param == "tool_call_parser"
    with pytest.raises(InvalidRequestError, match="deepseek_r1, mistral, none, qwen3") as caught:
        detect(None, reasoning_parser="x")
    assert caught.value.param == "reasoning_parser"


def test_special_tokens_that_are_needed() -> None:
    assert not detect(TEMPLATES["qwen3"]).needs_special_tokens
    assert detect(TEMPLATES["qwen3"], "<tool_call>").needs_special_tokens
    assert detect(TEMPLATES["qwen3"], "<think>").needs_special_tokens
    found = detect(TEMPLATES["llama-3.1"], "<|python_tag|>", "<|eot_id|>")
    assert found.needs_special_tokens
    # What ends a message is no part of it, and a mark is none where nobody asked for calls.
    call = '<|python_tag|>{"name": "g", "parameters": {}}<|eot_id|>'
    assert parse(found, call) == Parts("", "", [("g", "{}")])
    assert parse(found, call, tools=False).content == '{"name": "g", "parameters": {}}'


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n", "hm"),
        ("<|im_start|>assistant\n<think>\nI wonder", "hm"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>assistant\n<think>\nhm\n</think>\n\nSo", ""),
        # Other messages' thoughts, and talk about them, are not this one's.
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", ""),
        ("User: use <think> tags.\nAssistant:", ""),
        ("<think>", "hm"),
    ],
)
def test_prompts_tell_whether_thoughts_have_begun(prompt: str, state: str) -> None:
    found = detect(TEMPLATES["qwen3"])
    text = "hm\n</think>\n\nYes"
    assert parse(found, text, prompt).reasoning == state
    if not state:
        assert parse(found, text, prompt).content == text


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"city": "東京 \"x\" \\ </tool_call> 'y'\n", "days": 3},
    {"flag": True, "none": None, "list": [1, 2.5, {"k": [False]}], "text": "[a](b), {c}: d; e=f"},
]
WITHOUT_TEXT = ["llama-3.1", "llama-pythonic", "mistral-tools", "hermes", "qwen2.5"]
ONE_CALL = ["llama-3.1"]


@pytest.mark.parametrize("name", [*WITHOUT_TEXT, "qwen3-tools", "mistral-v11"])
@pytest.mark.parametrize("num_calls", [1, 3])
def test_rendered_calls_are_read_back(name: str, num_calls: int) -> None:
    """Rendered by transformers."""
    if num_calls > 1 and name in ONE_CALL:
        pytest.skip("the template takes one call at most")
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    names = [f"f{i}" for i in range(num_calls)]
    calls = [
        {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": value}}
        for name, value in zip(names, ARGUMENTS[-num_calls:], strict=True)
    ]
    content = "" if name in WITHOUT_TEXT else "Let me see."
    reasoning = "hm" if name in ("qwen3-tools", "mistral-v11") else ""
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    user = {"role": "user", "content": "Hi"}
    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": [{}]}

    def render(*messages: dict[str, Any]) -> str:
        rendered, _ = utils.render_jinja_template(
            conversations=[list(messages)], chat_template=TEMPLATES[name], **variables
        )
        text: str = rendered[0]
        return text

    prompt = render(user)
    text = render(user, message | ({"reasoning_content": reasoning} if reasoning else {}))
    text = text.removeprefix(prompt)
    for header in ("<|im_start|>assistant\n", "<|im_start|>assistant"):
        text = text.removeprefix(header)
    text = text.removeprefix("<|start_header_id|>assistant<|end_header_id|>\n\n")
    for end in ("<|im_end|>\n", "<|eot_id|>", "</s>"):
        text = text.removesuffix(end)
    parts = parse(detect(TEMPLATES[name]), text, prompt)
    assert [call[0] for call in parts.calls] == names
    assert [json.loads(call[1]) for call in parts.calls] == ARGUMENTS[-num_calls:]
    assert parts.content == content
    assert parts.reasoning == reasoning


def test_rendered_calls_in_tags_are_read_back() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    arguments = {
        "city": '東京 "x" \\ <b>\n',
        "flag": True,
        "none": None,
        "tags": ["a"],
        "inner": {"y": False},
    }
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    rendered, _ = utils.render_jinja_template(
        conversations=[[{"role": "assistant", "content": "Hm.", "tool_calls": [call, call]}]],
        chat_template=TEMPLATES["qwen3-coder"],
    )
    text = rendered[0].removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
    parts = parse(detect(TEMPLATES["qwen3-coder"]), text)
    assert parts.content == "Hm."
    assert [name for name, _ in parts.calls] == ["weather"] * 2
    assert [json.loads(written) for _, written in parts.calls] == [arguments] * 2


TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "description": "%json of a place",
        "strict": True,
        "parameters": {
            "type": "object",
            "title": "Weather",
            "properties": {
                "city": {"type": "string", "maxLength": 5, "description": "Where"},
                "description": {"type": "integer", "minimum": 0, "maximum": 20},
                "flag": {"type": "boolean"},
                "none": {"type": "null"},
                "tags": {"type": "array", "items": {"enum": ["a", "b\"'\\"]}, "maxItems": 3},
                "inner": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}, "y": {"type": "boolean"}},
                    "required": ["y"],
                    "additionalProperties": False,
                },
            },
            "required": ["city", "flag"],
            "additionalProperties": False,
        },
    },
    {"name": "now", "strict": True},
    {
        "name": "tree",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/Tree"}},
            "$defs": {
                "Tree": {
                    "type": "object",
                    "properties": {
                        "leaf": {"type": "boolean"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                    },
                    "required": ["leaf"],
                    "additionalProperties": False,
                }
            },
            "required": ["root"],
        },
    },
]
WEATHER = TOOLS[:1]
SCHEMAS = {tool["name"]: tool.get("parameters", {"maxProperties": 0}) for tool in TOOLS}
ANSWER = {
    "type": "object",
    "properties": {"z": {"type": "integer", "maximum": 99}},
    "required": ["z"],
    "additionalProperties": False,
}


def constrain(
    message_format: MessageFormat,
    functions: Sequence[Mapping[str, Any]],
    answer: StructuredOutputsParams | None = None,
    *,
    forced: bool = False,
    parallel: bool = True,
    prompt: str = "",
    thinking: bool = True,
) -> StructuredOutputsParams | None:
    return message_format.constrain(
        answer, functions, forced=forced, parallel=parallel, prompt=prompt, thinking=thinking
    )


@cache
def vocabulary(*special: str) -> LLTokenizer:
    tokenizer = make_tokenizer(*special)
    return LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_token_id)


class Walk:
    """A random text that a grammar allows.

    Ends are taken where they are allowed, and otherwise mostly tokens that end something.

    Args:
        grammar: The grammar, in Lark.
        special: Special tokens of the tokenizer.
        seed: Of the choices.
    """

    def __init__(self, grammar: str, special: Sequence[str], seed: int) -> None:
        self.tokenizer = make_tokenizer(*special)
        self.matcher = LLMatcher(
            vocabulary(*special), LLMatcher.grammar_from_lark(grammar), log_level=0
        )
        assert not self.matcher.is_error(), self.matcher.get_error()
        self.random = random.Random(seed)
        self.ids: list[int] = []

    def take(self, text: str) -> bool:
        """Begin with a text, if the grammar allows that."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.matcher.validate_tokens(ids) < len(ids):
            return False
        self.matcher.consume_tokens(ids)
        self.ids += ids
        return True

    def go(self, num_tokens: int = 500) -> str | None:
        """Return a text, or None if it did not end."""
        eos = self.tokenizer.eos_token_id
        for _ in range(num_tokens):
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little").nonzero()[0].tolist()
            if not allowed or allowed == [eos] or (eos in allowed and self.random.random() < 0.5):
                return self.tokenizer.decode(self.ids, skip_special_tokens=False)
            ends = [i for i in allowed if i in end_ids()]
            some = ends if ends and self.random.random() < 0.6 else allowed
            token_id = self.random.choice([i for i in some if i != eos])
            assert self.matcher.consume_token(token_id), self.matcher.get_error()
            self.ids.append(token_id)
        return None


@cache
def end_ids() -> frozenset[int]:
    """Tokens that end with what ends something in JSON or Python."""
    tokenizer = make_tokenizer()
    ids = range(tokenizer.end_id)
    return frozenset(i for i in ids if tokenizer.token_text(i)[-1:] in ("}", "]", '"', ")"))


SAME = ("llama4_json", "llama4_pythonic", "qwen3_xml")
STYLES = {**TOOL_CALL_PARSERS, "mistral_v11": MISTRAL_V11}
STYLES = {name: STYLES[name] for name in STYLES if name not in SAME}
BEGINNINGS = ["", "Sure.", "Sure.\n<tool_call>", "Sure.\n[TOOL_CALLS]", "Sure.\n{", "a {b}\n["]


def check_calls(parts: Parts) -> None:
    for name, arguments in parts.calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("special", [(), tuple(SPECIAL)], ids=["plain", "special"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_every_walk_is_calls_that_are_valid(
    style: str, special: tuple[str, ...], num_rounds: int
) -> None:
    num_walks = num_calls = 0
    added = make_tokenizer(*special).added_tokens
    ids = {token.content: i for i, token in added.items() if token.special}
    modes: list[tuple[list[dict[str, Any]], bool, dict[str, Any] | None]] = [
        (TOOLS, True, None),
        (WEATHER, True, None),
        (TOOLS, False, ANSWER),
        (TOOLS, False, None),
    ]
    thoughts = "mistral" if style.startswith("mistral") else "qwen3"
    marks = REASONING_PARSERS[thoughts]
    assert marks is not None
    prompts = ["<|im_start|>assistant\n", f"<|im_start|>assistant\n{marks.begin}\n"]
    for (functions, forced, schema), prompt, parallel in product(modes, prompts, [True, False]):
        message_format = MessageFormat(STYLES[style], marks, ids)
        answer = None if schema is None else StructuredOutputsParams(json=schema)
        params = constrain(
            message_format, functions, answer, forced=forced, parallel=parallel, prompt=prompt
        )
        assert params is not None
        grammar = lark(params, ids)
        for seed, beginning in enumerate(BEGINNINGS * num_rounds):
            walk = Walk(grammar, special, seed)
            if prompt == prompts[1]:
                assert walk.take(f"{{hm}}{marks.end}\n\n")
            elif seed % 2:
                assert walk.take(f"{marks.begin}\n{{hm}}\n[x\n{marks.end}\n\n")
            if not walk.take(beginning) or (text := walk.go()) is None:
                continue
            num_walks += 1
            parts = parse(message_format, text, prompt)
            num_calls += len(parts.calls)
            check_calls(parts)
            assert parallel or len(parts.calls) <= 1
            if functions is WEATHER:
                assert {name for name, _ in parts.calls} == {"weather"}
            if forced or (schema is not None and parts.calls):
                assert parts.calls
                assert parts.content == ""
            elif schema is not None:
                jsonschema.validate(json.loads(parts.content), schema)
    assert num_walks >= 20 * num_rounds
    assert num_calls >= 5 * num_rounds


def test_what_needs_no_grammar() -> None:
    plain, thinker = detect(TEMPLATES["qwen2.5"]), detect(TEMPLATES["qwen3"])
    loose = [{"name": "f", "parameters": {"type": "object"}}]
    answer = StructuredOutputsParams(json=ANSWER)
    assert constrain(plain, []) is None
    assert constrain(plain, loose) is None
    assert constrain(plain, [], answer) is answer
    assert constrain(thinker, [], answer, prompt="<think>\n\n</think>\n\n") is answer
    assert constrain(thinker, [], answer, thinking=False) is answer
    assert constrain(thinker, [], answer, thinking=True) is not answer


def test_thoughts_come_before_an_answer_with_a_form() -> None:
    thinker = detect(TEMPLATES["qwen3"])
    answer = StructuredOutputsParams(choice=["yes", "no"])

    def allows(text: str, prompt: str = "", thinking: bool = True) -> bool:
        params = constrain(thinker, [], answer, prompt=prompt, thinking=thinking)
        assert params is not None
        walk = Walk(lark(params), (), 0)
        return walk.take(text) and walk.matcher.is_accepting()

    assert allows("yes")
    assert allows("<think>\nhm, no\n</think>\n\nyes")
    assert not allows("<think>\nhm, no\n</think>\n\nmaybe")
    assert not allows("<think>\nyes")
    assert not allows("<think></think>yes", thinking=False)
    assert allows("hm</think>yes", prompt="<think>")
    assert allows("hm</think>yes", prompt="<think>", thinking=False)
    assert not allows("yes", prompt="<think>")


def test_calls_beyond_the_first_are_left_out_where_there_may_be_one() -> None:
    parser = detect(None).parser("", tools=True, reasoning=True, parallel=False)
    call = '<tool_call>{{"name": "{}", "arguments": {{}}}}</tool_call>\n'
    deltas = parser.push(f"Hi {call.format('f')}{call.format('g')}") + parser.finish()
    assert total(deltas) == Parts("", "Hi", [("f", "{}")])


def test_a_call_that_must_be_made_and_is_cut_short_is_no_text() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"na'
    for only_calls, content in ((False, '<tool_call>{"na'), (True, "")):
        parser = detect(None).parser("", tools=True, reasoning=True, only_calls=only_calls)
        assert total(parser.push(call) + parser.finish()) == Parts("", content, [("f", "{}")])


def test_what_breaks_off_a_call_that_must_be_made_is_no_text() -> None:
    text = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1 & 2}}'
    for only_calls, content in ((False, "& 2}}"), (True, "")):
        parser = detect(TEMPLATES["qwen3-tools"]).parser(
            "", tools=True, reasoning=True, only_calls=only_calls
        )
        assert total(parser.push(text)) == Parts("hm", content, [("f", '{"a": 1 ')])
        assert not parser.finish()


@pytest.mark.parametrize("name", ["2fa", "-x", ".5", "True", "null", "None", "user-id", "été"])
def test_any_name_of_an_argument_is_read_back(name: str) -> None:
    parameters = {"properties": {"a": {"enum": [1]}, name: {"enum": [2]}}, "required": ["a", name]}
    message_format = detect(TEMPLATES["llama-pythonic"])
    functions = [{"name": "f", "parameters": parameters}]
    params = constrain(message_format, functions, forced=True, parallel=False)
    assert params is not None
    call = f"[f(a=1, {name}=2)]"
    walk = Walk(lark(params), (), 0)
    assert walk.take(call)
    assert walk.matcher.is_accepting()
    for text in (call, f"[f({name}=2)]", f"[f(a=1, {name} = 2)]"):
        ((_, arguments),) = parse(message_format, text).calls
        assert json.loads(arguments)[name] == 2


def test_text_is_free_until_a_strict_call_begins() -> None:
    message_format = detect(TEMPLATES["qwen2.5"])
    loose = {"name": "any", "parameters": {"properties": {"x": {"type": "integer"}}}}
    params = constrain(message_format, [*TOOLS, loose])
    assert params is not None

    def allows(text: str) -> bool:
        walk = Walk(lark(params), (), 0)
        return walk.take(text) and walk.matcher.is_accepting()

    assert allows("Just text with {json} and <tags>.")
    assert allows('A\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\nB')
    assert not allows('<tool_call>\n{"name": "then", "arguments": {}}\n</tool_call>')
    assert not allows('<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>')
    assert allows('<tool_call>\n{"name": "any", "arguments": {"x": "y"}}\n</tool_call>')
    assert not allows("<tool_call>\nno")


def test_functions_that_are_not_strict_take_any_arguments() -> None:
    loose = {"name": "any", "parameters": {"properties": {"x": {"type": "integer"}}}}
    calls = {
        "pythonic": "[any(x='y', z=[1])]",
        "qwen3_coder": "<tool_call>\n<function=any>\n<parameter=x>\ny\n</parameter>\n"
        "<parameter=z>\n[1]\n</parameter>\n</function>\n</tool_call>",
    }
    for name, call in calls.items():
        call = call.replace("'", '"')
        message_format = detect(None, tool_call_parser=name)
        params = constrain(message_format, [*TOOLS, loose])
        assert params is not None
        walk = Walk(lark(params), (), 0)
        assert walk.take(call), name
        assert walk.matcher.is_accepting(), name


@pytest.mark.parametrize(
    ("parameters", "takes_any"),
    [
        (None, False),
        ({"type": "object", "properties": {}}, False),
        ({"type": "object", "properties": {}, "required": [], "title": "Nothing"}, False),
        ({"type": "object"}, True),
        ({"type": "object", "properties": {}, "additionalProperties": True}, True),
        ({"type": "object", "properties": {}, "required": ["x"]}, True),
    ],
)
def test_a_tool_that_lists_no_parameters_takes_none(
    parameters: dict[str, Any] | None, takes_any: bool
) -> None:
    functions = [{"name": "f", "parameters": parameters}]
    params = constrain(detect(TEMPLATES["qwen2.5"]), functions, forced=True, parallel=False)
    assert params is not None
    walk = Walk(lark(params), (), 0)
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert (walk.take(call) and walk.matcher.is_accepting()) == takes_any


TEXTS: list[tuple[dict[str, Any], str, bool]] = [
    ({"type": "string"}, "a\n<b>\n", True),
    ({"type": "string"}, "a</function>", False),
    ({"type": "string", "maxLength": 2}, "ab", True),
    ({"type": "string", "maxLength": 2}, "abc", False),
    ({"type": "string", "minLength": 2}, "a", False),
    ({"enum": ["a", "b"]}, "b", True),
    ({"enum": ["a", "b"]}, "c", False),
    ({"type": "string", "const": "a\nb"}, "a\nb", True),
    ({"type": ["string", "null"], "maxLength": 5}, "null", True),
    ({"anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, "17", True),
    ({"anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, "x", True),
    ({"anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, "y", False),
    ({"$ref": "#/$defs/Color"}, "red", True),
    ({"$ref": "#/$defs/Color"}, "blue", False),
    ({"type": "array", "items": {"$ref": "#/$defs/Color"}}, '["red"]', True),
    ({"type": "array", "items": {"$ref": "#/$defs/Color"}}, '["blue"]', False),
]


@pytest.mark.parametrize(("schema", "text", "fits"), TEXTS)
def test_values_in_tags_have_their_form(schema: dict[str, Any], text: str, fits: bool) -> None:
    parameters = {"properties": {"a": schema}, "$defs": {"Color": {"enum": ["red"]}}}
    tools = [{"name": "f", "parameters": parameters}]
    message_format = detect(TEMPLATES["qwen3-coder"])
    params = constrain(message_format, tools, forced=True, parallel=False)
    assert params is not None
    begin = "<tool_call>\n<function=f>\n"
    end = "\n</function>\n</tool_call>"
    walk = Walk(lark(params), (), 0)
    call = f"{begin}<parameter=a>\n{text}\n</parameter>{end}"
    assert (walk.take(call) and walk.matcher.is_accepting()) == fits
    assert Walk(lark(params), (), 0).take(f"{begin}{end[1:]}")


def test_many_texts_of_some_length_are_no_conjunction() -> None:
    properties = {f"p{i}": {"type": "string", "maxLength": 100 + i} for i in range(20)}
    tools = [{"name": "f", "parameters": {"properties": properties}}]
    params = constrain(detect(TEMPLATES["qwen3-coder"]), tools, forced=True)
    assert params is not None
    assert not Walk(lark(params), (), 0).matcher.is_error()


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"type": "string", "pattern": "a"}, "'pattern'"),
        ({"type": "string", "maxLength": "2}/"}, "'maxLength'"),
        ({"type": "string", "minLength": -1}, "'minLength'"),
        ({"const": "a</parameter>"}, "cannot write 'a</parameter>'"),
        ({"enum": ["a", 1, "<parameter=b>"]}, "cannot write '<parameter=b>'"),
    ],
)
def test_forms_of_text_in_tags_that_are_refused(schema: dict[str, Any], match: str) -> None:
    tools = [{"name": "f", "parameters": {"properties": {"a": schema}}}]
    with pytest.raises(InvalidRequestError, match=match):
        constrain(detect(TEMPLATES["qwen3-coder"]), tools, forced=True)


def test_required_names_are_names() -> None:
    tools = [{"name": "f", "parameters": {"required": [["a"]]}}]
    with pytest.raises(InvalidRequestError, match="'required'"):
        constrain(detect(None, tool_call_parser="pythonic"), tools, forced=True)


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ([{"name": "a b"}], "'a b'"),
        ([{"name": "f", "parameters": {"anyOf": [{}]}}], "'anyOf'"),
        ([{"name": "f", "parameters": {"properties": {"a b": {}}}}], "'a b'"),
        ([{"name": "f", "parameters": {"properties": {"a": 3}}}], "f: a schema"),
        ([{"name": "f", "parameters": {"properties": 3}}], "'properties'"),
        ([{"name": "f", "parameters": {"type": "array"}}], "type 'object'"),
        ([{"name": "f", "parameters": [1]}], "type 'object'"),
    ],
)
def test_what_cannot_be_written_is_refused(tools: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        constrain(detect(None, tool_call_parser="pythonic"), tools, forced=True)
    assert caught.value.param == "tools"


def test_tools_that_are_too_large_are_refused() -> None:
    tools = [{**TOOLS[0], "name": f"f{i}"} for i in range(2000)]
    with pytest.raises(InvalidRequestError, match="make them smaller or fewer") as caught:
        constrain(detect(None), tools, forced=True)
    assert caught.value.param == "tools"
    assert constrain(detect(None), [{"name": "f"}] * 200) is None


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "mistral", "pythonic"])
def test_an_agent_s_hundred_tools_are_bound(parser: str) -> None:
    parameters = {
        "type": "object",
        "properties": {
            f"parameter_{i}": {"enum": [f"value_{k}" for k in range(5)], "description": "%json &"}
            for i in range(12)
        },
        "required": ["parameter_0"],
        "additionalProperties": False,
    }
    tools = [{"name": f"tool_{i}", "parameters": parameters} for i in range(100)]
    params = constrain(detect(None, tool_call_parser=parser), tools, forced=True)
    assert params is not None
    grammar = compiler().check(params, 4096)
    assert len(grammar) > MAX_GRAMMAR_SIZE


def test_a_chain_of_too_many_parameters_is_refused() -> None:
    parameters = {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}
    tools = [{"name": "f", "parameters": parameters}]
    with pytest.raises(InvalidRequestError, match="more than 400 parameters"):
        constrain(detect(None, tool_call_parser="pythonic"), tools, forced=True)


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(500):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequestError, match="f: the schema has more than") as caught:
        constrain(detect(None), [{"name": "f", "parameters": schema}], forced=True)
    assert caught.value.param == "tools"
