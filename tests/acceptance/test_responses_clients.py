"""The official `openai` package on `/v1/responses` of a live server.

The client checks whole answers and events against OpenAI's own types.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from tests.environments import CLIENTS, environment
from tests.scripted_llm import ScriptedLLM, serve_scripted
from tests.serving import Server, serve

pytest.importorskip("openai")

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

pytestmark = pytest.mark.accept

MODEL = "tale"
KEY = "sk-test"
ASKED = "Tell me a fairy tale."
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
ON_AND_ON: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Hero(BaseModel):
    """Small enough for a model of a few million parameters to come to its end."""

    kind: Literal["girl", "boy", "bear"]
    brave: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(api_key=[KEY], served_model_name=[MODEL], dtype="float32") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    options: dict[str, Any] = {"_strict_response_validation": True, "max_retries": 0, "timeout": 60}
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, **options) as opened:
        yield opened


def calls_of(response: Response) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


class TestText:
    def test_whole(self, client: OpenAI) -> None:
        response = client.responses.create(input=ASKED, **GREEDY, **ON_AND_ON)
        assert response.id.startswith("resp_")
        assert (response.status, response.model) == ("incomplete", MODEL)
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output_text
        assert response.usage is not None
        assert response.usage.output_tokens == 24
        assert response.usage.total_tokens == response.usage.input_tokens + 24

    def test_the_same_as_in_chat(self, client: OpenAI) -> None:
        response = client.responses.create(
            input=ASKED, instructions="Be brief.", **GREEDY, **ON_AND_ON
        )
        answer = client.chat.completions.create(
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": ASKED},
            ],
            model=MODEL,
            temperature=0,
            max_completion_tokens=24,
            **ON_AND_ON,
        )
        assert response.output_text == answer.choices[0].message.content

    def test_streamed(self, client: OpenAI) -> None:
        whole = client.responses.create(input=ASKED, **GREEDY, **ON_AND_ON)
        events = list(client.responses.create(input=ASKED, stream=True, **GREEDY, **ON_AND_ON))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert len(deltas) > 5
        assert "".join(deltas) == whole.output_text
        last = events[-1]
        assert last.type == "response.incomplete"
        assert last.response.output_text == whole.output_text

    def test_the_helper_for_streams(self, client: OpenAI) -> None:
        with client.responses.stream(
            input=ASKED, model=MODEL, temperature=0, max_output_tokens=2000
        ) as stream:
            snapshot = ""
            for event in stream:
                if event.type == "response.output_text.delta":
                    snapshot = event.snapshot
            response = stream.get_final_response()
        assert response.status == "completed"
        assert response.output_text == snapshot != ""

    def test_log_probabilities(self, client: OpenAI) -> None:
        response = client.responses.create(
            input=ASKED, top_logprobs=2, include=["message.output_text.logprobs"], **GREEDY
        )
        message = response.output[0]
        assert message.type == "message"
        part = message.content[0]
        assert part.type == "output_text"
        assert part.logprobs
        assert "".join(score.token for score in part.logprobs) == part.text
        assert all(len(score.top_logprobs) == 2 for score in part.logprobs)

    def test_errors(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.responses.create(input=ASKED, model="gpt-4")
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            client.responses.create(input=ASKED, model=MODEL, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="web_search"):
            client.responses.create(input=ASKED, model=MODEL, tools=[{"type": "web_search"}])
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").responses.create(input=ASKED, model=MODEL)


class TestStored:
    def test_a_conversation(self, client: OpenAI) -> None:
        first = client.responses.create(input=ASKED, **GREEDY)
        second = client.responses.create(
            input="And then?", previous_response_id=first.id, **GREEDY, **ON_AND_ON
        )
        conversation: Any = [
            {"role": "user", "content": ASKED},
            *[item.to_dict() for item in first.output],
            {"role": "user", "content": "And then?"},
        ]
        by_hand = client.responses.create(input=conversation, **GREEDY, **ON_AND_ON)
        assert second.output_text == by_hand.output_text
        items = client.responses.input_items.list(second.id, order="asc")
        kinds = [(item.type, getattr(item, "role", None)) for item in items]
        assert kinds == [("message", "user"), ("message", "assistant"), ("message", "user")]

    def test_retrieve_and_delete(self, client: OpenAI) -> None:
        response = client.responses.create(input=ASKED, **GREEDY)
        assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError, match=response.id):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input="x", previous_response_id=response.id, **GREEDY)
        assert caught.value.code == "previous_response_not_found"

    def test_input_tokens(self, client: OpenAI) -> None:
        counted = client.responses.input_tokens.count(input=ASKED, model=MODEL)
        response = client.responses.create(input=ASKED, **GREEDY)
        assert response.usage is not None
        assert counted.input_tokens == response.usage.input_tokens


class TestForms:
    def test_parse(self, client: OpenAI) -> None:
        response = client.responses.parse(
            input=ASKED, model=MODEL, text_format=Hero, max_output_tokens=200
        )
        assert response.status == "completed"
        assert isinstance(response.output_parsed, Hero)

    def test_parse_a_stream(self, client: OpenAI) -> None:
        with client.responses.stream(
            input=ASKED, model=MODEL, text_format=Hero, max_output_tokens=200
        ) as stream:
            done = [event for event in stream if event.type == "response.output_text.done"]
            response = stream.get_final_response()
        assert isinstance(response.output_parsed, Hero)
        assert done[0].parsed == response.output_parsed

    def test_any_object(self, client: OpenAI) -> None:
        response = client.responses.create(
            input=ASKED, text={"format": {"type": "json_object"}}, model=MODEL, temperature=0
        )
        if response.status == "completed":
            assert isinstance(json.loads(response.output_text), dict)
        assert response.output_text.startswith("{")


class TestTools:
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
    def test_a_loop(self, client: OpenAI, choice: Any) -> None:
        first = client.responses.create(
            input="Weather?",
            model=MODEL,
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_output_tokens=200,
        )
        assert first.status == "completed"
        (call,) = calls_of(first)
        assert call.name == "get_weather"
        assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
        second = client.responses.create(
            previous_response_id=first.id,
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "cold"}],
            tools=[WEATHER],
            tool_choice="none",
            **GREEDY,
        )
        assert not calls_of(second)
        assert second.output_text
        conversation: Any = [
            {"role": "user", "content": "Weather?"},
            *[item.to_dict() for item in first.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "cold"},
        ]
        by_hand = client.responses.create(
            input=conversation,
            tools=[WEATHER],
            tool_choice="none",
            store=False,
            **GREEDY,
        )
        assert by_hand.output_text == second.output_text

    def test_streamed(self, client: OpenAI) -> None:
        snapshot = ""
        with client.responses.stream(
            input="Weather?",
            model=MODEL,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=200,
        ) as stream:
            for event in stream:
                if event.type == "response.function_call_arguments.delta":
                    snapshot = event.snapshot
            response = stream.get_final_response()
        (call,) = calls_of(response)
        assert call.arguments == snapshot
        assert call.parsed_arguments == json.loads(snapshot)

    async def _ask(self, server: Server) -> Response:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            return await client.responses.create(
                input="Weather?",
                model=MODEL,
                tools=[WEATHER],
                tool_choice={
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "get_weather"}],
                },
                max_output_tokens=200,
            )

    def test_allowed_tools(self, server: Server) -> None:
        response = asyncio.run(self._ask(server))
        assert {call.name for call in calls_of(response)} == {"get_weather"}


def tool_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_agents() -> None:
    """The `openai-agents` package: tools of the model's own accord, forms, handoffs."""

    def script(prompt: str) -> str:
        if "A place?" in prompt:
            return '{"city": "Oslo", "degrees": 9}'
        if "You ask others." in prompt:
            return tool_call("transfer_to_forecaster", "{}")
        assert "Where is it warmer?" in prompt
        if "Thanks." in prompt:
            assert prompt.count("It is warmer in Paris.") == 1
            return "Not at all."
        if "<tool_response>\n21 degrees" in prompt:
            assert "<tool_response>\n9 degrees" in prompt
            return "It is warmer in Paris."
        calls = [tool_call("weather", f'{{"city": "{city}"}}') for city in ("Paris", "Oslo")]
        return "\n".join(["I look.", *calls])

    with serve_scripted(ScriptedLLM(script), api_key=[KEY]) as url:
        environment("openai_agents").run((CLIENTS / "use_openai_agents.py", url, KEY))
