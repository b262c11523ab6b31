"""Ollama's API: its words for requests and answers, lines, and what it says of models."""

import asyncio
import hashlib
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanovllm.config import ServerConfig, SpeechConfig
from nanovllm.server.metrics import Metrics
from nanovllm.server.ollama.requests import MAX_MESSAGES, ChatRequest
from nanovllm.server.ollama.translate import conversation_of
from nanovllm.server.state import ServerState
from tests.fake_llm import DEMO_MODEL, FakeLLM
from tests.fake_speech import FakeSpeech
from tests.server_client import HI, build, build_speech, call

CHAT = "/api/chat"
GENERATE = "/api/generate"
AGENT = Path(__file__).parents[1] / "chat_templates" / "agent.jinja"
MODEL = "demo_model"
FIGURES = {
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
}


def whole(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    """A success's body."""
    response = client.post(path, json={"model": MODEL, "stream": False, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    assert answer["model"] == body.get("model", MODEL)
    datetime.fromisoformat(answer["created_at"].replace("Z", "+00:00"))
    return answer


def lines(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The objects of a stream, of which the last one alone is done."""
    response = client.post(path, json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("}\n")
    answers = [json.loads(line) for line in response.text.splitlines()]
    assert [answer.get("done") for answer in answers] == [False] * (len(answers) - 1) + [True]
    return answers


def state_of(llm: Any) -> ServerState:
    return ServerState(ServerConfig(), SpeechConfig(), Metrics(), llm, None, loaded=True)


def error_of(response: Any, status: int) -> str:
    """The error of a response, which must have Ollama's body."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert body["error"]
    error: str = body["error"]
    return error


def refused(client: TestClient, path: str, **body: Any) -> str:
    """What a bad request is told."""
    return error_of(client.post(path, json={"model": MODEL, **body}), 400)


class TestChat:
    def test_whole(self, client: TestClient) -> None:
        answer = whole(client, CHAT, messages=HI)
        assert answer["message"] == {"role": "assistant", "content": " upon a time"}
        assert (answer["done"], answer["done_reason"]) == (True, "stop")
        assert answer["eval_count"] == 4
        assert answer["prompt_eval_count"] > 4
        assert set(answer) >= FIGURES
        durations = [answer[name] for name in FIGURES if name.endswith("duration")]
        assert all(type(duration) is int and duration >= 0 for duration in durations)
        parts = answer["prompt_eval_duration"] + answer["eval_duration"]
        assert parts == answer["total_duration"]

    def test_lines(self, client: TestClient) -> None:
        *parts, last = lines(client, CHAT, messages=HI)
        assert [part["message"]["content"] for part in parts] == [" upon", " a", " time"]
        assert last["message"] == {"role": "assistant", "content": ""}
        assert last["done_reason"] == "stop"
        assert set(last) >= FIGURES
        assert not any(set(part) & FIGURES for part in parts)

    def test_length(self, client: TestClient) -> None:
        answer = whole(client, CHAT, messages=HI, options={"num_predict": 2})
        assert (answer["done_reason"], answer["eval_count"]) == ("length", 2)
        answer = whole(client, CHAT, messages=HI, options={"num_predict": 10**6})
        assert answer["done_reason"] == "stop"
        for unlimited in (0, -1, -2):
            answer = whole(client, CHAT, messages=HI, options={"num_predict": unlimited})
            assert answer["done_reason"] == "stop"

    def test_stop_strings(self, client: TestClient) -> None:
        answer = whole(client, CHAT, messages=HI, options={"stop": [" time"]})
        assert (answer["message"]["content"], answer["done_reason"]) == (" upon a", "stop")

    def test_log_probabilities(self, client: TestClient) -> None:
        wanted = {"messages": HI, "logprobs": True, "top_logprobs": 2}
        at_once = whole(client, CHAT, **wanted)["logprobs"]
        assert [position["token"] for position in at_once[:3]] == [" upon", " a", " time"]
        assert [len(position["top_logprobs"]) for position in at_once] == [2] * 4
        parts = lines(client, CHAT, **wanted)
        assert [position for part in parts for position in part.get("logprobs", [])] == at_once
        assert "logprobs" not in whole(client, CHAT, messages=HI)

    @pytest.mark.parametrize("body", [{}, {"messages": []}])
    def test_only_to_load(self, client: TestClient, llm: FakeLLM, body: dict[str, Any]) -> None:
        (answer,) = lines(client, CHAT, **body)
        assert answer["message"] == {"role": "assistant", "content": ""}
        assert answer["done_reason"] == "load"
        assert whole(client, CHAT, **body, keep_alive=0)["done_reason"] == "unload"
        assert llm.submitted == []

    def test_a_client_that_leaves(self, app: FastAPI, llm: FakeLLM) -> None:
        llm.delay = 0.05
        for streams in (False, True):
            body = {"model": MODEL, "messages": HI, "stream": streams}
            asyncio.run(call(app, CHAT, body, leave_when=lambda answer: True))
            assert llm.num_open == 0

    def test_a_body_of_any_type(self, client: TestClient) -> None:
        content = json.dumps({"model": MODEL, "messages": HI, "stream": False})
        for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
            assert client.post(CHAT, content=content, headers=headers).status_code == 200


def call_of(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


SAID = "<think>\nWhere?\n</think>\n\nI look.\n{}\n{}".format(
    call_of("weather", '{"city": "Rome"}'), call_of("clock", "{}")
)
CALLED = [("weather", {"city": "Rome"}), ("clock", {})]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]


def agent(reply: str) -> TestClient:
    """A server of a model with tools and thoughts, which says this."""
    llm = FakeLLM(reply, max_model_len=4096)
    assert llm.tokenizer is not None
    llm.tokenizer.chat_templates["default"] = AGENT.read_text(encoding="utf-8")
    return TestClient(build(llm))


class TestAgents:
    def test_thoughts_text_and_calls(self) -> None:
        client = agent(SAID)
        answer = whole(client, CHAT, messages=HI, tools=TOOLS)
        assert answer["done_reason"] == "stop"
        message = answer["message"]
        assert (message["thinking"], message["content"]) == ("Where?", "I look.")
        called = [
            (c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]
        ]
        assert called == CALLED
        assert [call["function"]["index"] for call in message["tool_calls"]] == [0, 1]

    def test_lines_say_the_same(self) -> None:
        said = [part["message"] for part in lines(agent(SAID), CHAT, messages=HI, tools=TOOLS)]
        assert "".join(message.get("thinking", "") for message in said) == "Where?"
        assert "".join(message["content"] for message in said) == "I look."
        calls = [call for message in said for call in message.get("tool_calls", [])]
        called = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        assert called == CALLED
        assert len({call["id"] for call in calls}) == 2

    def test_a_call_that_is_cut_short_is_left_out(self) -> None:
        client = agent(call_of("weather", '{"city": "Rome"}'))
        num_tokens = whole(client, CHAT, messages=HI, tools=TOOLS)["eval_count"]
        for limit in range(1, num_tokens):
            body = {"messages": HI, "tools": TOOLS, "options": {"num_predict": limit}}
            at_once = whole(client, CHAT, **body)["message"]
            parts = [part["message"] for part in lines(client, CHAT, **body)]
            for message in (at_once, *parts):
                for made in message.get("tool_calls", []):
                    assert made["function"]["arguments"] == {"city": "Rome"}

    def test_what_a_prompt_gives(self) -> None:
        client = agent("<think>\nHm.\n</think>\n\nNo.")
        answer = whole(client, GENERATE, prompt="Well?")
        assert (answer["thinking"], answer["response"]) == ("Hm.", "No.")
        parts = lines(client, GENERATE, prompt="Well?")
        assert "".join(part.get("thinking", "") for part in parts) == "Hm."
        assert whole(client, GENERATE, prompt="x", raw=True)["response"].startswith("<think>")

    def test_show(self) -> None:
        shown = agent("").post("/api/show", json={"model": MODEL}).json()
        assert shown["capabilities"] == ["completion", "embedding", "tools", "thinking"]


class TestGenerate:
    def test_the_prompt_is_a_message(self, client: TestClient, llm: FakeLLM) -> None:
        answer = whole(client, GENERATE, prompt="Hi", system="Be kind.")
        assert answer["response"] == " upon a time"
        assert answer["done_reason"] == "stop"
        assert llm.submitted[-1][0].prompt == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_raw(self, client: TestClient, llm: FakeLLM) -> None:
        answers = lines(client, GENERATE, prompt="Once", raw=True, options={"num_predict": 3})
        assert "".join(answer["response"] for answer in answers) == " upon a time"
        assert answers[-1]["done_reason"] == "length"
        assert llm.submitted[-1][0].prompt == "Once"

    def test_only_to_load(self, client: TestClient, llm: FakeLLM) -> None:
        assert whole(client, GENERATE)["done_reason"] == "load"
        assert whole(client, GENERATE, prompt="", keep_alive=0)["done_reason"] == "unload"
        assert llm.submitted == []

    @pytest.mark.parametrize("field", ["images", "template", "suffix", "context"])
    def test_what_is_not_supported(self, client: TestClient, field: str) -> None:
        value: Any = {"images": ["AA=="], "context": [1]}.get(field, "x")
        assert f"{field}: not supported" in refused(client, GENERATE, prompt="Hi", **{field: value})
        nothing: Any = {"images": [], "context": []}.get(field, "")
        whole(client, GENERATE, prompt="Hi", **{field: nothing})


class TestOptions:
    def test_sampling(self, client: TestClient, llm: FakeLLM) -> None:
        options = {
            "temperature": 0.25,
            "top_k": 3,
            "top_p": 0.5,
            "min_p": 0.1,
            "seed": 7.0,
            "repeat_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
        }
        whole(client, CHAT, messages=HI, options=options)
        params = llm.submitted[-1][0].params
        assert params.repetition_penalty == 1.5
        assert params.seed == 7
        for name in set(options) - {"seed", "repeat_penalty"}:
            assert getattr(params, name) == options[name]

    def test_edges(self, client: TestClient, llm: FakeLLM) -> None:
        edges = {"top_p": 0, "seed": -1, "repeat_penalty": 2, "repeat_last_n": 0, "stop": []}
        whole(client, CHAT, messages=HI, options=edges)
        params = llm.submitted[-1][0].params
        assert params.greedy
        assert params.repetition_penalty == 1
        assert params.stop_strings == []

    def test_what_has_no_effect_is_taken(self, client: TestClient) -> None:
        ignored = {"num_ctx": 8192, "num_gpu": 1, "mirostat": 1, "use_mmap": True, "new": "x"}
        whole(client, CHAT, messages=HI, options=ignored, keep_alive="5m")
        whole(client, CHAT, messages=HI, options=None, keep_alive=-1, tools=[], format=None)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"temperature": -1}, "options.temperature"),
            ({"temperature": "hot"}, "options.temperature"),
            ({"top_p": 2}, "options.top_p"),
            ({"num_predict": -3}, "options.num_predict"),
            ({"num_predict": 1.5}, "options.num_predict"),
            ({"seed": 2**64}, "options.seed"),
            ({"stop": [""]}, "options.stop"),
            ({"stop": ["x"] * 99}, "stop strings, got 99"),
            ({"repeat_penalty": 0}, "options.repeat_penalty"),
            ([], "options"),
        ],
    )
    def test_refused(self, client: TestClient, options: Any, says: str) -> None:
        assert says in refused(client, CHAT, messages=HI, options=options)


