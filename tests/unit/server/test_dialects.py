"""The same conversation in the words of each API is the same request."""

from dataclasses import replace
from typing import Any

import pytest

from nanovllm.config import ServerConfig, SpeechConfig
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.server.anthropic.requests import MessagesRequest
from nanovllm.server.anthropic.translate import chat_request as of_messages
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.metrics import Metrics
from nanovllm.server.ollama import requests as ollama
from nanovllm.server.ollama.translate import conversation_of
from nanovllm.server.openai.conversation import chat_request as of_chat
from nanovllm.server.openai.requests import ChatCompletionRequest
from nanovllm.server.openai.sampling import sampling_params
from nanovllm.server.state import ServerState
from tests.fake_llm import FakeLLM

MODEL = "demo_model"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ARGUMENTS = {"city": "Łódź", "days": [1, 2]}

OPENAI_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Look out.", "parameters": SCHEMA},
}
ANTHROPIC_TOOL = {"name": "weather", "description": "Look out.", "input_schema": SCHEMA}
OPENAI_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it wet in Łódź?"},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "A window would do.",
        "tool_calls": [
            {
                "id": "call00000",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Łódź", "days": [1, 2]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call00000", "content": "rain"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And tomorrow?"},
]
ANTHROPIC_MESSAGES = [
    {"role": "user", "content": "Is it wet in Łódź?"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "A window would do.", "signature": "x"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call00000", "name": "weather", "input": ARGUMENTS},
        ],
    },
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "call00000",
                "content": [{"type": "text", "text": "rain"}],
            }
        ],
    },
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]},
]
OLLAMA_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it wet in Łódź?"},
    {
        "role": "assistant",
        "content": "I look.",
        "thinking": "A window would do.",
        "tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And tomorrow?"},
]


@pytest.fixture
def state() -> ServerState:
    llm: Any = FakeLLM()
    return ServerState(ServerConfig(), SpeechConfig(), Metrics(), llm, None, loaded=True)


def chat(state: ServerState, **body: Any) -> ChatRequest:
    request = ChatCompletionRequest.model_validate({"model": MODEL, **body})
    return of_chat(request, state, sampling_params(request, state), "id")


def messages(state: ServerState, **body: Any) -> ChatRequest:
    """As Anthropic's clients say it; apart from an answer that need not fit, which they expect."""
    request = MessagesRequest.model_validate({"model": MODEL, "max_tokens": 64, **body})
    return replace(of_messages(request, state, "id"), may_clip=False)


def ollama_chat(state: ServerState, **body: Any) -> ChatRequest:
    request = ollama.ChatRequest.model_validate({"model": MODEL, **body})
    return replace(conversation_of(request, state, "id"), may_clip=False)


def ollama_generate(state: ServerState, **body: Any) -> ChatRequest:
    request = ollama.GenerateRequest.model_validate({"model": MODEL, **body})
    return replace(conversation_of(request, state, "id"), may_clip=False)


def test_a_conversation_with_calls_and_thoughts(state: ServerState) -> None:
    expected = chat(state, messages=OPENAI_MESSAGES, tools=[OPENAI_TOOL], max_tokens=64)
    assert expected.messages[2]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    assert expected == messages(
        state, system="Be brief.", messages=ANTHROPIC_MESSAGES, tools=[ANTHROPIC_TOOL]
    )
    assert expected == ollama_chat(
        state,
        messages=OLLAMA_MESSAGES,
        tools=[OPENAI_TOOL],
        options={"num_predict": 64},
    )


def test_a_prompt_is_a_conversation(state: ServerState) -> None:
    expected = chat(state, messages=OPENAI_MESSAGES[:2])
    assert expected == ollama_generate(state, system="Be brief.", prompt="Is it wet in Łódź?")


