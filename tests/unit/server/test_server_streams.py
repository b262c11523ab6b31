"""How answers end: failures, clients that leave, aborts; and how long silence may last."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from nanovllm.batch import UNUSABLE_LOGITS
from nanovllm.errors import EngineDeadError
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.server.errors import INTERNAL_ERROR
from nanovllm.server.generation import Cursor
from nanovllm.server.streaming import EventStream
from tests.fake_llm import FakeLLM
from tests.server_client import (
    CHAT,
    HI,
    TEXT,
    build,
    call,
    events_of,
    kept_while_streaming,
    post,
    stream,
)


class TestFailures:
    def test_an_error_before_the_first_token_is_a_status(
        self, client: TestClient, llm: FakeLLM
    ) -> None:
        llm.fail_after = 0
        for streams in (False, True):
            response = client.post(TEXT, json={"prompt": "Once", "stream": streams})
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "engine_died"

    def test_an_error_after_it_is_an_event(self, client: TestClient, llm: FakeLLM) -> None:
        llm.fail_after = 2
        *chunks, last = stream(client, TEXT, prompt="Once")
        assert "".join(c["choices"][0]["text"] for c in chunks) == " upon a"
        assert last["error"]["code"] == "engine_died"
        assert client.post(TEXT, json={"prompt": "Once"}).status_code == 503
        assert llm.num_open == 0

    def test_a_completion_that_cannot_be_computed(self, client: TestClient, llm: FakeLLM) -> None:
        llm.failure, llm.fail_after = UNUSABLE_LOGITS, 0
        for streams in (False, True):
            response = client.post(CHAT, json={"messages": HI, "stream": streams})
            assert response.status_code == 500
            assert response.json()["error"]["message"] == UNUSABLE_LOGITS
        llm.fail_after = 1
        assert stream(client, CHAT, messages=HI)[-1]["error"]["type"] == "internal_error"

    def test_nor_is_an_engines_exception_told(
        self, client: TestClient, llm: FakeLLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        llm.failure, llm.fail_after = "RuntimeError: CUDA error at 0x7f00, /home/secret", 0
        whole = client.post(CHAT, json={"messages": HI})
        assert whole.status_code == 500
        llm.fail_after = 1
        for error in (whole.json()["error"], stream(client, TEXT, prompt="Once")[-1]["error"]):
            assert error["message"] == INTERNAL_ERROR
            assert error["type"] == "internal_error"
        assert "/home/secret" in caplog.text

    def test_internals_stay_inside(self, client: TestClient, llm: FakeLLM) -> None:
        llm.failure, llm.fail_after = KeyError("/root/secret"), 1
        last = stream(client, CHAT, messages=HI)[-1]
        assert last["error"]["type"] == "internal_error"
        assert "secret" not in json.dumps(last)

    def test_a_full_queue(self, client: TestClient, llm: FakeLLM) -> None:
        llm.overloaded = True
        response = client.post(CHAT, json={"messages": HI, "stream": True})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"

    @pytest.mark.parametrize(("path", "body"), [(TEXT, {"prompt": "a"}), (CHAT, {"messages": HI})])
    def test_an_unknown_model(self, client: TestClient, path: str, body: dict[str, Any]) -> None:
        response = client.post(path, json={"model": "gpt-4", **body})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        post(client, path, model="demo_model", **body)
        post(client, path, model="", **body)


class TestRequestIds:
    def test_header_and_field(self, client: TestClient) -> None:
        response = client.post(TEXT, json={"prompt": "a"}, headers={"X-Request-Id": "mine"})
        assert response.json()["id"] == "cmpl-mine"
        assert response.headers["x-request-id"] == "mine"
        response = client.post(CHAT, json={"messages": HI, "request_id": "r", "stream": True})
        assert events_of(response.text)[0]["id"] == "chatcmpl-r"
        assert response.headers["x-request-id"] == "r"

    def test_ids_that_cannot_be_sent_back(self, client: TestClient) -> None:
        response = client.post(TEXT, json={"prompt": "a"}, headers={"X-Request-Id": "x" * 257})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "request_id"

    def test_errors_have_them_too(self, client: TestClient) -> None:
        for path, body in ((TEXT, {}), (CHAT, {"messages": HI, "n": 0}), ("/generate", {})):
            for name, known in (("mine", "mine"), ("not this", None)):
                response = client.post(path, json=body, headers={"X-Request-Id": name})
                assert response.status_code == 400
                assert response.headers.get("x-request-id") == known

    @pytest.mark.parametrize("name", ["mine", "cmpl-mine"])
    def test_abort(self, app: FastAPI, llm: FakeLLM, name: str) -> None:
        llm.delay = 0.01
        llm.reply_ids = [686] * 200
        body = {"prompt": ["a", "b"], "n": 2, "request_id": "mine"}

        async def run() -> tuple[Any, Any, Any]:
            answer = asyncio.ensure_future(call(app, TEXT, body))
            while llm.num_open < 2:
                await asyncio.sleep(0.01)
            aborted = await call(app, "/abort", {"request_id": name})
            return await answer, aborted, await call(app, "/abort", {"request_id": name})

        (status, text), (_, first), (_, second) = asyncio.run(run())
        assert status == 200
        reasons = [choice["finish_reason"] for choice in json.loads(text)["choices"]]
        assert reasons == ["abort"] * 4
        assert json.loads(first)["aborted"]
        assert not json.loads(second)["aborted"]


class TestClientsThatLeave:
    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
    def test_before_the_first_token(
        self, app: FastAPI, llm: FakeLLM, prompt: Any, streams: bool
    ) -> None:
        llm.delay = 60

        async def run() -> None:
            body = {"prompt": prompt, "stream": streams}
            await call(app, TEXT, body, leave_when=lambda answer: not answer)
            assert llm.submitted
            assert llm.num_open == 0

        asyncio.run(run())

    def test_in_the_middle_of_a_stream(self, app: FastAPI, llm: FakeLLM) -> None:
        llm.delay = 0.001
        llm.reply_ids = [686] * 200

        async def run() -> None:
            body = {"messages": HI, "stream": True, "n": 2}
            _, answer = await call(app, CHAT, body, lambda answer: answer.count(b"data:") > 9)
            assert b"[DONE]" not in answer
            assert llm.num_open == 0

        asyncio.run(run())

    def test_just_before_the_first_event_is_sent(self) -> None:
        closed = []

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                yield b"one"
                yield b"two"
            finally:
                closed.append(True)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await asyncio.sleep(0)

        async def run() -> None:
            pieces = events()
            first = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0.01)
            stream = EventStream(first, pieces, lambda error: b"", None)
            await stream({"type": "http"}, receive, send)
            assert closed

        asyncio.run(run())


class TestKeepAlive:
    def test_comments_fill_the_silence(self, llm: FakeLLM) -> None:
        llm.delay = 0.07
        app = build(llm, sse_keep_alive_interval=0.05)
        _, answer = asyncio.run(call(app, CHAT, {"messages": HI, "stream": True}))
        assert answer.startswith(b": keep-alive\n\n")
        assert answer.count(b": keep-alive\n\n") >= 4
        assert answer.endswith(b"data: [DONE]\n\n")
        chunks = events_of(answer.decode())
        texts = [c["choices"][0]["delta"].get("content", "") for c in chunks]
        assert "".join(texts) == " upon a time"

    def test_errors_behind_a_comment_are_events(self, llm: FakeLLM) -> None:
        llm.delay, llm.fail_after = 0.1, 0
        llm.failure = EngineDeadError("it died")
        app = build(llm, sse_keep_alive_interval=0.05)
        status, answer = asyncio.run(call(app, CHAT, {"messages": HI, "stream": True}))
        assert status == 200
        assert events_of(answer.decode())[-1]["error"]["code"] == "engine_died"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "Once"}),
        (CHAT, {"messages": HI}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 9}),
        ("/api/chat", {"messages": HI}),
        ("/api/generate", {"prompt": "Hi", "model": "demo_model"}),
    ],
)
def test_what_has_no_effect_is_forgotten(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    """A stream may take long, and there may be many: none keeps the body of its request."""
    padding = {"padding": [*range(1 << 18)]}
    body = {"stream": True, "model": "demo_model", **body}
    assert kept_while_streaming(app, path, body, padding) < 1 << 20


def test_log_probabilities_that_were_taken_are_not_kept() -> None:
    completion = CompletionOutput(0, logprobs=[])
    output = RequestOutput("x", None, [1], [completion], RequestMetrics(0.0))
    cursor = Cursor(output, completion, 0, by_token=True)
    seen = []
    for step in range(6):
        for token_id in range(2 * step, 2 * step + 1 + step % 2):
            completion.token_ids.append(token_id)
            completion.logprobs.append({token_id: Logprob(-1.0)})  # type: ignore[union-attr]
        piece = cursor.take()
        assert piece is not None
        assert piece.logprobs is not None
        assert [list(position) for position in piece.logprobs] == [[i] for i in piece.token_ids]
        assert completion.logprobs == []
        seen += piece.token_ids
    assert cursor.take() is None
    assert seen == completion.token_ids


@pytest.mark.parametrize("streams", [False, True])
def test_log_probabilities_of_several_completions_and_an_echo(
    client: TestClient, llm: FakeLLM, streams: bool
) -> None:
    body = {"prompt": ["Once", "The"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 3}
    if streams:
        choices = [chunk["choices"][0] for chunk in stream(client, TEXT, **body)]
    else:
        choices = post(client, TEXT, **body)["choices"]
    for index in range(4):
        pieces = [c["logprobs"] for c in choices if c["index"] == index and c["logprobs"]]
        tokens = [token for piece in pieces for token in piece["tokens"]]
        values = [value for piece in pieces for value in piece["token_logprobs"]]
        num_prompt = len(llm.submitted[index // 2][0].token_ids)
        assert len(tokens) == len(values) == num_prompt + 3
        assert values[0] is None
        assert None not in values[1:]