class TestMessages:
    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ({"messages": [{"role": "wizard"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "images": ["AA=="]}]}, "images: not supported"),
            ({"messages": HI, "format": "xml"}, 'format: must be "json" or a JSON schema'),
            ({"messages": HI, "format": {"not": {"type": "string"}}}, "format: json cannot be"),
            ({"messages": HI, "think": "hard"}, "think: must be true, false, or how hard"),
            ({"messages": HI, "tools": [{"function": {"name": "a b"}}]}, "function.name"),
            ({"messages": HI, "tools": [{"type": "web"}]}, "tools.0"),
            ({"messages": HI, "model": ""}, "model"),
            ({"messages": HI, "model": None}, "model"),
            ({"messages": HI, "top_logprobs": 99}, "top_logprobs"),
        ],
    )
    def test_refused(self, client: TestClient, body: dict[str, Any], says: str) -> None:
        assert says in refused(client, CHAT, **body)

    def test_too_many_calls(self, client: TestClient) -> None:
        calls = [{"function": {"name": "a", "arguments": {}}}] * 1000
        messages = [{"role": "assistant", "tool_calls": calls}] * 9
        assert f"{MAX_MESSAGES} tool calls" in refused(client, CHAT, messages=messages)

    def test_long_conversations_are_read_in_linear_time(self) -> None:
        made = [{"function": {"name": "a", "arguments": {}}}] * 4000
        results = [{"role": "tool", "tool_name": name, "content": ""} for name in ("a", "b")] * 2000
        messages = [{"role": "assistant", "tool_calls": made[:1000]}] * 4 + results
        request = ChatRequest.model_validate({"model": MODEL, "messages": messages})
        start = time.process_time()
        conversation_of(request, state_of(FakeLLM()), "id")
        assert time.process_time() - start < 1

    def test_results_find_their_calls(self) -> None:
        """By id, else by name, else in order."""

        def made(name: str, **more: Any) -> dict[str, Any]:
            return {"function": {"name": name, "arguments": {}}, **more}

        asked = [made("a"), made("b"), made("b"), made("c", id="own")]
        messages = [
            *HI,
            {"role": "assistant", "tool_calls": asked},
            {"role": "tool", "tool_name": "b", "content": "first b"},
            {"role": "tool", "content": "a"},
            {"role": "tool", "tool_call_id": "own", "content": "c"},
            {"role": "tool", "tool_name": "b", "content": "second b"},
            {"role": "tool", "content": "too many"},
            {"role": "assistant", "tool_calls": [made("a")]},
            {"role": "tool", "tool_name": "renamed", "content": "a again"},
        ]
        request = ChatRequest.model_validate({"model": MODEL, "messages": messages})
        read = conversation_of(request, state_of(FakeLLM()), "id").messages
        ids = [call["id"] for message in read for call in message.get("tool_calls", [])]
        assert ids == ["call00000", "call00001", "call00002", "own", "call00004"]
        assert all(len(made_id) == 9 for made_id in ids if made_id != "own")
        results = {m["content"]: m.get("tool_call_id") for m in read if m["role"] == "tool"}
        assert results == {
            "first b": ids[1],
            "a": ids[0],
            "c": "own",
            "second b": ids[2],
            "too many": None,
            "a again": ids[4],
        }


