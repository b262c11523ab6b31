"""The server as a process: how it starts, what it says, and how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.serving import Server, free_port

KEY = "sk-secret"


def stream_in_background(server: Server, max_tokens: int) -> tuple[threading.Thread, list[Any]]:
    """Ask for a long stream; return who reads it, and where the status and the text will be."""
    answer: list[Any] = []
    body = {"prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    reader = threading.Thread(target=lambda: answer.extend(server.post("/v1/completions", body)))
    reader.start()
    while server.get("/metrics.json")[1]["generation_tokens"] == 0:
        time.sleep(0.01)
    return reader, answer


class TestEnding:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_it_drains_and_leaves_nothing_behind(self, number: int) -> None:
        with Server(shutdown_timeout=60) as server:
            engines = psutil.Process(server.process.pid).children(recursive=True)
            reader, answer = stream_in_background(server, 500)
            server.process.send_signal(number)
            time.sleep(0.1)
            if number == signal.SIGHUP:  # the shell sends one, and the kernel another
                server.process.send_signal(number)
            assert server.get("/health")[0] == 200
            assert server.get("/ready")[0] == 503
            status, refusal = server.post("/v1/completions", {"prompt": "x"})
            assert (status, refusal["error"]["code"]) == (503, "not_ready")
            assert server.process.wait(60) == 0
            reader.join()
        assert answer[0] == 200
        assert '"finish_reason":"length"' in answer[1]
        assert answer[1].endswith("data: [DONE]\n\n")
        assert not any(engine.is_running() for engine in engines)
        assert "Traceback" not in server.log

    @pytest.mark.parametrize("why", ["a second signal", "the time is up"])
    def test_it_does_not_wait_for_ever(self, why: str) -> None:
        with Server(shutdown_timeout=60 if why == "a second signal" else 0.5) as server:
            engines = psutil.Process(server.process.pid).children(recursive=True)
            reader, answer = stream_in_background(server, 4000)
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            if why == "a second signal":
                time.sleep(0.2)
                server.process.send_signal(signal.SIGINT)
            assert server.process.wait(30) == 0
            assert time.monotonic() - start < 10
            reader.join()
        assert "shut down" in answer[1]
        assert not any(engine.is_running() for engine in engines)
        assert "Traceback" not in server.log

    def test_a_request_that_never_becomes_whole_is_cut_off(self) -> None:
        with Server(shutdown_timeout=1) as server:
            address = ("127.0.0.1", server.port)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
            connections = [socket.create_connection(address) for _ in range(3)]
            for connection in connections:
                connection.sendall(head)
            assert server.get("/health")[0] == 200
            assert server.stop() == 0
            for connection in connections:
                connection.close()
        assert "Cancel 3 running task(s)" in server.log
        assert "Traceback" not in server.log

    def test_its_engines_do_not_outlive_it(self, tmp_path: Path) -> None:
        with Server(env={"TMPDIR": str(tmp_path)}) as server:
            engines = psutil.Process(server.process.pid).children(recursive=True)
            assert engines
            server.process.kill()
            server.process.wait()
            _, alive = psutil.wait_procs(engines, timeout=10)
            assert not alive
        assert list(tmp_path.iterdir()) == []


class TestStarting:
    def test_it_answers_while_the_model_is_loaded(self) -> None:
        with Server(wait=False, api_key=[KEY], log_format="json", access_log=True) as server:
            seen = set()
            while 200 not in seen:
                with suppress(OSError):
                    seen.add(server.get("/ready")[0])
                    assert server.get("/health")[0] == 200
                assert server.process.poll() is None, server.log
            assert seen == {503, 200}
            assert server.get("/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
            assert server.stop() == 0
        entries = [json.loads(line) for line in server.log.splitlines()]
        said = " ".join(entry["message"] for entry in entries)
        assert {"demo_model", "cpu,", f"http://127.0.0.1:{server.port};"} <= set(said.split())
        assert "GET /v1/models" in said
        assert KEY not in server.log

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"model": "/nowhere/model"}, "/nowhere/model"),
            ({"dtype": "float16", "kv_cache_memory_bytes": 1}, "kv_cache_memory_bytes"),
        ],
    )
    def test_it_says_in_a_line_why_it_cannot(self, options: dict[str, Any], says: str) -> None:
        with Server(wait=False, **options) as server:
            assert server.process.wait(60) == 2
            (line,) = [line for line in server.log.splitlines() if "ERROR" in line]
            assert "Traceback" not in server.log
            assert says in line

    @pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5557", "ipc:///nowhere/control", "taken"])
    def test_a_control_socket_that_cannot_be(self, endpoint: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            if endpoint == "taken":
                endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            with Server(wait=False, zmq_control=True, zmq_control_endpoint=endpoint) as server:
                assert server.process.wait(60) == 2
        (line,) = [line for line in server.log.splitlines() if "ERROR" in line]
        assert "the control socket" in line
        assert endpoint in line
        assert "Traceback" not in server.log

    @pytest.mark.parametrize("place", ["a port", "a host", "a path"])
    def test_where_it_cannot_listen(self, place: str, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket(socket.AF_UNIX) as uds:
            uds.bind(path)
            uds.listen()
            port = taken.getsockname()[1]
            options, says = {
                "a port": ([f"--port={port}"], f"port {port} is in use: choose another"),
                "a host": (["--host=999.1.1.1", "--api-key=x"], "host '999.1.1.1' is unknown"),
                "a path": ([f"--uds={path}"], f"uds: {path}: another server listens there"),
            }[place]
            command = [sys.executable, "-m", "nanovllm", "serve", *options]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"nanovllm: error: {says}")

    def test_a_socket_of_the_file_system(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with Server(wait=False, uds=str(path)) as server:
            while b"200 OK" not in ask(path, "/ready"):
                assert server.process.poll() is None, server.log
            assert b"demo_model" in ask(path, "/v1/models")
            assert server.stop() == 0


def ask(path: Path, target: str) -> bytes:
    """What a Unix socket answers; nothing before it is there."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.settimeout(5)
        sock.connect(str(path))
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
        return answer
    return b""


@contextmanager
def uvicorn(*arguments: str, **variables: str) -> Iterator[http.client.HTTPConnection]:
    """The application under uvicorn's own command, which is asked to end afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", *arguments, "--port", str(port)]
    environment = os.environ | {"NANOVLLM_CPU_THREADS": "1"} | variables
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        yield http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def until_ready(connection: http.client.HTTPConnection) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/ready")
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return
        connection.close()
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.parametrize(
    "arguments", [("nanovllm.server.app:app",), ("--factory", "nanovllm.server.app:create_app")]
)
def test_uvicorns_command_serves_it_too(arguments: tuple[str, ...]) -> None:
    with uvicorn(*arguments, NANOVLLM_SERVED_MODEL_NAME="mine") as connection:
        until_ready(connection)
        connection.request("GET", "/v1/models")
        assert json.load(connection.getresponse())["data"][0]["id"] == "mine"


def test_under_uvicorns_command_a_failed_start_ends_it() -> None:
    command = [sys.executable, "-m", "uvicorn", "nanovllm.server.app:app", "--port"]
    environment = os.environ | {"NANOVLLM_MODEL": "/nowhere/model"}
    ended = subprocess.run(
        [*command, str(free_port())], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "/nowhere/model" in ended.stderr
    assert "Traceback" not in ended.stderr
