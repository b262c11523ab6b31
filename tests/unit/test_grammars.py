"""Forms of outputs: what becomes a grammar, and what is told to those that cannot be enforced."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher
from tokenizers.decoders import ByteFallback, Sequence
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import Split

from nanovllm.config import DEMO_MODEL, EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.text import grammar_compiler
from nanovllm.text.frontend import TextFrontend
from nanovllm.text.grammar_compiler import MAX_COMPILED, GrammarCompiler, Vocabulary
from nanovllm.text.grammars import MAX_GRAMMAR_SIZE, embedded, lark
from nanovllm.text.json_schemas import closed, json_rule
from nanovllm.text.tokenizer import Tokenizer

CONTEXT = 4096
TAG = {
    "structures": [{"begin": "<f=add>", "schema": {"type": "integer"}, "end": "</f>"}],
    "triggers": ["<f="],
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


@pytest.fixture(scope="module")
def frontend() -> TextFrontend:
    return TextFrontend(DEMO_MODEL, EngineConfig())


@pytest.fixture(scope="module")
def compiler(frontend: TextFrontend) -> GrammarCompiler:
    return frontend.grammars


def accepts(compiler: GrammarCompiler, frontend: TextFrontend, grammar: str, text: str) -> bool:
    """Whether a text is a whole output of a grammar."""
    matcher = compiler.compile(grammar).deep_copy()
    token_ids = frontend.encode(text, False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ({"json": PERSON}, '{"name": "A", "age": 3}', '{"name": "A","age": 3}'),
        ({"json": PERSON}, '{"name": "A"}', '{"name": "A", "more": 1}'),
        ({"json": json.dumps(PERSON)}, '{"name": "A"}', '{"age": 3}'),
        ({"json": "true"}, "[1, null]", "[1,null]"),
        ({"json": {"type": "string", "maxLength": 2}}, '"ab"', '"abc"'),
        ({"json_object": True}, '{"any": [1]}', "[1]"),
        ({"regex": r"^\d{3}/x\n$"}, "123/x\n", "12/x\n"),
        ({"regex": ""}, "", "a"),
        ({"choice": ["yes", 'n"o\n', "\U0001f600"]}, 'n"o\n', "n"),
        ({"choice": ["yes", "\U0001f600"]}, "\U0001f600", "ye"),
        ({"grammar": "?start: a\na: /[0-9]+/ // digits"}, "12", "x"),
        ({"grammar": 'root ::= "a" b\nb ::= [0-9]{2} # two'}, "a12", "a1"),
        ({"grammar": 'start: "::="'}, "::=", "="),
        ({"structural_tag": TAG}, "so <f=add>12</f> it is", "so <f=sub>12</f>"),
        ({"structural_tag": json.dumps(TAG)}, "no tag", "<f=add>x</f>"),
    ],
)
def test_a_form_allows_what_it_should(
    compiler: GrammarCompiler, frontend: TextFrontend, form: dict[str, Any], right: str, wrong: str
) -> None:
    params = StructuredOutputsParams(**form)
    grammar = compiler.check(params, CONTEXT)
    assert accepts(compiler, frontend, grammar, right)
    assert not accepts(compiler, frontend, grammar, wrong)
    # As a rule of another grammar it is the same.
    name, text = embedded(params, "inner")
    larger = f'start: "<<" {name} ">>"\n{text}'
    if params.structural_tag is None:  # free text has no end in the middle of another
        assert accepts(compiler, frontend, larger, f"<<{right}>>")
        assert not accepts(compiler, frontend, larger, f"<<{wrong}>>")


def test_a_trigger_may_be_a_special_token(
    compiler: GrammarCompiler, frontend: TextFrontend
) -> None:
    tag = {
        "structures": [{"begin": "<|im_start|>add ", "schema": {"type": "integer"}, "end": ";"}],
        "triggers": ["<|im_start|>"],
    }
    grammar = compiler.check(StructuredOutputsParams(structural_tag=tag), CONTEXT)
    assert accepts(compiler, frontend, grammar, "so <|im_start|>add 12; it is")
    assert not accepts(compiler, frontend, grammar, "so <|im_start|>sub 12;")


@pytest.mark.parametrize(
    ("form", "chosen", "certain"),
    [
        ({"json": {"const": "<|im_end|>"}}, "", '"<|im_end|>"'),
        (
            {"json": PERSON | {"properties": {"<|im_end|>": {}}, "required": ["<|im_end|>"]}},
            "",
            '{"<|im_end|>":',
        ),
        ({"regex": r"(a|b)<\|im_end\|>"}, "a", "<|im_end|>"),
        ({"choice": ["x<|im_start|>y"]}, "", "x<|im_start|>y"),
        ({"grammar": 'start: "<|im_end|>" /<\\|im_end\\|>/ # <|im_end|>'}, "", "<|im_end|>" * 2),
    ],
)
def test_a_text_is_never_a_special_token(
    compiler: GrammarCompiler,
    frontend: TextFrontend,
    form: dict[str, Any],
    chosen: str,
    certain: str,
) -> None:
    matcher = compiler.compile(compiler.check(StructuredOutputsParams(**form), CONTEXT)).deep_copy()
    assert matcher.consume_tokens(frontend.encode(chosen, False))
    forced = matcher.compute_ff_tokens()
    assert matcher.consume_tokens(forced)
    assert frontend.decode(forced, skip_special_tokens=True) == certain


def test_a_grammar_may_name_a_special_token(
    compiler: GrammarCompiler, frontend: TextFrontend
) -> None:
    form = StructuredOutputsParams(grammar='start: "a" <|im_start|> "b"')
    matcher = compiler.compile(compiler.check(form, CONTEXT)).deep_copy()
    assert matcher.compute_ff_tokens() == frontend.encode("a<|im_start|>b", False)


PIECES = ["<unk>", "<", "/", "s", ">", "s>", "</", "</s>"]


@pytest.mark.parametrize(
    "model",
    [
        BPE(
            {piece: index for index, piece in enumerate(PIECES)},
            [("s", ">"), ("<", "/"), ("</", "s>")],
            unk_token="<unk>",
        ),
        Unigram([(piece, -float(bool(piece))) for piece in PIECES], unk_id=0),
        WordLevel({piece: index for index, piece in enumerate(PIECES)}, unk_token="<unk>"),
    ],
)
def test_special_tokens_keep_their_ids_wherever_they_are(model: Any) -> None:
    backend = tokenizers.Tokenizer(model)
    backend.decoder = Sequence([ByteFallback()])
    backend.pre_tokenizer = Split("", "isolated") if isinstance(model, WordLevel) else None
    backend.add_special_tokens(["<unk>", "</s>", "<new>"])
    vocabulary = Vocabulary.of(Tokenizer(backend), backend.get_vocab_size(), (7,))
    assert vocabulary.special_tokens == {"<unk>": 0, "</s>": 7, "<new>": 8}
    compiler = GrammarCompiler(lambda: vocabulary)
    grammar = compiler.check(StructuredOutputsParams(grammar='start: "</s>" <new>'), CONTEXT)
    forced = compiler.compile(grammar).deep_copy().compute_ff_tokens()
    assert forced[-1] == 8
    assert "".join(PIECES[index] for index in forced[:-1]) == "</s>"
    assert not {0, 7} & set(forced)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


RECURSIVE: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#"}},
    "required": ["a"],
}
ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "keyword": ({"json": {"type": "array", "uniqueItems": True}}, 'keys: ["uniqueItems"]'),
    "keywords": ({"json": {"if": {}, "then": {}}}, 'keys: ["if", "then"]'),
    "inner keyword": (
        {"json": {"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}},
        'keys: ["not"]',
    ),
    "names of properties": (
        {"json": {"type": "object", "propertyNames": {"maxLength": 3}}},
        'keys: ["propertyNames"]',
    ),
    "two drafts": (
        {"json": {"type": "array", "prefixItems": [{}], "additionalItems": False}},
        "draft 2020-12",
    ),
    "overlapping alternatives": (
        {"json": {"oneOf": [{"type": "object", "properties": {"a": {}}}] * 2}},
        "oneOf",
    ),
    "lenient": (
        {"json": {"uniqueItems": True, "x-guidance": {"lenient": True}}},
        'keys: ["uniqueItems"]',
    ),
    "reference to itself": ({"json": {"$ref": "#"}}, "no text that it allows"),
    "endless object": ({"json": RECURSIVE}, "Too many items"),
    "missing reference": ({"json": {"$ref": "#/$defs/no"}}, "does not exist"),
    "remote reference": ({"json": {"$ref": "http://localhost/s"}}, "does not fetch"),
    "file reference": ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
    "remote reference in a grammar": (
        {"grammar": 'start: %json {"$ref": "http://localhost/s"}'},
        "does not fetch",
    ),
    "no type": ({"json": {"type": "foo"}}, "Invalid type: foo"),
    "no format": ({"json": {"type": "string", "format": "foo"}}, "Unknown format: foo"),
    "nothing": ({"json": {"enum": []}}, "Unsatisfiable"),
    "empty range": ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
    "false": ({"json": "false"}, "a schema is a JSON object"),
    "list": ({"json": "[1]"}, "a schema is a JSON object"),
    "not JSON": ({"json": "{'a': 1}"}, "not well-formed"),
    "NaN": ({"json": {"const": float("nan")}}, "not well-formed"),
    "NaN text": ({"json": '{"const": NaN}'}, "not well-formed"),
    "huge number": ({"json": {"const": 10**400}}, "const: 1000"),
    "huge number in a grammar": ({"grammar": 'start: %json {"const": 1e400}'}, "out of range"),
    "lone surrogate": ({"json": {"const": "\ud800"}}, "cannot be enforced"),
    "not serialisable": ({"json": {"const": {1, 2}}}, "not well-formed"),
    "deep": ({"json": nested(200)}, "more than 120 levels"),
    "deep text": ({"json": '{"items":' * 5000}, "not well-formed"),
    "long": ({"json": {"enum": ["x" * 70_000]}}, f"more than the {MAX_GRAMMAR_SIZE}"),
    "long constant": ({"json": {"const": "x" * 60_000}}, "would never end"),
    "multiple": ({"json": {"type": "integer", "multipleOf": 1_000_003}}, "multipleOf"),
    "multiples": (
        {"json": {"allOf": [{"type": "integer", "multipleOf": 7919}, {"multipleOf": 7907}]}},
        "multipleOf",
    ),
    "multiple in a grammar": (
        {"grammar": 'start: %json {"type": "integer", "multipleOf": 100000007}'},
        "multipleOf",
    ),
    "hidden multiple": ({"grammar": 'start: %json /**/ {"multipleOf": 100000007}'}, "grammar"),
    "long regex": ({"regex": "a" * 70_000}, f"more than the {MAX_GRAMMAR_SIZE}"),
    "long literal": ({"regex": "a" * 60_000}, "would never end"),
    "endless repetition": ({"regex": "a{1000000000}"}, "cannot be enforced"),
    "costly repetition": ({"regex": "a?" * 3000 + "a" * 3000}, "cannot be enforced"),
    "look-ahead": ({"regex": "a(?=b)"}, "look-ahead"),
    "back reference": ({"regex": r"(a)\1"}, "backreferences"),
    "open regex": ({"regex": "(a"}, "unclosed"),
    "deep regex": ({"regex": "(" * 30_000 + ")" * 30_000}, "cannot be enforced"),
    "no match": ({"regex": r"[^\s\S]"}, "no text that it allows"),
    "NUL in a grammar": ({"grammar": 'start: "\x00"'}, "cannot be enforced"),
    "surrogate in a choice": ({"choice": ["\ud800"]}, "cannot be enforced"),
    "no grammar": ({"grammar": "hello"}, "cannot be enforced"),
    "no root": ({"grammar": 'a ::= "b"'}, "root"),
    "endless grammar": ({"grammar": "start: start"}, "no text that it allows"),
    "endless forced grammar": ({"grammar": 'start: "x" start'}, "Too many items"),
    "deep grammar": ({"grammar": f'start: {"(" * 9000}"a"{")" * 9000}'}, "too deeply nested"),
    "deep GBNF": ({"grammar": f'root ::= {"(" * 9000}"a"{")" * 9000}'}, "nested too deeply"),
    "tag": ({"structural_tag": {"begin": "<f>"}}, "missing required field"),
    "tag without trigger": ({"structural_tag": TAG | {"triggers": ["<g"]}}, "none of the triggers"),
    "tag with a schema of 5": (
        {"structural_tag": TAG | {"structures": [{"begin": "<f=", "schema": 5}]}},
        "structures[0].schema",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_cannot_be_enforced_is_refused_at_once(compiler: GrammarCompiler, name: str) -> None:
    form, told = ATTACKS[name]
    params = StructuredOutputsParams(**form)
    started = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        compiler.check(params, CONTEXT)
    assert time.monotonic() - started < 5
    assert told in str(caught.value)
    assert caught.value.param == params.kind
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a+)+$"},
        {"regex": "(a|aa)+b(.*a){20}"},
        {"regex": "[ab]*a[ab]{1000}"},
        {"regex": "|".join(f"w{i}" for i in range(9000))},
        {"json": {"enum": [f"value{i}" for i in range(4000)]}},
        {"json": {"type": "object", "patternProperties": {"^a": {"type": "integer"}}}},
        {"json": {"type": "string", "minLength": 10**9}},
        {"json": {"type": "array", "minItems": 10**9}},
        {"json": nested(50)},
        {"choice": [f"c{i}" for i in range(5000)]},
        {"grammar": "start: " + " ".join(["/a*/"] * 3000)},
    ],
)
def test_what_looks_dangerous_and_is_not_compiles_fast(
    compiler: GrammarCompiler, form: dict[str, Any]
) -> None:
    started = time.monotonic()
    compiler.check(StructuredOutputsParams(**form), CONTEXT)
    assert time.monotonic() - started < 5


def test_objects_are_closed_where_nothing_is_said_and_nothing_combined() -> None:
    silent = {"type": "object", "properties": {"a": {}}}
    shut = silent | {"additionalProperties": False}
    assert closed(silent) == shut
    assert closed({"items": silent, "default": silent}) == {"items": shut, "default": silent}
    assert closed({"$defs": {"x": silent}, "$ref": "#/$defs/x"})["$defs"] == {"x": shut}
    assert closed({"anyOf": [silent, {"type": "null"}]})["anyOf"][0] == shut
    for left_alone in (
        silent | {"additionalProperties": True},
        silent | {"patternProperties": {}},
        silent | {"required": ["b"]},
        silent | {"anyOf": [{"required": ["a"]}]},
        {"allOf": [silent, silent]},
        {"$defs": {"x": silent}, "$ref": "#/$defs/x", "properties": {"b": {}}},
        {"const": silent},
        {"type": "object"},
    ):
        assert closed(left_alone) == left_alone


A_OR_B = [
    {"type": "object", "properties": {"a": {}}, "required": ["a"]},
    {"type": "object", "properties": {"b": {}}, "required": ["b"]},
]
TAGGED = [
    {"type": "object", "properties": {"t": {"const": tag}, "x": {}}, "required": ["t"]}
    for tag in ("a", "b")
]


def test_objects_are_not_closed_where_only_that_would_tell_them_apart() -> None:
    for told_apart in (A_OR_B, TAGGED, [*TAGGED[:1], {"type": "null"}], [{"const": 1}, {}]):
        branches = closed({"oneOf": told_apart})["oneOf"]
        assert branches[0].get("additionalProperties") is (
            None if told_apart[0] == {"const": 1} else False
        )
    optional = {"type": "object", "properties": {"a": {}}}
    for overlapping in ([optional, A_OR_B[1]], [TAGGED[0], TAGGED[0]], [{}, optional]):
        assert closed({"oneOf": overlapping}) == {"oneOf": overlapping}


EMAIL = (
    "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]"
    "@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$"
)
RECORD = {"additionalProperties": {"type": "integer"}, "$defs": {"Color": {"enum": ["r", "g"]}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string", "format": "email", "pattern": EMAIL}, '"a.b@c.de"', '"a..b@c.de"'),
        ({"type": "string", "format": "cuid", "pattern": "^c[a-z]+$"}, '"cab"', '"dab"'),
        ({"type": "string", "format": "password"}, '"x y"', "1"),
        ({"format": "uuid4"}, f'"{"0" * 8}-0000-4000-8000-{"0" * 12}"', f'"{"0" * 36}"'),
        ({"format": "date-time"}, '"2026-01-01T00:00:59Z"', '"2026-01-01t00:00:59z"'),
        ({"format": "date-time"}, '"2026-01-01T00:00:59.5+01:00"', '"2026-01-01T00:00:60Z"'),
        ({"format": "date"}, '"0001-01-01"', '"0000-01-01"'),
        ({"format": "time"}, '"00:00:59Z"', '"00:00:60Z"'),
        ({"type": "array", "uniqueItems": False}, "[1, 1]", "1"),
        (RECORD | {"propertyNames": {"type": "string"}}, '{"any": 1}', '{"any": "1"}'),
        (RECORD | {"propertyNames": {"pattern": "^a+$"}}, '{"aa": 1}', '{"b": 1}'),
        (RECORD | {"propertyNames": {"$ref": "#/$defs/Color"}}, '{"r": 1}', '{"b": 1}'),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 9}, "1", "0"),
        ({"type": "integer", "maximum": 3, "exclusiveMaximum": False, "minimum": 0}, "3", "4"),
    ],
)
def test_what_pydantic_and_zod_write_is_understood(
    compiler: GrammarCompiler,
    frontend: TextFrontend,
    schema: dict[str, Any],
    right: str,
    wrong: str,
) -> None:
    schema = {"type": "object" if right[0] == "{" else "string", **schema}
    grammar = compiler.check(StructuredOutputsParams(json=schema), CONTEXT)
    assert accepts(compiler, frontend, grammar, right)
    assert not accepts(compiler, frontend, grammar, wrong)


def test_a_form_is_compiled_once_and_few_are_kept(
    frontend: TextFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counting(tokens: object, grammar: str, **options: Any) -> LLMatcher:
        made.append(grammar)
        return LLMatcher(tokens, grammar, **options)  # type: ignore[arg-type]

    counting.grammar_from_lark = LLMatcher.grammar_from_lark  # type: ignore[attr-defined]
    monkeypatch.setattr("llguidance.LLMatcher", counting)
    compiler = GrammarCompiler(frontend.vocabulary)
    params = StructuredOutputsParams(json=PERSON)
    for _ in range(3):
        compiler.compile(compiler.check(params, CONTEXT))
    assert len(made) == 1
    for index in range(2 * MAX_COMPILED):
        compiler.check(StructuredOutputsParams(choice=[str(index)]), CONTEXT)
    assert len(compiler._compiled) == MAX_COMPILED
    monkeypatch.setattr(grammar_compiler, "MAX_COMPILED_CHARS", 100)
    compiler.check(StructuredOutputsParams(choice=["last"]), CONTEXT)
    assert sum(map(len, compiler._compiled)) <= 100
    monkeypatch.setattr(grammar_compiler, "MAX_CHECKED_CHARS", 2000)
    for index in range(100):
        compiler.check(StructuredOutputsParams(choice=[f"x{index}"]), CONTEXT)
    assert sum(map(len, compiler._checked)) == compiler._num_checked_chars <= 2000


def test_the_vocabulary_is_made_once_whoever_asks(frontend: TextFrontend) -> None:
    calls: list[int] = []

    def make() -> Any:
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return frontend.vocabulary()

    compiler = GrammarCompiler(make)
    with ThreadPoolExecutor(4) as pool:
        vocabularies = list(pool.map(lambda _: compiler.vocabulary, range(4)))
    assert len(calls) == 1
    assert all(vocabulary is vocabularies[0] for vocabulary in vocabularies)


def test_tokens_that_the_model_has_not_are_not_used(frontend: TextFrontend) -> None:
    assert frontend.tokenizer is not None
    backend = tokenizers.Tokenizer.from_str(frontend.tokenizer.backend.to_str())
    size = frontend.tokenizer.end_id
    backend.add_tokens(["zz"])
    backend.add_special_tokens(["<new>"])
    larger = Tokenizer(backend, frontend.tokenizer.special_tokens)
    vocabulary = Vocabulary.of(larger, size, (0,))
    assert vocabulary.tokens.vocab_size == vocabulary.vocab_size == size
    assert "<new>" not in vocabulary.special_tokens
    matcher = GrammarCompiler(lambda: vocabulary).compile('start: "zz"').deep_copy()
    assert max(matcher.compute_ff_tokens()) < size


def test_the_text_of_a_form_is_lark() -> None:
    assert lark(StructuredOutputsParams(regex="a/b")) == "start: FORM\nFORM: /a\\/b/\n"
    assert lark(StructuredOutputsParams(choice=["a", ""])) == 'start: FORM\nFORM: "a" | ""\n'


@pytest.mark.parametrize("bound", [-(2**63), 2**63 - 1, 1e19, -1e300])
@pytest.mark.parametrize("name", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
def test_bounds_beyond_what_is_kept(name: str, bound: float) -> None:
    """A process that compiled integers around -2^63 was ended by it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", name: bound}}}
    with pytest.raises(InvalidRequestError, match=f"{name} must be from -1e18 to 1e18"):
        lark(StructuredOutputsParams(json=schema))


