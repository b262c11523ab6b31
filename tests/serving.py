"""`nanovllm serve` as a process of its own, for tests that need a real one."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

START_TIMEOUT = 120.0
STOP_TIMEOUT = 60.0
BARE_OPTIONS = {"cpu_threads": 1, "local_files_only": True, "shutdown_timeout": 5}
"""What tests want unless they say else."""


def free_port() -> int:
    """A port of the loopback that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Server:
    """A running `nanovllm serve`.

    Args:
        model: What to serve; None is the bundled model.
        env: Environment variables to set besides ours.
        wait: Whether to wait until it is ready.
        **options: Flags, named as in the config classes: `max_num_seqs=4, api_key=["a", "b"]`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
        **options: Any,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # may be read after the end
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "nanovllm", "serve", *([str(model)] if model else [])),
                *flags(BARE_OPTIONS | options | {"port": self.port}),
            ],
            env=_environment() | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        if wait:
            try:
                self.wait_until_ready()
            except BaseException:
                self.stop()
                raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What it has written so far."""
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), end, 0).decode(errors="replace")

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait for 200 at /ready.

        Raises:
            RuntimeError: The process ended, or the time is up; the message has its log.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/ready", timeout=5)[0] == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the server is not ready (status {self.process.poll()}):\n{self.log}")

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> tuple[int, Any]:
        """Send one request; return its status, and its body as JSON or else as text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            defaults = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, defaults | dict(headers or {}))
            response = connection.getresponse()
            content = response.read()
            if response.headers.get_content_type() == "application/json":
                return response.status, json.loads(content)
            return response.status, content.decode()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self.request("POST", path, body, headers)

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Ask it to end as a user would, and wait; kill it if it does not. Return its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


@contextmanager
def serve(model: str | Path | None = None, **options: Any) -> Iterator[Server]:
    """A ready server for the length of a `with` block; see `Server`."""
    with Server(model, **options) as server:
        yield server


@contextmanager
def asking(server: Server) -> Iterator[list[float]]:
    """Ask how the server is all the while; the seconds of each answer."""
    answers: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.01) or not answers:
            start = time.monotonic()
            assert server.get("/health")[0] == 200
            answers.append(time.monotonic() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()


def idle(server: Server) -> bool:
    """Whether the engines hold nothing for anybody, now or within a few seconds."""
    for _ in range(200):
        pool = server.get("/metrics.json")[1]
        if not pool["inflight_total"] and not pool["kv_cache_usage"]:
            return True
        time.sleep(0.05)
    return False


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; a list gives its flag several times."""
    given: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            given += [f"--{flag}={item}" for item in values]
    return given


def _environment() -> dict[str, str]:
    """The environment without options that the developer may have set."""
    ours = ("NANOVLLM_", "NANO_VLLM_", "MODEL_", "VLLM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
