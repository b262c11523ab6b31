"""The official `ollama` package on a live server: what its users do, and the errors they catch."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.serving import Server, serve

pytest.importorskip("ollama")

import jsonschema
from ollama import AsyncClient, Client, ResponseError
from pydantic import BaseModel, ConfigDict

pytestmark = pytest.mark.accept

MODEL = "tale"
KEY = "sk-test"
TEMPLATE = Path(__file__).parent.parent / "unit" / "chat_templates" / "agent.jinja"
ASKED: Any = [{"role": "user", "content": "Tell me a fairy tale."}]
SHORT: dict[str, Any] = {"temperature": 0, "num_predict": 24}
CHAT: dict[str, Any] = {"model": MODEL, "messages": ASKED, "options": SHORT, "think": False}
LONG: dict[str, Any] = CHAT | {"options": SHORT | {"num_predict": 300}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["kind", "names"],
    "additionalProperties": False,
}


class Animal(BaseModel):
    """What a tale may be about."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    tame: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    described: dict[str, Any] = {"served_model_name": MODEL, "chat_template": TEMPLATE}
    with serve(api_key=[KEY], dtype="float32", **described) as running:
        yield running


def options(server: Server, key: str = KEY) -> dict[str, Any]:
    """What both kinds of client are made with."""
    return {"host": server.url, "headers": {"Authorization": f"Bearer {key}"}, "timeout": 120}


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(**options(server))


def test_embeddings(client: Client) -> None:
    answer = client.embed(MODEL, ["The king had a daughter.", "A wolf!"], dimensions=32)
    assert [len(embedding) for embedding in answer.embeddings] == [32, 32]
    long = client.embed(MODEL, "A king " * 5000)
    assert len(long.embeddings) == 1
    assert long.prompt_eval_count
    with pytest.raises(ResponseError, match="maximum context length") as e:
        client.embed(MODEL, "A king " * 5000, truncate=False)
    assert e.value.status_code == 400


class TestChat:
    def test_whole(self, client: Client) -> None:
        answer = client.chat(**CHAT)
        assert answer.message.role == "assistant"
        assert answer.message.content
        assert answer["message"]["content"] == answer.message.content
        assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", 24)
        assert answer.prompt_eval_count
        durations = (answer.prompt_eval_duration, answer.eval_duration, answer.total_duration)
        assert all(durations)

    def test_streamed_is_the_same(self, client: Client) -> None:
        whole = client.chat(**CHAT)
        parts = list(client.chat(**CHAT, stream=True))
        assert len(parts) > 2
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1].eval_count == 24

    def test_concurrently(self, server: Server) -> None:
        async def ask() -> list[str | None]:
            client = AsyncClient(**options(server))
            answers = await asyncio.gather(*(client.chat(**CHAT) for _ in range(8)))
            return [answer.message.content for answer in answers]

        assert len(set(asyncio.run(ask()))) == 1

    def test_a_message_to_go_on_with(self, client: Client) -> None:
        begun = [*ASKED, {"role": "assistant", "content": "Once upon a"}]
        said = client.chat(**CHAT | {"messages": begun}).message.content or ""
        assert said.startswith(" time")

    def test_log_probabilities(self, client: Client) -> None:
        answer = client.chat(**CHAT, logprobs=True, top_logprobs=3)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == 24
        for position in answer.logprobs:
            assert position.top_logprobs is not None
            assert position.top_logprobs[0].token == position.token

    def test_the_seed(self, client: Client) -> None:
        warm = CHAT | {"options": {"temperature": 1, "seed": 5, "num_predict": 16}}
        assert client.chat(**warm).message.content == client.chat(**warm).message.content


class TestStructured:
    def test_a_schema(self, client: Client) -> None:
        answer = client.chat(**LONG, format=SCHEMA)
        assert answer.done_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)

    def test_of_a_class(self, client: Client) -> None:
        answer = client.chat(**LONG, format=Animal.model_json_schema())
        assert Animal.model_validate_json(answer.message.content or "").kind in ("cat", "dog")

    def test_any_json(self, client: Client) -> None:
        warm = CHAT | {"options": {"temperature": 1, "seed": 1, "num_predict": 400}}
        answer = client.chat(**warm, format="json")
        if answer.done_reason == "stop":
            assert isinstance(json.loads(answer.message.content or ""), dict)

    def test_what_a_prompt_gives(self, client: Client) -> None:
        for raw in (False, True):
            answer = client.generate(
                MODEL, "Once", options=SHORT | {"num_predict": 300}, format=SCHEMA, raw=raw
            )
            jsonschema.validate(json.loads(answer.response or ""), SCHEMA)


class TestGenerate:
    def test_raw(self, client: Client) -> None:
        answer = client.generate(MODEL, "Once upon a", raw=True, options=SHORT)
        assert (answer.response or "").startswith(" time")
        parts = client.generate(MODEL, "Once upon a", raw=True, options=SHORT, stream=True)
        assert "".join(part.response or "" for part in parts) == answer.response

    def test_as_a_message(self, client: Client) -> None:
        prompt = ASKED[0]["content"]
        answer = client.generate(MODEL, prompt, options=SHORT, think=False)
        assert answer.response == client.chat(**CHAT).message.content

    def test_only_to_load(self, client: Client) -> None:
        assert client.generate(MODEL).done_reason == "load"
        assert client.generate(MODEL, keep_alive=0).done_reason == "unload"


class TestTools:
    def test_a_conversation_with_calls(self, client: Client) -> None:
        """The client makes a tool of a function; calls and results go back as they came."""

        def add(a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: One.
                b: The other.
            """
            return a + b

        call = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        messages = [
            *ASKED,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_name": "add", "content": "3"},
        ]
        for streams in (False, True):
            asked: Any = CHAT | {"messages": messages, "stream": streams}
            answer = client.chat(**asked, tools=[add])
            parts: list[Any] = list(answer) if streams else [answer]
            assert parts[-1].done
            assert all(part.message.role == "assistant" for part in parts)


class TestModels:
    def test_list_and_ps(self, client: Client) -> None:
        assert [model.model for model in client.list().models] == [MODEL]
        (running,) = client.ps().models
        assert (running.model, running.context_length) == (MODEL, 4096)

    def test_show(self, client: Client) -> None:
        shown = client.show(MODEL)
        assert shown.modelinfo is not None
        assert shown.modelinfo["general.architecture"] == "qwen3"
        assert shown.capabilities is not None
        assert set(shown.capabilities) == {"completion", "embedding", "tools", "thinking"}
        assert shown.details is not None
        assert shown.details.quantization_level == "F32"


class TestErrors:
    def test_no_such_model(self, client: Client) -> None:
        for streams in (False, True):
            asked: Any = CHAT | {"model": "llama3", "stream": streams}
            with pytest.raises(ResponseError, match="`llama3` does not exist") as caught:
                list(client.chat(**asked))
            assert caught.value.status_code == 404

    def test_a_wrong_key(self, server: Server) -> None:
        with pytest.raises(ResponseError) as caught:
            Client(**options(server, "sk-wrong")).list()
        assert caught.value.status_code == 401

    def test_what_there_is_not(self, client: Client) -> None:
        for call in (client.pull, client.delete, client.push):
            with pytest.raises(ResponseError) as caught:
                call(MODEL)
            assert caught.value.status_code == 404

    def test_an_image(self, client: Client) -> None:
        asked: Any = [{"role": "user", "content": "What is this?", "images": ["iVBORw0KGgo="]}]
        with pytest.raises(ResponseError, match="not images") as caught:
            client.chat(MODEL, asked)
        assert caught.value.status_code == 400