@pytest.mark.parametrize("number", [2**53 + 1, -(2**63), 2**63, 260994205084.86926, 5e-324])
@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: ["a", {"b": n}]])
def test_listed_numbers_that_would_become_others(
    number: float, wrap: Callable[[float], Any]
) -> None:
    """An id of 18 digits became the next float, and -2^63 ended the process."""
    for node in ({"const": wrap(number)}, {"enum": [1, wrap(number)]}):
        (keyword,) = node
        for form in (
            {"json": {"type": "object", "properties": {"a": node}}},
            {"json": {"$ref": "#/x/a", "x": {"a": node}}},
            {"grammar": f"start: %json {json.dumps(node)}"},
        ):
            with pytest.raises(InvalidRequestError, match=f"{keyword}: {number} has too many"):
                lark(StructuredOutputsParams(**form))


@pytest.mark.parametrize(
    "number", [2**53, -(2**62) - 2**10, 2**63 - 1024, 10**18, 1e22, 0.1, 19.99, -1e-7, 0.1 + 0.2]
)
def test_listed_numbers_that_are_kept(frontend: TextFrontend, number: float) -> None:
    params = StructuredOutputsParams(json={"enum": [number]})
    matcher = frontend.grammars.compile(frontend.grammars.check(params, CONTEXT)).deep_copy()
    assert json.loads(frontend.decode(matcher.compute_ff_tokens(), False)) == number


