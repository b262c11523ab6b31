"""`/v1/responses` is another way to write what `/v1/chat/completions` asks."""

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.server.chat.request import ChatRequest, ToolChoice
from nanovllm.server.chat.run import Conversation
from tests.fake_llm import FakeLLM
from tests.server_client import CHAT, HI, build, post, refused

RESPONSES = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ChatRequest]:
    """What requests are translated to."""
    seen: list[ChatRequest] = []
    start = Conversation.start

    async def note(state: Any, request: ChatRequest, **options: Any) -> Conversation:
        seen.append(request)
        return await start(state, replace(request, tools=[], tool_choice=ToolChoice()), **options)

    monkeypatch.setattr(Conversation, "start", note)
    return seen


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(build(FakeLLM(max_model_len=2048)))


def text(kind: str, value: str) -> dict[str, Any]:
    return {"type": kind, "text": value}


def call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def chat_call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"input": "Hi"}, {"messages": HI}),
    "instructions": (
        {"input": "Hi", "instructions": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, *HI]},
    ),
    "parts": (
        {
            "input": [
                {"role": "user", "content": [text("input_text", "a"), text("input_text", "b")]}
            ]
        },
        {"messages": [{"role": "user", "content": [text("text", "a"), text("text", "b")]}]},
    ),
    "a conversation": (
        {
            "input": [
                {"type": "message", "role": "developer", "content": "Be brief."},
                {"role": "user", "content": "a"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [text("output_text", "b") | {"annotations": [], "logprobs": []}],
                },
                {"type": None, "role": "user", "content": "c"},
            ]
        },
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
    ),
    "calls and results": (
        {
            "input": [
                {"role": "user", "content": "Weather?"},
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [text("reasoning_text", "I look.")],
                },
                {"role": "assistant", "content": "Wait."},
                call("weather", '{"city": "Oslo"}', "call_1"),
                call("weather", "", "call_2"),
                {"type": "function_call_output", "call_id": "call_1", "output": "cold"},
                {
                    "type": "function_call_output",
                    "call_id": "call_2",
                    "output": [text("input_text", "warm")],
                },
                call("weather", "{}", "call_3"),
                {"type": "function_call_output", "call_id": "call_3", "output": "wet"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "reasoning_content": "I look.",
                    "content": "Wait.",
                    "tool_calls": [
                        chat_call("weather", '{"city": "Oslo"}', "call_1"),
                        chat_call("weather", "{}", "call_2"),
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
                {"role": "tool", "tool_call_id": "call_2", "content": "warm"},
                {"role": "assistant", "tool_calls": [chat_call("weather", "{}", "call_3")]},
                {"role": "tool", "tool_call_id": "call_3", "content": "wet"},
            ]
        },
    ),
    "thoughts as a summary, and those that cannot be read": (
        {
            "input": [
                {"role": "user", "content": "a"},
                {"type": "reasoning", "summary": [text("summary_text", "hm")]},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "user", "content": "d"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "reasoning_content": "hm", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": "d"},
            ]
        },
    ),
    "sampling": (
        {
            "input": "Hi",
            "max_output_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "seed": 3,
            "stop": ["x"],
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.1,
            "logit_bias": {"5": 1},
            "bad_words": ["y"],
            "min_tokens": 1,
            "ignore_eos": True,
            "top_logprobs": 2,
            "cache_salt": "salt",
            "priority": 4,
        },
        {
            "messages": HI,
            "max_completion_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "seed": 3,
            "stop": ["x"],
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.1,
            "logit_bias": {"5": 1},
            "bad_words": ["y"],
            "min_tokens": 1,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 2,
            "cache_salt": "salt",
            "priority": 4,
        },
    ),
    "thinking": (
        {"input": "Hi", "reasoning": {"effort": "low"}, "chat_template_kwargs": {"thinking": True}},
        {"messages": HI, "reasoning_effort": "low", "chat_template_kwargs": {"thinking": True}},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_round_trip(client: TestClient, asked: list[ChatRequest], name: str) -> None:
    responses, chat = SAME[name]
    named = {"request_id": "same", "model": "demo_model"}
    post(client, RESPONSES, **responses, **named)
    post(client, CHAT, **chat, **named)
    assert asked[0] == asked[1]


TOOLS = [
    {"type": "function", "name": "weather", "description": "Now.", "parameters": PARAMETERS},
    {"type": "function", "name": "time", "parameters": None, "strict": False},
]
CHAT_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Now.",
            "parameters": PARAMETERS,
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "time", "strict": False}},
]


