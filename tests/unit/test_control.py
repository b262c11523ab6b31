"""The control socket: its commands, its errors, and that nothing a client sends ends it."""

import asyncio
import json
import random
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from nanovllm.cli import main
from nanovllm.cluster.control import (
    MAX_MESSAGE_SIZE,
    MAX_PENDING,
    ControlServer,
    send_control_request,
)
from nanovllm.cluster.stats import PoolStats, WorkerStats
from nanovllm.config import EngineConfig, PoolConfig, ServerConfig, SpeechConfig
from nanovllm.engine.llm_engine import EngineStats
from nanovllm.errors import EngineDeadError, InvalidRequestError
from nanovllm.server.app import create_app
from nanovllm.server.control import ControlledServer
from nanovllm.server.state import ServerState

METRICS = {"scheduler": "cache_aware", "inflight_per_engine": [3, 0], "avg_latency_s": 1.5}
STATS = PoolStats(
    dispatch_policy="cache_aware",
    workers=[
        WorkerStats(0, "ready", 4711, 0, 3, 3, 900, EngineStats()),
        WorkerStats(1, "starting", None, 2, 0, 0, 0, EngineStats()),
    ],
    num_inflight=4,
    num_open_sequences=4,
    avg_latency_s=1.5,
    avg_throughput_tok_s=20.0,
)


class FakeLLM:
    """Stands in for `AsyncLLM`."""

    def __init__(self) -> None:
        self.is_ready = True
        self.max_model_len = 1000
        self.warmed: list[str | list[int]] = []
        self.warm_error: Exception | None = None
        self.warm_blocks = asyncio.Event()
        self.warm_blocks.set()
        self.num_inflight = 4

    def stats(self) -> PoolStats:
        return replace(STATS, num_inflight=self.num_inflight)

    async def warm(self, prompt: str | list[int]) -> int:
        await self.warm_blocks.wait()
        if self.warm_error is not None:
            raise self.warm_error
        self.warmed.append(prompt)
        return len(prompt)

    async def drain(self, timeout: float | None = None) -> bool:
        assert timeout == 0  # the socket never waits for other people's requests
        self.is_ready = False
        self.num_inflight = max(0, self.num_inflight - 2)
        return self.num_inflight == 0


@asynccontextmanager
async def serving(
    llm: FakeLLM, endpoint: str = "tcp://127.0.0.1:0"
) -> AsyncIterator[ControlServer]:
    server = ControlServer(endpoint, llm, METRICS.copy)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def talk(scenario: Callable[[FakeLLM, ControlServer], Awaitable[None]], **options: str) -> None:
    """Run a scenario beside a server."""

    async def run() -> None:
        llm = FakeLLM()
        async with serving(llm, **options) as server:
            await asyncio.wait_for(scenario(llm, server), 20)

    asyncio.run(run())


async def ask(server: ControlServer, **payload: Any) -> dict[str, Any]:
    return await asyncio.to_thread(send_control_request, server.endpoint, payload, 5.0)


async def ask_raw(server: ControlServer, request: bytes) -> Any:
    """What a plain REQ socket gets for these bytes."""

    def exchange() -> Any:
        with zmq.Context() as context, context.socket(zmq.REQ) as client:
            client.setsockopt(zmq.LINGER, 0)
            client.connect(server.endpoint)
            client.send(request)
            return json.loads(client.recv()) if client.poll(5000) else None

    return await asyncio.to_thread(exchange)


def test_metrics_are_the_servers_own() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        assert await ask(server, cmd="metrics") == METRICS

    talk(scenario)


def test_health_tells_of_each_engine() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        health = await ask(server, cmd="health")
        assert health["status"] == "ready"
        assert health["num_inflight"] == 4
        assert health["workers"][1] == {
            "index": 1,
            "state": "starting",
            "pid": None,
            "num_restarts": 2,
            "num_inflight": 0,
        }
        llm.is_ready = False
        assert (await ask(server, cmd="health"))["status"] == "not_ready"

    talk(scenario)


def test_warm_takes_a_text_or_a_number_of_tokens() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        assert await ask(server, cmd="warm", prompt="Once upon") == {"num_tokens": 9}
        assert await ask(server, cmd="warm", tokens=999) == {"num_tokens": 999}
        assert llm.warmed == ["Once upon", [0] * 999]

    talk(scenario)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "a", "tokens": 3},
        {"tokens": 0},
        {"tokens": -1},
        {"tokens": 1000},
        {"tokens": 10**30},
        {"tokens": "many"},
        {"prompt": ["a"]},
    ],
)
def test_warm_refuses_what_makes_no_sense(options: dict[str, Any]) -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        answer = await ask(server, cmd="warm", **options)
        assert answer["error"] == "invalid_request"
        assert answer["message"]
        assert not llm.warmed

    talk(scenario)


