"""What stands around every route: keys, limits, error bodies."""

import asyncio
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from nanovllm.config import ServerConfig
from nanovllm.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
)
from nanovllm.server.app import create_app
from nanovllm.server.auth import OPEN_PATHS, Authenticate
from nanovllm.server.errors import (
    MAX_MESSAGE_CHARS,
    APIError,
    in_words_of_client,
    to_api_error,
)
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.limits import MAX_BYTES_ARRIVING, MAX_URL_SIZE, RequestLimits
from nanovllm.server.protocol import BoundedProtocol
from tests.fake_llm import FakeLLM
from tests.fake_speech import FakeSpeech
from tests.server_client import HI, build_speech

KEY = "sk-one"
SAFE_HEADERS = {
    "cache-control",
    "x-accel-buffering",
    "x-content-type-options",
    "content-length",
    "content-type",
    "vary",
}
"""Every script may read them, or none needs to."""
Message = dict[str, Any]


class Item(BaseModel):
    """A body to be wrong about."""

    count: int = Field(ge=1, allow_inf_nan=False)
    name: str | list[int] = "x"
    inner: dict[str, Any] | None = None


probe = APIRouter(route_class=JSONRoute)


@probe.post("/probe")
async def take(item: Item) -> dict[str, int]:
    return {"count": item.count}


@probe.get("/broken/{secret}")
async def fail(secret: str) -> None:
    raise KeyError(f"{secret} at 0x7f0000000000")


def build(llm: FakeLLM | None = None, **options: Any) -> FastAPI:
    app = create_app(ServerConfig(**options), llm=llm or FakeLLM())  # type: ignore[arg-type]
    app.include_router(probe)
    return app


def test_an_error_that_several_wait_for_is_told_to_each_by_its_own_name() -> None:
    error = ContextLengthError("too long", "audio")
    for name in ("ref_audio", "wav_base64"):
        with pytest.raises(ContextLengthError) as caught, in_words_of_client({"audio": name}):
            raise error
        assert (caught.value.param, str(caught.value)) == (name, "too long")
    assert error.param == "audio"
    with pytest.raises(ContextLengthError) as caught, in_words_of_client({"text": "input"}):
        raise error
    assert caught.value is error


def client_of(**options: Any) -> TestClient:
    return TestClient(build(**options))


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which must have our body and nothing else."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def call(app: Any, scope: dict[str, Any], *received: Message) -> list[Message]:
    """Run an ASGI app by hand; a client that has sent everything stays silent."""
    sent: list[Message] = []
    messages = iter(received)

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def scope_of(path: str = "/", *headers: tuple[bytes, bytes], **more: Any) -> dict[str, Any]:
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    return scope | {"query_string": b"", "headers": list(headers)} | more