class TestErrors:
    def test_no_such_model(self, client: TestClient) -> None:
        for path in (CHAT, GENERATE, "/api/show"):
            assert "`llama3`" in error_of(client.post(path, json={"model": "llama3"}), 404)

    def test_a_name_may_have_a_tag(self, client: TestClient) -> None:
        whole(client, CHAT, messages=HI, model="demo_model:latest")
        error_of(client.post(CHAT, json={"model": "demo_model:7b", "messages": HI}), 404)

    def test_keys(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm, api_key=["sk-one"]))
        assert "API key" in error_of(client.get("/api/tags"), 401)
        bearer = {"authorization": "Bearer sk-one"}
        assert client.get("/api/tags", headers=bearer).status_code == 200

    def test_before_and_after_the_first_token(self, client: TestClient, llm: FakeLLM) -> None:
        llm.fail_after = 0
        for streams in (False, True):
            body = {"model": MODEL, "messages": HI, "stream": streams}
            error_of(client.post(CHAT, json=body), 503)
        llm.fail_after = 2
        response = client.post(CHAT, json={"model": MODEL, "messages": HI})
        assert response.status_code == 200
        *parts, last = map(json.loads, response.text.splitlines())
        assert [part["message"]["content"] for part in parts] == [" upon", " a"]
        assert last == {"error": "the engine died: try again"}
        assert llm.num_open == 0

    @pytest.mark.parametrize("name", ["pull", "push", "create", "copy", "delete", "blobs/x", ""])
    def test_nothing_is_pulled_or_made(self, client: TestClient, name: str) -> None:
        for method in ("POST", "DELETE", "HEAD"):
            response = client.request(method, f"/api/{name}", json={"model": MODEL})
            assert response.status_code == 404
        assert error_of(client.post(f"/api/{name}"), 404)

    def test_not_json(self, client: TestClient) -> None:
        assert "JSON" in error_of(client.post(CHAT, content=b"{"), 400)
        assert "JSON" in error_of(client.post(CHAT), 400)