def test_rules_have_a_number() -> None:
    """Of 2500 terminals, each within the one before, a process died."""
    rules = "".join(f'T{i}: (T{i + 1}|"b")* "a"\n' for i in range(2500))
    with pytest.raises(InvalidRequestError, match="more than 1000 rules"):
        lark(StructuredOutputsParams(grammar=f"start: T0\n{rules}"))


@pytest.mark.parametrize("piece", ["\n", "\n ", "\r\n", " ", "a\n", "a ", "start", "%json "])
@pytest.mark.parametrize("begin", ["", 'root ::= "a"\n', "start: X\n"])
def test_a_grammar_is_read_in_one_go(begin: str, piece: str) -> None:
    """Half a minute of a pattern that looks again at what it has seen stops the whole server."""
    text = begin + piece * ((MAX_GRAMMAR_SIZE - len(begin)) // len(piece))
    started = time.process_time()
    with contextlib.suppress(InvalidRequestError):
        lark(StructuredOutputsParams(grammar=text))
    assert time.process_time() - started < 1


def test_blank_lines_between_rules_of_gbnf(
    compiler: GrammarCompiler, frontend: TextFrontend
) -> None:
    grammar = lark(StructuredOutputsParams(grammar='\n\nroot ::= "a" b |\n \n "c"\n\nb ::= "b"\n'))
    assert accepts(compiler, frontend, grammar, "ab")
    assert accepts(compiler, frontend, grammar, "c")
    assert not accepts(compiler, frontend, grammar, "a")


@pytest.mark.parametrize(
    ("bounds", "minimum", "maximum"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, 0.001, 0.5),
        ({"exclusiveMinimum": 0, "minimum": 0.25, "maximum": 0.5}, 0.25, 0.5),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, -0.5, -0.001),
        ({"exclusiveMinimum": 5, "exclusiveMaximum": 5.02}, 5.0001, None),
        ({"exclusiveMinimum": 5, "exclusiveMaximum": 6}, None, None),
        ({"exclusiveMinimum": 0}, None, None),
    ],
)
def test_whole_numbers_that_are_excluded(
    bounds: dict[str, float], minimum: float | None, maximum: float | None
) -> None:
    rule = json_rule({"type": "number"} | bounds)
    schema = json.loads(rule.removeprefix("%json "))
    assert (schema.get("minimum"), schema.get("maximum")) == (minimum, maximum)


