"""The official `openai` package on a live server: answers and calls that have a form.

The bundled model tells tales and has never seen a tool: what is right here is right by the grammar.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest

from tests.serving import Server, serve

pytest.importorskip("openai")

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import (
    ChatCompletionAllowedToolChoiceParam,
    ChatCompletionMessageParam,
    ParsedChatCompletion,
)
from openai.types.shared_params import ResponseFormatJSONSchema
from pydantic import BaseModel, ConfigDict, Field

pytestmark = pytest.mark.accept

MODEL = "tale"
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me of an animal."}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": 400}


class Kind(str, Enum):
    """What there is."""

    CAT = "cat"
    DOG = "dog"


class Place(BaseModel):
    """Where it lives."""

    model_config = ConfigDict(extra="forbid")

    city: str = Field(max_length=12)
    far: bool


class Animal(BaseModel):
    """What is told of."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    legs: int = Field(ge=0, le=8)
    names: list[str] = Field(max_length=3)
    home: Place | None


class Weather(BaseModel):
    """The weather in a city."""

    city: Kind
    days: int = Field(ge=1, le=9)


class Clock(BaseModel):
    """The time."""

    zone: Kind


class Roll(BaseModel):
    """Roll a die."""


# Strings of a model that tells tales go on and on.
NAMED = Animal.model_json_schema()
NAMED["properties"]["names"]["items"]["maxLength"] = 12
TOOLS = [openai.pydantic_function_tool(tool) for tool in (Weather, Clock)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(served_model_name=[MODEL], dtype="float32") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


def form_of(schema: dict[str, object]) -> ResponseFormatJSONSchema:
    return {
        "type": "json_schema",
        "json_schema": {"name": "form", "schema": schema, "strict": True},
    }


class TestForms:
    def test_a_parsed_answer(self, client: OpenAI) -> None:
        answer = client.chat.completions.parse(**CHAT, response_format=Weather, n=3)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Weather)

    def test_a_streamed_answer(self, client: OpenAI) -> None:
        with client.chat.completions.stream(**CHAT, response_format=Clock) as stream:
            events = list(stream)
            message = stream.get_final_completion().choices[0].message
        assert isinstance(message.parsed, Clock)
        deltas = [event.delta for event in events if event.type == "content.delta"]
        assert "".join(deltas) == message.content
        assert any(event.type == "content.done" for event in events)

    def test_a_nested_schema(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            **CHAT,
            temperature=1.2,
            n=4,
            response_format=form_of(NAMED),
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            Animal.model_validate_json(choice.message.content or "")

    def test_any_object(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            **CHAT | {"max_tokens": 60}, response_format={"type": "json_object"}
        )
        content = answer.choices[0].message.content or ""
        assert content.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(content), dict)

    @pytest.mark.parametrize(
        ("form", "pattern"),
        [
            ({"structured_outputs": {"choice": ["a cat", "a dog"]}}, "a cat|a dog"),
            ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-[0-9]{2}"),
            ({"guided_grammar": 'root ::= x x "!" "?"?\nx ::= "a" | "b"'}, r"[ab]{2}!\??"),
            ({"guided_choice": ["x", "y"]}, "x|y"),
        ],
    )
    def test_forms_of_vllm(self, client: OpenAI, form: dict[str, Any], pattern: str) -> None:
        chat = client.chat.completions.create(**CHAT, extra_body=form, logprobs=True)
        text = client.completions.create(
            model=MODEL, prompt="Once", max_tokens=400, extra_body=form
        )
        assert re.fullmatch(pattern, chat.choices[0].message.content or "")
        assert re.fullmatch(pattern, text.choices[0].text)

    def test_what_cannot_be_enforced(self, client: OpenAI) -> None:
        schema = {"type": "array", "uniqueItems": True}
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            client.chat.completions.create(
                **CHAT,
                response_format=form_of(schema),
            )
        assert caught.value.param == "response_format"

    def test_many_at_once(self, server: Server) -> None:
        async def ask() -> list[ParsedChatCompletion[Any]]:
            async with AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
            ) as client:
                kinds: list[Any] = [Weather, Clock] * 4
                asked = [
                    client.chat.completions.parse(**CHAT, response_format=kind, seed=seed)
                    for seed, kind in enumerate(kinds)
                ]
                return list(await asyncio.gather(*asked))

        for index, answer in enumerate(asyncio.run(ask())):
            kind = (Weather, Clock)[index % 2]
            assert isinstance(answer.choices[0].message.parsed, kind)


class TestTools:
    def test_parsed_calls(self, client: OpenAI) -> None:
        answer = client.chat.completions.parse(**CHAT, tools=TOOLS, tool_choice="required")
        (choice,) = answer.choices
        assert choice.finish_reason in ("tool_calls", "length")
        assert choice.message.content is None
        for call in choice.message.tool_calls or []:
            assert isinstance(call.function.parsed_arguments, Weather | Clock)

    def test_streamed_calls(self, client: OpenAI) -> None:
        with client.chat.completions.stream(
            **CHAT, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
        ) as stream:
            events = list(stream)
            (choice,) = stream.get_final_completion().choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather | Clock)
        written = [
            event.arguments_delta
            for event in events
            if event.type == "tool_calls.function.arguments.delta"
        ]
        assert "".join(written) == call.function.arguments
        assert len(written) > 1

    def test_the_named_one(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            **CHAT, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "Clock"}}
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "Clock"
        Clock.model_validate_json(call.function.arguments)

    def test_one_of_those_allowed(self, client: OpenAI) -> None:
        named: dict[str, object] = {"type": "function", "function": {"name": "Weather"}}
        allowed: ChatCompletionAllowedToolChoiceParam = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [named]},
        }
        answer = client.chat.completions.create(
            **CHAT, tools=TOOLS, parallel_tool_calls=False, tool_choice=allowed
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "Weather"

    def test_a_loop(self, client: OpenAI) -> None:
        """Call, tell the result, and have an answer in a form."""
        tools = [openai.pydantic_function_tool(Roll)]
        called = client.chat.completions.create(
            **CHAT, tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        message = called.choices[0].message
        (call,) = message.tool_calls or []
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {}
        told: list[Any] = [
            *ASKED,
            message,
            {"role": "tool", "tool_call_id": call.id, "content": "4"},
        ]
        for said in (told, [*ASKED, message.model_dump(), told[2]]):
            answer = client.chat.completions.parse(
                **CHAT | {"messages": said},
                tools=tools,
                tool_choice="none",
                response_format=Clock,
            )
            assert isinstance(answer.choices[0].message.parsed, Clock)

    def test_a_call_or_an_answer_in_a_form(self, client: OpenAI) -> None:
        """Strict tools that may be called, and an answer that must have a form."""
        answer = client.chat.completions.parse(
            **CHAT, tools=TOOLS, response_format=Clock, parallel_tool_calls=False, n=4
        )
        for choice in answer.choices:
            calls = choice.message.tool_calls or []
            assert isinstance(choice.message.parsed, Clock) != bool(calls)
            for call in calls:
                assert isinstance(call.function.parsed_arguments, Weather | Clock)

    def test_text_where_no_call_begins(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(**CHAT | {"max_tokens": 20}, tools=TOOLS)
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason in ("length", "stop")