class TestModels:
    def test_tags(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm, served_model_name=["tale", "other/name"]))
        models = client.get("/api/tags").json()["models"]
        assert [model["name"] for model in models] == ["tale", "other/name"]
        model = models[0]
        assert model["digest"] == hashlib.sha256(b"demo_model").hexdigest()
        assert model["details"] == {
            "parent_model": "",
            "format": "safetensors",
            "family": "qwen3",
            "families": ["qwen3"],
            "parameter_size": "5.77M",
            "quantization_level": "BF16",
        }
        # What is not counted are norms and the file's header.
        checkpoint = DEMO_MODEL / "model.safetensors"
        assert model["size"] == pytest.approx(checkpoint.stat().st_size, rel=0.01)

    def test_adapters(self, client: TestClient, llm: FakeLLM) -> None:
        llm.loras["pirate"] = "/adapters/pirate"
        names = [model["name"] for model in client.get("/api/tags").json()["models"]]
        assert names == [MODEL, "pirate"]
        whole(client, CHAT, messages=HI, model="pirate:latest")
        whole(client, GENERATE, prompt="Hi", model="pirate", raw=True)
        whole(client, GENERATE, prompt="Hi")
        assert llm.adapted == ["pirate", "pirate", None]
        shown = client.post("/api/show", json={"model": "pirate"}).json()
        assert shown["details"]["parent_model"] == MODEL
        assert shown["modelfile"] == "FROM demo_model\nADAPTER pirate\n"

    def test_ps(self, client: TestClient, llm: FakeLLM) -> None:
        (model,) = client.get("/api/ps").json()["models"]
        assert model["name"] == model["model"] == MODEL
        assert model["context_length"] == llm.max_model_len
        assert datetime.fromisoformat(model["expires_at"].replace("Z", "+00:00")).year == 9999

    def test_show(self, client: TestClient, llm: FakeLLM) -> None:
        for key in ("model", "name"):
            shown = client.post("/api/show", json={key: MODEL, "verbose": True}).json()
            assert shown["model_info"]["general.architecture"] == "qwen3"
            assert shown["model_info"]["qwen3.context_length"] == llm.max_model_len
            assert "completion" in shown["capabilities"]
            assert "<|im_start|>" in shown["template"]
        assert "model" in error_of(client.post("/api/show", json={}), 400)

    def test_version(self, client: TestClient) -> None:
        assert set(client.get("/api/version").json()) == {"version"}

    def test_a_server_that_only_speaks(self, speech: FakeSpeech) -> None:
        client = TestClient(build_speech(speech))
        assert client.get("/api/tags").json() == {"models": []}
        assert client.get("/api/ps").json() == {"models": []}
        name = speech.model_id
        error_of(client.post(CHAT, json={"model": name, "messages": HI}), 400)
        error_of(client.post("/api/show", json={"model": name}), 400)