@pytest.mark.parametrize(
    ("choice", "chat_choice"),
    [
        (None, None),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (
            {"type": "function", "name": "time"},
            {"type": "function", "function": {"name": "time"}},
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "time"}],
            },
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "time"}}],
                },
            },
        ),
    ],
)
@pytest.mark.parametrize("parallel", [None, False, True])
def test_tools(
    client: TestClient, asked: list[ChatRequest], choice: Any, chat_choice: Any, parallel: Any
) -> None:
    more = {"parallel_tool_calls": parallel, "request_id": "same"}
    post(client, RESPONSES, input="Hi", tools=TOOLS, tool_choice=choice, **more)
    post(client, CHAT, messages=HI, tools=CHAT_TOOLS, tool_choice=chat_choice, **more)
    assert asked[0].tool_choice == asked[1].tool_choice
    assert asked[0].tools == asked[1].tools


@pytest.mark.parametrize("arguments", ["[1]", "{", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 100_000])
@pytest.mark.parametrize("status", [None, "completed", "incomplete"])
def test_calls_that_are_not_whole_are_left_out(
    client: TestClient, asked: list[ChatRequest], arguments: str, status: str | None
) -> None:
    """Clients send back what models wrote, whatever it is."""
    broken = call("f", arguments, "c") | {"status": status}
    result = {"type": "function_call_output", "call_id": "c", "output": "What?"}
    post(client, RESPONSES, input=[*HI, broken, result, *HI])
    post(client, RESPONSES, input=[broken, result, call("f", "{}", "c"), result])
    assert asked[0].messages == [*HI, *HI]
    assert [message["role"] for message in asked[1].messages] == ["assistant", "tool"]
    error = refused(client, RESPONSES, input=[broken, result])
    assert error["message"].startswith("input: has only calls that are not whole")


def test_the_form_of_the_answer(client: TestClient, asked: list[ChatRequest]) -> None:
    forms = [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True},
    ]
    for form in forms:
        client.post(RESPONSES, json={"input": "Hi", "text": {"format": form}})
    assert [chat.params.structured_outputs for chat in asked] == [
        None,
        StructuredOutputsParams(json_object=True),
        StructuredOutputsParams(json=PARAMETERS),
    ]


def test_log_probabilities_by_name(client: TestClient, asked: list[ChatRequest]) -> None:
    for more in ({}, {"include": ["message.output_text.logprobs"]}, {"top_logprobs": 0}):
        post(client, RESPONSES, input="Hi", **more)
    assert [chat.params.logprobs for chat in asked] == [None, 0, None]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": 1}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input.0"),
        ({"input": [{"type": "web_search_call"}]}, "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "x"}],
                },
            },
            "tool_choice.tools",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": []}, "context_management"),
        ({"include": ["everything"]}, "include.0"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "some"}, "truncation"),
        ({"stop": [str(i) for i in range(20)]}, "stop"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
)
def test_refused_by_name(client: TestClient, body: dict[str, Any], param: str) -> None:
    error = refused(client, RESPONSES, **{"input": "Hi", **body})
    assert error["param"] == param
    assert param.rsplit(".", 1)[-1] in error["message"]


def test_harmless_fields(client: TestClient) -> None:
    post(
        client,
        RESPONSES,
        input=[{"role": "user", "content": "Hi", "phase": "final_answer"}],
        user="ann",
        metadata={"a": "b"},
        service_tier="auto",
        store=None,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": None, "summary": "auto"},
        text={"format": {"type": "text"}, "verbosity": "low"},
        stream_options={"include_obfuscation": False},
        safety_identifier="x",
        prompt_cache_key="y",
        tools=[],
        tool_choice="auto",
        max_tool_calls=3,
        background=False,
        conversation=None,
        truncation="auto",
        who_knows=1,
    )


def test_many_pieces_are_refused_at_once(client: TestClient) -> None:
    part = text("input_text", "a")
    for body in (
        [{"role": "user", "content": "a"}] * 9000,
        [{"role": "user", "content": [part] * 1000}] * 9,
        [{"role": "user", "content": [part] * 2000}],
    ):
        assert refused(client, RESPONSES, input=body)["param"].startswith("input")
