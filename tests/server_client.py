"""Requests to a server in this process, and what comes of them."""

import asyncio
import base64
import gc
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanovllm.audio.containers import encode_audio
from nanovllm.config import ServerConfig, SpeechConfig
from nanovllm.server.app import create_app
from tests.fake_llm import FakeLLM
from tests.fake_speech import FakeSpeech

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


def build(llm: FakeLLM, **options: Any) -> FastAPI:
    return create_app(ServerConfig(**options), llm=llm)  # type: ignore[arg-type]


def build_speech(
    speech: FakeSpeech,
    llm: FakeLLM | None = None,
    options: SpeechConfig | None = None,
    **server: Any,
) -> FastAPI:
    """A server that speaks, and with a text model writes, too."""
    config, models = ServerConfig(**server), {"llm": llm, "speaker": speech}
    return create_app(config, speech=options or SpeechConfig(), **models)  # type: ignore[arg-type]


def recording(seconds: float = 0.5, rate: int = 16000) -> bytes:
    """A WAV of a tone."""
    times = np.arange(int(seconds * rate)) / rate
    return encode_audio("wav", rate, (0.5 * np.sin(2764 * times)).astype(np.float32))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def post(client: TestClient, path: str, **body: Any) -> Any:
    """A success's body."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    """A bad request's error."""
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text[:300]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def events_of(text: str) -> list[Any]:
    """The objects of a stream, without the end that they must have."""
    lines = [line for line in text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def stream(client: TestClient, path: str, **body: Any) -> list[Any]:
    response = client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


async def call(
    app: FastAPI,
    path: str,
    body: dict[str, Any],
    leave_when: Callable[[bytes], bool] | None = None,
    request_id: str | None = None,
) -> tuple[int, bytes]:
    """Send a request straight to the application, and maybe leave before the answer is whole."""
    gone = asyncio.Event()
    status, answer, sent = 0, b"", False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")
        if leave_when is not None and leave_when(answer):
            gone.set()

    async def leave_early() -> None:
        await asyncio.sleep(0.05)
        if leave_when is not None and leave_when(b""):
            gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"host", b"test"),
            *([(b"x-request-id", request_id.encode())] if request_id else []),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    leaving = asyncio.ensure_future(leave_early())
    await asyncio.wait_for(app(scope, receive, send), 10)
    leaving.cancel()
    return status, answer


def kept_while_streaming(
    app: FastAPI, path: str, body: dict[str, Any], more: dict[str, Any]
) -> int:
    """Bytes that a request with some more in it takes while the first of its answer is sent."""
    kept: list[int] = []

    def note(sent: bytes) -> bool:
        if sent and not kept:
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])
        return False

    asyncio.run(call(app, path, body, leave_when=note))  # what is made once and stays
    kept.clear()
    tracemalloc.start()
    try:
        asyncio.run(call(app, path, body | more, leave_when=note))
    finally:
        tracemalloc.stop()
    return kept[0]
