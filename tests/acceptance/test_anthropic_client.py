"""The official `anthropic` package on a live server: what its users do, and the errors they catch.

The model's template has tools and thoughts; what it says it has from fairy tales.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.serving import Server, serve

pytest.importorskip("anthropic")

import anthropic
import jsonschema
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

pytestmark = pytest.mark.accept

MODEL = "tale"
KEY = "sk-test"
TEMPLATE = Path(__file__).parent.parent / "unit" / "chat_templates" / "agent.jinja"
ASKED: Any = [{"role": "user", "content": "Tell me a fairy tale."}]
GREEDY: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 24,
    "extra_body": {"temperature": 0},
    "thinking": {"type": "disabled"},
}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "What the sky does somewhere.",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
TIME: dict[str, Any] = {
    "name": "get_time",
    "input_schema": {
        "type": "object",
        "properties": {"hours_from_now": {"type": "integer", "minimum": 0, "maximum": 48}},
        "required": ["hours_from_now"],
        "additionalProperties": False,
    },
}
TOOLS: dict[str, Any] = {**GREEDY, "max_tokens": 300, "tools": [WEATHER, TIME]}
SCHEMAS = {tool["name"]: tool["input_schema"] for tool in (WEATHER, TIME)}


class Animal(BaseModel):
    """What a tale may be about."""

    kind: str
    legs: int
    tame: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    described: dict[str, Any] = {"served_model_name": MODEL, "chat_template": TEMPLATE}
    with serve(api_key=[KEY], dtype="float32", **described) as running:
        yield running


def options(server: Server, **more: Any) -> dict[str, Any]:
    """What both kinds of client are made with."""
    return {
        "base_url": server.url,
        "api_key": KEY,
        "max_retries": 0,
        "timeout": 120,
        "_strict_response_validation": True,
    } | more


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(**options(server)) as opened:
        yield opened


def text_of(message: Any) -> str:
    """What a message says."""
    return "".join(block.text for block in message.content if block.type == "text")


def calls_of(message: Any) -> list[Any]:
    """The calls of a message, whose inputs must be as their tools want them."""
    calls = [block for block in message.content if block.type == "tool_use"]
    for call in calls:
        jsonschema.validate(call.input, SCHEMAS[call.name])
    return calls


class TestMessages:
    def test_whole(self, client: Anthropic) -> None:
        message = client.messages.create(**GREEDY, messages=ASKED)
        assert message.id.startswith("msg_")
        assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
        assert text_of(message)
        assert message.stop_reason == "max_tokens"
        assert message.usage.output_tokens == 24
        named = client.messages.create(
            **GREEDY, messages=ASKED, extra_headers={"X-Request-Id": "mine-1"}
        )
        assert named._request_id == "mine-1"

    def test_counted_tokens_are_those_of_the_usage(self, client: Anthropic) -> None:
        body: dict[str, Any] = {"messages": ASKED, "system": "Be brief.", "tools": [WEATHER]}
        counted = client.messages.count_tokens(
            model=MODEL, thinking={"type": "disabled"}, **body
        ).input_tokens
        usage = client.messages.create(**GREEDY, **body).usage
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        again = client.messages.create(**GREEDY, **body).usage
        assert again.cache_read_input_tokens
        assert counted == again.input_tokens + again.cache_read_input_tokens

    def test_streamed_is_the_same(self, client: Anthropic) -> None:
        whole = client.messages.create(**GREEDY, messages=ASKED)
        with client.messages.stream(**GREEDY, messages=ASKED) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        assert len(pieces) > 1
        assert "".join(pieces) == text_of(final) == text_of(whole)
        assert final.stop_reason == whole.stop_reason
        assert final.usage.output_tokens == whole.usage.output_tokens

    def test_raw_events(self, client: Anthropic) -> None:
        events = list(client.messages.create(**GREEDY, messages=ASKED, stream=True))
        kinds = [event.type for event in events]
        assert kinds[0] == "message_start"
        assert kinds[-2:] == ["message_delta", "message_stop"]

    def test_stop_sequences(self, client: Anthropic) -> None:
        said = text_of(client.messages.create(**GREEDY, messages=ASKED))
        stop = said[8:12]
        for message in (
            client.messages.create(**GREEDY, messages=ASKED, stop_sequences=["§", stop]),
            self.streamed(client, stop),
        ):
            assert message.stop_reason == "stop_sequence"
            assert message.stop_sequence == stop
            assert text_of(message) == said[: said.index(stop)]

    def streamed(self, client: Anthropic, stop: str) -> Any:
        with client.messages.stream(**GREEDY, messages=ASKED, stop_sequences=[stop]) as stream:
            return stream.get_final_message()

    def test_a_message_to_go_on_with(self, client: Anthropic) -> None:
        begun = [*ASKED, {"role": "assistant", "content": "Once upon a"}]
        assert text_of(client.messages.create(**GREEDY, messages=begun)).startswith(" time")

    def test_concurrently(self, server: Server) -> None:
        async def ask() -> list[str]:
            async with AsyncAnthropic(**options(server)) as client:
                asked = [client.messages.create(**GREEDY, messages=ASKED) for _ in range(8)]
                return [text_of(message) for message in await asyncio.gather(*asked)]

        assert len(set(asyncio.run(ask()))) == 1


class TestStructured:
    def test_parse(self, client: Anthropic) -> None:
        more = {**GREEDY, "max_tokens": 200}
        message = client.messages.parse(**more, messages=ASKED, output_format=Animal)
        assert message.stop_reason == "end_turn"
        assert isinstance(message.parsed_output, Animal)

    def test_schema(self, client: Anthropic) -> None:
        schema = {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3}
        message = client.messages.create(
            **GREEDY,
            messages=ASKED,
            output_config={"format": {"type": "json_schema", "schema": schema}},
        )
        jsonschema.validate(json.loads(text_of(message)), schema)

    def test_a_schema_that_cannot_be_kept(self, client: Anthropic) -> None:
        form: Any = {"type": "json_schema", "schema": {"type": "no such type"}}
        with pytest.raises(anthropic.BadRequestError, match="no such type"):
            client.messages.create(**GREEDY, messages=ASKED, output_config={"format": form})


class TestTools:
    @pytest.mark.parametrize(
        ("choice", "names"),
        [
            ({"type": "any"}, set(SCHEMAS)),
            ({"type": "tool", "name": "get_time"}, {"get_time"}),
            ({"type": "any", "disable_parallel_tool_use": True}, set(SCHEMAS)),
        ],
    )
    @pytest.mark.parametrize("temperature", [0, 1])
    def test_calls_that_have_to_be(
        self, client: Anthropic, choice: Any, names: set[str], temperature: int
    ) -> None:
        body = TOOLS | {"extra_body": {"temperature": temperature, "seed": 1}}
        message = client.messages.create(**body, messages=ASKED, tool_choice=choice)
        called = [block.name for block in message.content if block.type == "tool_use"]
        assert called
        assert set(called) <= names
        if choice != {"type": "any"}:  # which may be again and again
            assert message.stop_reason == "tool_use"
            assert len(calls_of(message)) == 1

    def test_streamed_calls(self, client: Anthropic) -> None:
        choice: Any = {"type": "tool", "name": "get_weather"}
        whole = client.messages.create(**TOOLS, messages=ASKED, tool_choice=choice)
        with client.messages.stream(**TOOLS, messages=ASKED, tool_choice=choice) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        assert len(pieces) > 1
        assert [call.input for call in calls_of(final)] == [c.input for c in calls_of(whole)]
        assert final.stop_reason == "tool_use"

    def test_a_loop(self, client: Anthropic) -> None:
        """A call, its result and what the model makes of it, with thoughts sent back."""
        messages: list[Any] = [*ASKED]
        body = TOOLS | {"thinking": {"type": "enabled", "budget_tokens": 1024}}
        for choice in ({"type": "any"}, {"type": "none"}):
            choice_given: Any = choice
            message = client.messages.create(**body, messages=messages, tool_choice=choice_given)
            messages.append({"role": "assistant", "content": message.content})
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
                for call in calls_of(message)
            ]
            messages.append({"role": "user", "content": results or "So?"})
        assert message.stop_reason in ("end_turn", "max_tokens")
        assert calls_of(message) == []

    def test_the_clients_own_runner(self, client: Anthropic) -> None:
        asked: list[str] = []

        def get_place(city: Literal["Rome", "Oslo"]) -> str:
            """Look a city up.

            Args:
                city: Its name.
            """
            asked.append(city)
            return "far away"

        runner = client.beta.messages.tool_runner(
            **GREEDY | {"max_tokens": 300},
            messages=ASKED,
            tools=[anthropic.beta_tool(get_place)],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            max_iterations=2,
        )
        for message in runner:
            assert message.stop_reason == "tool_use"
        assert len(asked) >= 1


class TestErrors:
    def test_no_such_model(self, client: Anthropic) -> None:
        body = {**GREEDY, "model": "claude"}
        with pytest.raises(anthropic.NotFoundError, match="`claude` does not exist") as caught:
            client.messages.create(**body, messages=ASKED)
        assert caught.value.type == "not_found_error"
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(model="claude", messages=ASKED)

    def test_a_wrong_key(self, server: Server) -> None:
        with (
            Anthropic(**options(server, api_key="sk-wrong")) as stranger,
            pytest.raises(anthropic.AuthenticationError) as caught,
        ):
            stranger.messages.create(**GREEDY, messages=ASKED)
        assert caught.value.type == "authentication_error"

    def test_a_key_as_a_token(self, server: Server) -> None:
        with Anthropic(**options(server, api_key=None, auth_token=KEY)) as bearer:
            assert bearer.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ({"messages": []}, "messages: must not be empty"),
            ({"tool_choice": {"type": "any"}}, "tool"),
            ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "'x'"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
                "'image' is not supported",
            ),
        ],
    )
    def test_bad_requests(self, client: Anthropic, body: dict[str, Any], says: str) -> None:
        with pytest.raises(anthropic.BadRequestError, match=says) as caught:
            client.messages.create(**GREEDY | {"messages": ASKED} | body)
        assert caught.value.type == "invalid_request_error"

    def test_a_prompt_that_is_too_long(self, client: Anthropic) -> None:
        long: Any = [{"role": "user", "content": "far away and long ago " * 4000}]
        with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
            client.messages.create(**GREEDY, messages=long)