def test_drain_answers_at_once() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        assert await ask(server, cmd="drain") == {"drained": False, "num_inflight": 2}
        assert await ask(server, cmd="drain") == {"drained": True, "num_inflight": 0}

    talk(scenario)


@pytest.mark.parametrize(
    ("request_bytes", "error"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"metrics", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"cmd": "metr\xffics"}', "invalid_json"),
        (b'{"cmd": "metrics"} x', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"cmd": ' + b"[" * 100_000, "invalid_json"),
        (b"{}", "unknown_command"),
        (b'{"cmd": "shutdown"}', "unknown_command"),
        (b'{"cmd": null}', "unknown_command"),
        (b'{"cmd": ["metrics"]}', "unknown_command"),
        (b"5", "invalid_request"),
        (b"[]", "invalid_request"),
    ],
)
def test_what_is_no_command_is_refused(request_bytes: bytes, error: str) -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        assert (await ask_raw(server, request_bytes))["error"] == error
        assert (await ask(server, cmd="health"))["status"] == "ready"

    talk(scenario)


def test_a_command_that_fails_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        llm.warm_error = EngineDeadError("the engine died")
        answer = await ask(server, cmd="warm", tokens=1)
        assert answer == {"error": "engine_died", "message": "the engine died"}
        llm.warm_error = ZeroDivisionError("secret")
        assert await ask(server, cmd="warm", tokens=1) == {"error": "internal_error"}
        assert (await ask(server, cmd="health"))["status"] == "ready"

    talk(scenario)
    assert "secret" in caplog.text


@pytest.mark.parametrize(("loaded", "error"), [(False, "not_ready"), (True, "invalid_request")])
def test_nothing_is_warmed_while_the_models_are_loaded(loaded: bool, error: str) -> None:
    async def run() -> None:
        app = create_app(ServerConfig(), EngineConfig(), PoolConfig(), SpeechConfig())
        state: ServerState = app.state.server
        state.loaded = loaded
        server = ControlServer("tcp://127.0.0.1:0", ControlledServer(state), METRICS.copy)
        await server.start()
        try:
            for options in ({"prompt": "Once"}, {"tokens": 3}):
                assert (await ask(server, cmd="warm", **options))["error"] == error
            assert (await ask(server, cmd="health"))["status"] == (
                "ready" if loaded else "not_ready"
            )
        finally:
            await server.stop()

    asyncio.run(run())


def test_a_slow_command_does_not_hold_up_others() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        llm.warm_blocks.clear()
        slow = asyncio.create_task(ask(server, cmd="warm", tokens=1))
        while not server._pending:
            await asyncio.sleep(0.01)
        assert (await ask(server, cmd="health"))["status"] == "ready"
        assert not slow.done()
        llm.warm_blocks.set()
        assert await slow == {"num_tokens": 1}

    talk(scenario)


def test_commands_that_run_are_bounded() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        llm.warm_blocks.clear()
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.connect(server.endpoint)
            for _ in range(MAX_PENDING + 8):
                client.send_multipart([b"", b'{"cmd": "warm", "tokens": 1}'])
            while len(server._pending) < MAX_PENDING:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(server._pending) == MAX_PENDING
            llm.warm_blocks.set()
            for _ in range(MAX_PENDING + 8):
                _, answer = await asyncio.to_thread(client.recv_multipart)
                assert json.loads(answer) == {"num_tokens": 1}

    talk(scenario)


def test_clients_that_leave_are_forgotten() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        llm.warm_blocks.clear()
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(
                    send_control_request, server.endpoint, {"cmd": "warm", "tokens": 1}, 0.05
                )
        llm.warm_blocks.set()
        assert (await ask(server, cmd="health"))["status"] == "ready"
        assert not server._pending

    talk(scenario)


