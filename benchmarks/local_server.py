"""A `nanovllm serve` of our own, and `nanovllm bench serve` against it, each in its process."""

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

HOST, PORT = "127.0.0.1", 8799
START_TIMEOUT = 120.0


@contextmanager
def serving(*options: str) -> Iterator[psutil.Process]:
    """Start a server and end it; yields its process once it is ready."""
    command = [sys.executable, "-m", "nanovllm", "serve", "--port", str(PORT), *options]
    server = subprocess.Popen([*command, "--log-level", "warning"])
    try:
        _wait_until_ready()
        yield psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def put_under_load(*options: object) -> dict[str, Any]:
    """Run `nanovllm bench serve` and return the figures of its only load."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "result.json")
        command = [sys.executable, "-m", "nanovllm", "bench", "serve"]
        command += ["--url", f"http://{HOST}:{PORT}", "--json", str(result), *map(str, options)]
        subprocess.run(command, check=True, capture_output=True)
        figures: dict[str, Any] = json.loads(result.read_text())["loads"][0]
    return figures


def _wait_until_ready() -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        with suppress(OSError):
            connection = http.client.HTTPConnection(HOST, PORT)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server is not ready")