def test_sampling(state: ServerState) -> None:
    said = OPENAI_MESSAGES[1:2]
    shared = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    expected = chat(state, messages=said, max_tokens=64, stop=["\n\n"], **shared)
    assert expected.params.top_k == 7
    assert expected == messages(state, messages=said, stop_sequences=["\n\n"], **shared)
    assert expected == ollama_chat(
        state, messages=said, options={**shared, "num_predict": 64, "stop": ["\n\n"]}
    )
    more = {"min_p": 0.1, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert chat(state, messages=said, repetition_penalty=1.1, **more) == ollama_chat(
        state, messages=said, options={**more, "repeat_penalty": 1.1}
    )


@pytest.mark.parametrize(
    ("openai", "anthropic"),
    [
        ("auto", {"type": "auto"}),
        ("required", {"type": "any"}),
        ("none", {"type": "none"}),
        (
            {"type": "function", "function": {"name": "weather"}},
            {"type": "tool", "name": "weather"},
        ),
    ],
)
@pytest.mark.parametrize("parallel", [False, True])
def test_tool_choice(state: ServerState, openai: Any, anthropic: Any, parallel: bool) -> None:
    said = OPENAI_MESSAGES[1:2]
    expected = chat(
        state,
        messages=said,
        max_tokens=64,
        tools=[OPENAI_TOOL],
        tool_choice=openai,
        parallel_tool_calls=parallel,
    )
    choice = {**anthropic, "disable_parallel_tool_use": not parallel}
    assert expected == messages(state, messages=said, tools=[ANTHROPIC_TOOL], tool_choice=choice)


def test_strict_tools(state: ServerState) -> None:
    said = OPENAI_MESSAGES[1:2]
    function = {**OPENAI_TOOL["function"], "strict": True}  # type: ignore[dict-item]
    tools = [{"type": "function", "function": function}]
    assert chat(state, messages=said, max_tokens=64, tools=tools) == messages(
        state, messages=said, tools=[{**ANTHROPIC_TOOL, "strict": True}]
    )


def test_the_form_of_the_answer(state: ServerState) -> None:
    said = OPENAI_MESSAGES[1:2]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    expected = chat(state, messages=said, max_tokens=64, response_format=form)
    assert expected.params.structured_outputs == StructuredOutputsParams(json=SCHEMA)
    wanted = {"type": "json_schema", "schema": SCHEMA}
    assert expected == messages(state, messages=said, output_config={"format": wanted})
    assert expected == messages(state, messages=said, output_format=wanted)
    length = {"num_predict": 64}
    assert expected == ollama_chat(state, messages=said, format=SCHEMA, options=length)
    assert chat(state, messages=said, response_format={"type": "json_object"}) == ollama_chat(
        state, messages=said, format="json"
    )
    assert chat(state, messages=said) == ollama_chat(state, messages=said, format="")


@pytest.mark.parametrize("thinks", [False, True])
def test_thinking(state: ServerState, thinks: bool) -> None:
    said = OPENAI_MESSAGES[1:2]
    kwargs = {"enable_thinking": thinks}
    expected = chat(state, messages=said, max_tokens=64, chat_template_kwargs=kwargs)
    kind: dict[str, Any] = {"type": "enabled" if thinks else "disabled"}
    assert expected == messages(state, messages=said, thinking=kind)
    assert expected == messages(state, messages=said, chat_template_kwargs=kwargs)
    length = {"num_predict": 64}
    assert expected == ollama_chat(state, messages=said, think=thinks, options=length)


def test_effort(state: ServerState) -> None:
    said = OPENAI_MESSAGES[1:2]
    expected = chat(state, messages=said, max_tokens=64, reasoning_effort="low")
    assert expected == messages(state, messages=said, output_config={"effort": "low"})
    asked = ollama_chat(state, messages=said, think="low", options={"num_predict": 64})
    assert asked == replace(expected, template_kwargs={"enable_thinking": True})


def test_a_message_to_go_on_with(state: ServerState) -> None:
    said = [*OPENAI_MESSAGES[1:2], {"role": "assistant", "content": "It is"}]
    expected = chat(state, messages=said, max_tokens=64, continue_final_message=True)
    assert not expected.add_generation_prompt
    assert expected == messages(state, messages=said)
    assert expected == ollama_chat(state, messages=said, options={"num_predict": 64})