ABOVE_3 = {"type": "number", "exclusiveMinimum": 3}
BELOW_3 = {"type": "number", "exclusiveMaximum": 3}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"allOf": [ABOVE_3 | {"maximum": 10}, {"maximum": 3.5}]}, "3.25", "3"),
        ({"allOf": [BELOW_3, {"minimum": 2.5, "maximum": 3}]}, "2.75", "3"),
        ({"$defs": {"p": ABOVE_3}, "$ref": "#/$defs/p", "maximum": 3.5}, "3.25", "3"),
        ({"anyOf": [ABOVE_3, {"type": "null"}], "maximum": 3.5}, "3.25", "3"),
        (
            {"allOf": [{"items": ABOVE_3}, {"items": {"maximum": 3.5}}], "type": "array"},
            "[3.25]",
            "[3]",
        ),
        (
            {
                "type": "object",
                "properties": {"a": ABOVE_3},
                "patternProperties": {"^a": {"type": "number", "maximum": 3.5}},
            },
            '{"a": 3.25}',
            '{"a": 3}',
        ),
    ],
)
def test_whole_numbers_that_are_excluded_where_schemas_are_combined(
    compiler: GrammarCompiler,
    frontend: TextFrontend,
    schema: dict[str, Any],
    right: str,
    wrong: str,
) -> None:
    grammar = compiler.check(StructuredOutputsParams(json=schema), CONTEXT)
    assert accepts(compiler, frontend, grammar, right)
    assert not accepts(compiler, frontend, grammar, wrong)


def test_bounds_stay_as_they_are_where_none_is_combined() -> None:
    schema = {"type": "object", "properties": {"a": {"anyOf": [ABOVE_3, {"type": "null"}]}}}
    assert json.dumps(ABOVE_3) in json_rule(schema)