class TestKeys:
    def test_every_route_needs_one_but_for_the_open_ones(self) -> None:
        app = build(api_key=[KEY])
        client = TestClient(app)
        walked = set()
        for context in iter_route_contexts(app.routes):
            path = (context.path or "").replace("{", "").replace("}", "").replace(":path", "")
            for method in context.methods or {"GET"}:
                response = client.request(method, path)
                assert (response.status_code == 401) == (path not in OPEN_PATHS), path
                walked.add(path)
        assert {"/v1/models", "/v1/chat/completions", "/metrics", "/docs", "/openapi.json"} < walked
        assert {"/", "/health", "/ready"} <= walked & OPEN_PATHS
        pages = {path for path in OPEN_PATHS if path == "/" or Path(path).suffix}
        assert OPEN_PATHS - pages == {"/health", "/ready"}

    @pytest.mark.parametrize("path", ["/nothing", "/health/", "//health", "/health/../v1/models"])
    def test_what_is_not_listed_needs_one(self, path: str) -> None:
        error = error_of(client_of(api_key=[KEY]).request("GET", f"http://host{path}x"), 401)
        assert error["code"] == "invalid_api_key"

    @pytest.mark.parametrize("credentials", [f"Bearer {KEY}", "bearer sk-two", "BEARER  sk-two "])
    def test_any_of_the_keys_will_do(self, credentials: str) -> None:
        client = client_of(api_key=[KEY, "sk-two"])
        assert client.get("/version", headers={"Authorization": credentials}).status_code == 200

    @pytest.mark.parametrize(
        "credentials",
        [
            *(b"", b"Bearer", b"Bearer ", b"Bearer sk-on", b"Bearer sk-onee", b"Bearer SK-ONE"),
            *(b"Basic sk-one", b"sk-one", b"Bearer sk-one,sk-two", b"Bearer \xff\xfe", b"\x00"),
        ],
    )
    def test_nothing_else_will(self, credentials: bytes) -> None:
        scope = scope_of("/v1/models", (b"authorization", credentials))
        sent = call(Authenticate(build(), [KEY, "sk-two"]), scope)
        assert sent[0]["status"] == 401
        assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]

    def test_the_path_is_the_routers_whatever_the_host_says(self) -> None:
        for host in (b"x/health?", b"x/health#", b"[::1", b""):
            scope = scope_of("/v1/models", (b"host", host))
            assert call(Authenticate(build(), [KEY]), scope)[0]["status"] == 401

    def test_a_proxys_prefix_opens_and_closes_nothing(self) -> None:
        client = client_of(api_key=[KEY], root_path="/llm")
        assert client.get("/llm/health").status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/llm/version").status_code == 401
        assert client.get("/llm/llm/health").status_code == 401

    def test_a_websocket_is_closed(self) -> None:
        sent = call(Authenticate(build(), [KEY]), scope_of("/v1/x") | {"type": "websocket"})
        assert sent == [{"type": "websocket.close", "code": 1008}]

    def test_a_browser_may_ask_whether_it_may_call(self) -> None:
        client = client_of(api_key=[KEY], allowed_origins=["https://a.example"])
        asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        allowed = client.options("/v1/chat/completions", headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        asking["Origin"] = "https://b.example"
        assert client.options("/v1/chat/completions", headers=asking).status_code == 400
        without_key = client.get("/version", headers={"Origin": "https://a.example"})
        assert without_key.status_code == 401
        assert without_key.headers["access-control-allow-origin"] == "https://a.example"

    def test_a_browser_may_read_what_answers_say_of_themselves(self) -> None:
        llm = FakeLLM()
        app = build_speech(FakeSpeech(), llm, api_key=[KEY], allowed_origins=["https://a.example"])
        client = TestClient(app, headers={"Origin": "https://a.example"})
        key = {"Authorization": f"Bearer {KEY}"}
        answers = [client.get("/v1/models"), client.get("/v1/completions", headers=key)]
        for body in ({"messages": HI, "max_tokens": 1}, {"messages": HI, "stream": True}):
            for path in ("/v1/messages", "/v1/chat/completions"):
                answers.append(client.post(path, json={"max_tokens": 1, **body}, headers=key))
        answers.append(client.post("/v1/audio/speech", json={"input": "Hi."}, headers=key))
        for wire_format in ("raw", "pcm", "mp3"):
            body = {"target_text": "Hi.", "response_format": wire_format}
            answers.append(client.post("/generate", json=body, headers=key))
        llm.overloaded = True
        answers.append(client.post("/v1/completions", json={"prompt": "x"}, headers=key))
        assert {answer.status_code for answer in answers} == {200, 401, 405, 503}
        for answer in answers:
            readable = answer.headers["access-control-expose-headers"].lower().split(", ")
            special = {name for name in answer.headers if not name.startswith("access-control")}
            assert special - SAFE_HEADERS <= set(readable)

    def test_no_origin_may_by_default(self) -> None:
        response = client_of().get("/version", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers


class TestLimits:
    def test_a_body_may_be_this_large(self) -> None:
        client = client_of(max_body_size=100)
        body = json.dumps({"count": 1, "name": ""})
        headers = {"Content-Type": "application/json"}
        assert client.post("/probe", content=body.ljust(100), headers=headers).status_code == 200
        error = error_of(client.post("/probe", content=body.ljust(101), headers=headers), 413)
        assert error["code"] == "request_too_large"

    def test_a_body_of_unknown_length_neither(self) -> None:
        sent = call(
            RequestLimits(build(), ServerConfig(max_body_size=10), bool),
            scope_of("/probe"),
            {"type": "http.request", "body": b"x" * 6, "more_body": True},
            {"type": "http.request", "body": b"x" * 6, "more_body": True},
        )
        assert sent[0]["status"] == 413

    def test_the_length_alone_is_enough_to_refuse(self) -> None:
        for length, status in ((b"11", 413), (b"9" * 40, 413)):
            scope = scope_of("/probe", (b"content-length", length))
            assert call(RequestLimits(build(), ServerConfig(max_body_size=10), bool), scope)[0][
                "status"
            ] == (status)

    def test_a_client_that_is_too_slow(self) -> None:
        config = ServerConfig(request_timeout=0.05)
        part = {"type": "http.request", "body": b"{", "more_body": True}
        start = time.monotonic()
        sent = call(RequestLimits(build(), config, bool), scope_of("/probe"), part)
        assert time.monotonic() - start < 1
        assert sent[0]["status"] == 408
        assert (b"connection", b"close") in sent[0]["headers"]

    def test_a_client_that_leaves_is_not_answered(self) -> None:
        part = {"type": "http.request", "body": b"{", "more_body": True}
        limits = RequestLimits(build(), ServerConfig(), bool)
        assert call(limits, scope_of("/probe"), part, {"type": "http.disconnect"}) == []

    def test_of_all_that_arrives_at_once(self) -> None:
        size = MAX_BYTES_ARRIVING // 4
        limits = RequestLimits(build(max_body_size=size), ServerConfig(max_body_size=size), bool)
        large = {"type": "http.request", "body": b" " * size}
        small = {"type": "http.request", "body": b'{"count": 1}', "more_body": False}

        async def ask(*parts: Message, held: asyncio.Event | None = None) -> list[Message]:
            sent: list[Message] = []
            messages = iter(parts)

            async def receive() -> Message:
                if (message := next(messages, None)) is not None:
                    return message
                assert held is not None
                await held.wait()
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Message) -> None:
                sent.append(message)

            scope = scope_of("/probe", (b"content-type", b"application/json"))
            await limits(scope, receive, send)  # type: ignore[arg-type]
            return sent

        async def attack() -> None:
            held = asyncio.Event()
            unfinished = large | {"more_body": True}
            first = [asyncio.ensure_future(ask(unfinished, held=held)) for _ in range(4)]
            await asyncio.sleep(0.01)
            refused = await ask(unfinished)
            assert refused[0]["status"] == 503
            assert b"retry-after" in dict(refused[0]["headers"])
            assert json.loads(refused[1]["body"])["error"]["code"] == "overloaded"
            assert (await ask(small))[0]["status"] == 200
            held.set()
            # They were let in: what is wrong with them is said by the route.
            assert {(await answer)[0]["status"] for answer in first} == {400}
            assert (await ask(large, small))[0]["status"] != 503

        asyncio.run(attack())

    def test_headers(self) -> None:
        client = client_of(max_headers=20, max_header_size=1000)
        assert client.get("/health").status_code == 200
        many = error_of(client.get("/health", headers={f"x-{i}": "" for i in range(21)}), 431)
        large = error_of(client.get("/health", headers={"x": "y" * 1000}), 431)
        assert many["code"] == large["code"] == "headers_too_large"

    def test_a_body_is_not_compressed(self) -> None:
        body = gzip.compress(b'{"count": 1}')
        answer = client_of().post("/probe", content=body, headers={"Content-Encoding": "gzip"})
        error = error_of(answer, 415)
        assert error["code"] == "unsupported_media_type"
        assert "'gzip'" in error["message"]
        plain = client_of().post(
            "/probe", json={"count": 1}, headers={"Content-Encoding": "Identity"}
        )
        assert plain.status_code == 200

    def test_urls(self) -> None:
        error = error_of(client_of().get(f"/health?{'x' * MAX_URL_SIZE}"), 414)
        assert error["code"] == "url_too_long"


class TestConnections:
    def test_there_may_be_so_many(self) -> None:
        class Bounded(BoundedProtocol):
            max_connections = 2

        async def ask_thrice() -> list[bytes]:
            config = uvicorn.Config(build(), port=0, http=Bounded, lifespan="off", log_config=None)
            config.load()
            state = uvicorn.server.ServerState()
            loop = asyncio.get_running_loop()
            listening = await loop.create_server(
                lambda: Bounded(config, state, {}, loop), "127.0.0.1", 0
            )
            port = listening.sockets[0].getsockname()[1]
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            answers = []
            for reader, writer in opened:
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answers.append(await reader.readuntil(b"\r\n"))
            for _, writer in opened:
                writer.close()
            listening.close()
            return answers

        first, second, third = asyncio.run(ask_thrice())
        assert first == second == b"HTTP/1.1 200 OK\r\n"
        assert third == b"HTTP/1.1 503 Service Unavailable\r\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("raised", "status", "kind", "code"),
        [
            (InvalidRequestError("no", "n"), 400, "invalid_request_error", None),
            (
                ContextLengthError("long"),
                *(400, "invalid_request_error", "context_length_exceeded"),
            ),
            (OverloadedError("full"), 503, "service_unavailable_error", "overloaded"),
            (NotReadyError("wait"), 503, "service_unavailable_error", "not_ready"),
            (EngineDeadError("died"), 503, "service_unavailable_error", "engine_died"),
            (RuntimeError("/home/me/key"), 500, "internal_error", None),
            (ValueError("/home/me/key"), 500, "internal_error", None),
            (APIError(418, "tea", "teapot"), 418, "teapot", None),
        ],
    )
    def test_of_ours_have_a_status(
        self, raised: Exception, status: int, kind: str, code: str | None
    ) -> None:
        error = to_api_error(raised)
        assert (error.status_code, error.type, error.code) == (status, kind, code)
        assert "/home" not in error.message
        assert (error.headers or {}).get("Retry-After") == ("1" if status == 503 else None)

    def test_retry_after_is_whole_seconds_and_not_too_few(self) -> None:
        assert to_api_error(OverloadedError("full", 2.1)).headers == {"Retry-After": "3"}

    def test_a_long_message_is_cut_and_a_strange_one_survives(self) -> None:
        response = APIError(400, "\ud800" + "x" * 10**6).response()
        assert len(json.loads(bytes(response.body))["error"]["message"]) == MAX_MESSAGE_CHARS

    @pytest.mark.parametrize(
        "body",
        [
            *(b"{", b"", b"nul", b'{"count": 1', b'{"count": 1}}', b"\x00", b"'count'"),
            *(b"\xff\xfe", b'{"count": "\xff"}', b'{"count": 01}'),
            *(b'{"count": NaN}', b'{"count": Infinity}', b'{"count": -Infinity}'),
            *(b'{"count": 1e999}', b'{"count": 1, "inner": {"a": NaN}}'),
            *(b"[" * 100_000, b'{"a":' * 100_000, b'{"count": ' + b"9" * 5000 + b"}"),
            *(b'{"count": 1, "a": "\\ud800"}', b'{"count": 1, "name": "\\ud800x"}'),
        ],
        ids=lambda body: repr(body[:20]),
    )
    def test_a_body_that_is_not_json(self, body: bytes) -> None:
        client = client_of()
        headers = {"Content-Type": "application/json"}
        error = error_of(client.post("/probe", content=body, headers=headers), 400)
        assert error["type"] == "invalid_request_error"

    def test_a_body_that_does_not_say_what_it_is(self) -> None:
        client = client_of()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/xml"):
            response = client.post("/probe", content='{"count": 1}', headers={"Content-Type": kind})
            assert "application/json" in error_of(response, 400)["message"]
        assert client.post("/probe", content=b"").status_code == 400

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (b"", "needs a body"),
            (b"[1]", "must be a JSON object"),
            (b'{"count": "\\ud800"}', "half a surrogate pair"),
            (b'{"count": "a', "truncated"),
        ],
    )
    def test_a_wrong_body_is_told_what_it_should_be(self, body: bytes, says: str) -> None:
        headers = {"Content-Type": "application/json"}
        response = client_of().post("/probe", content=body, headers=headers)
        assert says in error_of(response, 400)["message"]

    @pytest.mark.parametrize(
        ("body", "param", "says"),
        [
            ({}, "count", "Field required"),
            ({"count": 0}, "count", "greater than or equal to 1"),
            ({"count": "a"}, "count", "valid integer"),
            ({"count": 10**40}, None, None),
            ({"count": 1, "name": 1.5}, "name", "valid string"),
            ({"count": 1, "name": [1, "a"]}, "name.1", "valid integer"),
            ({"count": 1, "inner": []}, "inner", "valid dictionary"),
            ([], None, "object"),
            (None, None, None),
        ],
    )
    def test_a_wrong_field_is_named(self, body: Any, param: str | None, says: str | None) -> None:
        response = client_of().post("/probe", json=body)
        if body == {"count": 10**40}:
            assert response.status_code == 200
            return
        error = error_of(response, 400)
        assert error["param"] == param
        assert (says or "") in error["message"]
        assert "[type=" not in error["message"]

    def test_no_such_path_or_method(self) -> None:
        client = client_of()
        assert error_of(client.get("/v2"), 404)["code"] == "not_found"
        assert error_of(client.get("/health/"), 404)
        response = client.delete("/probe")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == client.head("/probe").headers["allow"] == "POST"
        assert client.put("/loras").headers["allow"] == "GET, HEAD, POST"

    @pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/api/tags"])
    def test_head_is_answered_as_get_without_the_body(self, path: str) -> None:
        client = client_of()
        answer, full = client.head(path), client.get(path)
        assert answer.status_code == full.status_code == 200
        assert answer.headers["content-type"] == full.headers["content-type"]
        assert full.content
        assert not answer.content

    @pytest.mark.parametrize("path", ["http://x/version", "HTTPS://u@x:80/version"])
    def test_a_target_may_have_scheme_and_host(self, path: str) -> None:
        nothing = {"type": "http.request", "body": b""}
        start, *_ = call(build(), scope_of(path, method="GET"), nothing)
        assert start["status"] == 200
        start, *_ = call(build(api_key=[KEY]), scope_of(path, method="GET"), nothing)
        assert start["status"] == 401

    def test_an_exception_nobody_handles(self, caplog: pytest.LogCaptureFixture) -> None:
        response = client_of().get("/broken/hunter2")
        error = error_of(response, 500)
        assert error["type"] == "internal_error"
        assert not {"hunter2", "KeyError", "0x", "Traceback"} & set(response.text.split())
        (record,) = (r for r in caplog.records if r.name == "nanovllm.server.edge")
        assert record.exc_info is not None

    def test_every_answer_is_of_the_type_it_says(self) -> None:
        client = client_of()
        for path in ("/health", "/v2", "/broken/x", "/openapi.json", "/"):
            assert client.get(path).headers.get_list("x-content-type-options") == ["nosniff"]

    def test_every_route_documents_its_errors_and_its_key(self) -> None:
        app = create_app(ServerConfig(api_key=[KEY]), llm=FakeLLM())  # type: ignore[arg-type]
        for path, methods in app.openapi()["paths"].items():
            for operation in methods.values():
                documented = set(operation["responses"])
                assert {"400", "401", "405", "413", "431", "500", "503"} <= documented, path
                assert "422" not in documented, path
                assert ("security" in operation) == (path not in OPEN_PATHS), path
