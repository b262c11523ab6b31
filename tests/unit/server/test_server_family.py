"""`POST /generate`, in the dialects of the engines that this one descends from."""

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.fake_llm import FakeLLM
from tests.server_client import build, call

LINES = [{"text_delta": " upon"}, {"text_delta": " a"}, {"text_delta": " time"}, {"event": "done"}]


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({}, 512),
        ({"stream": True}, 512),
        ({"max_new_tokens": 9, "mode": "sglang"}, 9),
        ({"max_tokens": 7, "stream": True}, 7),
    ],
)
def test_json_lines(client: TestClient, llm: FakeLLM, body: Any, max_tokens: int) -> None:
    response = client.post("/generate", json={"prompt": "Once", **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [json.loads(line) for line in response.text.splitlines()] == LINES
    assert llm.submitted[0][0].params.max_tokens == max_tokens


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": 9}, {"temperature": 1.0, "top_p": 0.9}, {"stop": "x"}, {"stream": False}],
)
def test_a_text_at_once(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/generate", json={"prompt": "Once", **body})
    assert response.json() == {"generated_text": " upon a time"}


def test_what_is_asked_for_reaches_the_engine(client: TestClient, llm: FakeLLM) -> None:
    body = {"temperature": 0.0, "top_p": 0.5, "stop": ["x"], "repetition_penalty": 1.5}
    client.post("/generate", json={"prompt": "Once", **body})
    params = llm.submitted[0][0].params
    assert (params.temperature, params.top_p, params.stop) == (0.0, 0.5, ["x"])
    assert (params.repetition_penalty, params.max_tokens) == (1.5, 128)


def test_events() -> None:
    llm = FakeLLM(reply="one\n\ntwo")
    client = TestClient(build(llm))
    body = {"prompt": "Once", "max_tokens": len(llm.reply_ids), "ignore_eos": True}
    text = client.post("/generate", json=body).text
    events = [
        "\n".join(line.removeprefix("data: ") for line in event.split("\n"))
        for event in text.removesuffix("\n\n").split("\n\n")
    ]
    assert "".join(events) == "one\n\ntwo[DONE]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "max_tokens": 300}, "max_tokens"),
        ({"prompt": "a", "mode": "vllm"}, "mode"),
        ({"target_text": "Hello"}, "target_text"),
    ],
)
def test_errors_have_a_detail(client: TestClient, body: dict[str, Any], param: str) -> None:
    response = client.post("/generate", json=body)
    assert response.status_code == 400
    answer = response.json()
    assert answer["error"]["param"] == param
    assert answer["detail"] == answer["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"max_tokens": 5}, {"ignore_eos": True}])
def test_engines_that_die(client: TestClient, llm: FakeLLM, body: dict[str, Any]) -> None:
    llm.fail_after = 0
    response = client.post("/generate", json={"prompt": "Once", **body})
    assert response.status_code == 503
    assert response.json()["detail"] == "the engine died: try again"
    assert llm.num_open == 0


def test_errors_in_the_middle(client: TestClient, llm: FakeLLM) -> None:
    llm.fail_after = 1
    text = client.post("/generate", json={"prompt": "Once"}).text
    last = json.loads(text.splitlines()[-1])
    assert (last["event"], last["error"]["code"]) == ("error", "engine_died")
    text = client.post("/generate", json={"prompt": "Once", "ignore_eos": True}).text
    assert '"engine_died"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_info_tells_what_is_served(client: TestClient, llm: FakeLLM) -> None:
    info = client.get("/info").json()
    assert info["model"]["served_model_names"] == ["demo_model"]
    assert info["model"]["max_model_len"] == llm.max_model_len
    assert info["model"]["kind"] == "text"
    assert info["speech"] is info["mp3"] is None
    assert info["lora"]["enabled"] is False
    assert info["lora"]["registered_names"] == info["lora"]["loaded"] == []


@pytest.mark.parametrize("more", [{}, {"max_tokens": 50}, {"ignore_eos": True}])
def test_request_ids(app: FastAPI, llm: FakeLLM, more: dict[str, Any]) -> None:
    body = {"prompt": "a", **more}
    response = TestClient(app).post("/generate", json=body, headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    llm.delay = 0.01
    llm.reply_ids = [686] * 200

    async def run() -> tuple[bytes, bytes]:
        answer = asyncio.ensure_future(call(app, "/generate", body, request_id="mine"))
        while not llm.num_open:
            await asyncio.sleep(0.01)
        _, aborted = await call(app, "/abort", {"request_id": "mine"})
        return (await answer)[1], aborted

    answer, aborted = asyncio.run(run())
    assert answer.count(b" upon") < 50
    assert json.loads(aborted)["aborted"]
    assert llm.num_open == 0