def test_random_bytes_at_the_port_do_no_harm() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        host, _, port = server.endpoint.removeprefix("tcp://").rpartition(":")
        draws = random.Random(0)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)

        def throw() -> None:
            for attempt in range(100):
                with socket.create_connection((host, int(port)), timeout=5) as raw:
                    start = [b"", greeting[: draws.randrange(65)], greeting][attempt % 3]
                    try:
                        raw.sendall(start + draws.randbytes(draws.randrange(1, 4000)))
                    except OSError:  # thrown out already
                        continue

        await asyncio.to_thread(throw)
        assert (await ask(server, cmd="health"))["status"] == "ready"

    talk(scenario)


def test_a_message_that_is_too_large_is_cut_off() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        def send() -> bool:
            with zmq.Context() as context, context.socket(zmq.DEALER) as client:
                client.setsockopt(zmq.LINGER, 0)
                client.connect(server.endpoint)
                client.send_multipart([b"", b" " * (MAX_MESSAGE_SIZE + 1)])
                return bool(client.poll(500))

        assert not await asyncio.to_thread(send)
        assert (await ask(server, cmd="health"))["status"] == "ready"

    talk(scenario)


def test_a_unix_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "control"

    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await ask(server, cmd="health"))["status"] == "ready"

    talk(scenario, endpoint=f"ipc://{path}")


def test_localhost_is_this_machine() -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        assert server.endpoint.startswith("tcp://127.0.0.1:")
        assert (await ask(server, cmd="health"))["status"] == "ready"

    talk(scenario, endpoint="tcp://localhost:0")


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:5557",
        "tcp://*:5557",
        "tcp://192.168.0.1:5557",
        "tcp://127.0.0.1.example.com:5557",
        "tcp://eth0:5557",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "127.0.0.1:5557",
        "ws://127.0.0.1:5557",
        "ipc://",
        "",
    ],
)
def test_it_listens_on_this_machine_only(endpoint: str) -> None:
    with pytest.raises(InvalidRequestError, match="this machine only") as error:
        ControlServer(endpoint, FakeLLM(), METRICS.copy)
    assert error.value.param == "zmq_control_endpoint"


def test_an_endpoint_in_use_is_an_error(tmp_path: Path) -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        for endpoint in (server.endpoint, f"ipc://{tmp_path}/missing/control"):
            second = ControlServer(endpoint, llm, METRICS.copy)
            with pytest.raises(InvalidRequestError, match="cannot listen on"):
                await second.start()
            await second.stop()

    talk(scenario)


def test_nobody_there_is_told_soon(unused_tcp_port: int) -> None:
    with pytest.raises(TimeoutError, match="nobody listens on"):
        send_control_request(f"tcp://127.0.0.1:{unused_tcp_port}", {"cmd": "metrics"}, 0.3)


@pytest.mark.parametrize("endpoint", ["bogus", "", "ipc://", "tcp://127.0.0.1", "udp://a:1"])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is no endpoint \(.+\): use tcp://") as error:
        send_control_request(endpoint, {"cmd": "metrics"})
    assert error.value.param == "endpoint"


@pytest.fixture
def unused_tcp_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def run_cli(*arguments: str) -> int:
    """The exit status of the command line, run beside this loop."""

    def run() -> int:
        try:
            main(["control", *arguments])
        except SystemExit as e:
            return int(e.code or 0)
        return 0

    return await asyncio.to_thread(run)


def test_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        monkeypatch.setenv("NANOVLLM_ENDPOINT", "https://hub.invalid")  # not ours
        monkeypatch.setenv("ZMQ_CONTROL_ENDPOINT", server.endpoint)
        assert await run_cli("metrics") == 0
        assert json.loads(capsys.readouterr().out) == METRICS
        assert await run_cli("health", "--endpoint", server.endpoint) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "ready"
        assert await run_cli("warm", "Once upon") == 0
        assert await run_cli("warm", "--tokens", "12") == 0
        assert llm.warmed == ["Once upon", [0] * 12]
        assert await run_cli("warm", "--tokens", "1000") == 2
        assert "in [1, 999]" in capsys.readouterr().err
        assert await run_cli("warm") == 2
        assert await run_cli("drain") == 0
        assert json.loads(capsys.readouterr().out) == {"drained": True, "num_inflight": 0}
        assert await run_cli("health") == 1

    talk(scenario)


def test_the_command_line_says_that_requests_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(llm: FakeLLM, server: ControlServer) -> None:
        llm.num_inflight = 1000
        assert await run_cli("drain", "--timeout", "0", "--endpoint", server.endpoint) == 1
        assert json.loads(capsys.readouterr().out)["num_inflight"] == 998

    talk(scenario)
