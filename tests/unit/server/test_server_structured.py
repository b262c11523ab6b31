"""The form of an answer, in all the words that clients have for it."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm.batch import LOST_GRAMMAR
from nanovllm.sampling_params import StructuredOutputsParams
from tests.fake_llm import FakeLLM
from tests.server_client import CHAT, HI, TEXT, build, post, refused

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
TAG = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}

FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"response_format": NAMED}, {"json": SCHEMA}),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"json": SCHEMA}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    ({"structured_outputs": {"json": '{"type": "null"}'}}, {"json": '{"type": "null"}'}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ["yes", "no"]}),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    ({"structured_outputs": {"json_object": True, "regex": None}}, {"json_object": True}),
    ({"structured_outputs": {"structural_tag": TAG}}, {"structural_tag": TAG}),
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"json_schema": '{"type": "null"}'}, {"json": '{"type": "null"}'}),
    ({"regex": "a+"}, {"regex": "a+"}),
    ({"ebnf": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
]


@pytest.mark.parametrize(("body", "form"), FORMS)
@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": HI}), (TEXT, {"prompt": "Once"})])
def test_each_name_for_a_form(
    client: TestClient,
    llm: FakeLLM,
    path: str,
    prompt: dict[str, Any],
    body: dict[str, Any],
    form: dict[str, Any],
) -> None:
    post(client, path, **prompt, **body)
    (params,) = llm.asked
    assert params.structured_outputs == StructuredOutputsParams(**form)


def test_a_structural_tag_as_a_response_format(client: TestClient, llm: FakeLLM) -> None:
    post(client, CHAT, messages=HI, response_format={"type": "structural_tag", **TAG})
    form = llm.asked[0].structured_outputs
    assert form is not None
    assert isinstance(form.structural_tag, dict)
    assert form.structural_tag["triggers"] == ["<a>"]


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"regex": None}])
def test_text_has_no_form(client: TestClient, llm: FakeLLM, body: dict[str, Any]) -> None:
    post(client, CHAT, messages=HI, **body)
    assert llm.asked[0].structured_outputs is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": NAMED, "guided_regex": "a"}, "guided_regex"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"guided_choice": [1]}, "guided_choice.0"),
        (
            {"structured_outputs": {"regex": "a", "disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
    ],
)
def test_refused_by_name(client: TestClient, body: dict[str, Any], param: str) -> None:
    for path, prompt in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "Once"})):
        error = refused(client, path, **prompt, **body)
        assert error["param"] == param
        assert param.rsplit(".", 1)[-1] in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "not",
        ),
        ({"guided_json": {"type": "object", "uniqueItems": True, "if": {}}}, "guided_json", "if"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"ebnf": "root ::= nothing"}, "ebnf", "nothing"),
    ],
)
def test_what_cannot_be_enforced(
    client: TestClient, body: dict[str, Any], param: str, says: str
) -> None:
    error = refused(client, CHAT, messages=HI, **body)
    assert error["param"] == param
    assert says in error["message"]


def test_a_form_with_several_completions_and_a_stream(llm: FakeLLM) -> None:
    client = TestClient(build(llm))
    body = post(client, TEXT, prompt=["Once", "The"], n=2, guided_choice=["a", "b"], logprobs=1)
    assert len(body["choices"]) == 4
    assert all(item.payload.grammar is not None for item, _, _ in llm.submitted)


def test_a_form_that_is_lost_on_the_way(client: TestClient, llm: FakeLLM) -> None:
    llm.fail_after, llm.failure = 1, LOST_GRAMMAR
    error = refused(client, CHAT, messages=HI, guided_choice=["a", "b"])
    assert error["message"] == LOST_GRAMMAR


def test_the_schema_has_all_the_names(llm: FakeLLM) -> None:
    schemas = build(llm).openapi()["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        names = {field for body, _ in FORMS for field in body}
        assert names <= set(schemas[name]["properties"])
    assert {"tools", "tool_choice", "parallel_tool_calls", "include_reasoning"} <= set(
        schemas["ChatCompletionRequest"]["properties"]
    )
    assert "schema" in schemas["NamedSchema"]["properties"]
