"""`nanovllm control`: commands for a running server, by its control socket.

The server opens it with `--zmq-control`.
"""

import json
import sys
import time
from typing import Any

from nanovllm.config import ServerConfig
from nanovllm.errors import InvalidRequestError

POLL_INTERVAL = 0.2


def metrics(*, endpoint: str | None = None) -> None:
    """Print the pool's figures.

    Args:
        endpoint: The socket; by default where a server on this machine opens it.
    """
    _print(_ask(endpoint, cmd="metrics"))


def health(*, endpoint: str | None = None) -> None:
    """Print whether the server takes requests, and each engine's state; exits with 1 if not.

    Args:
        endpoint: The socket; by default where a server on this machine opens it.
    """
    answer = _ask(endpoint, cmd="health")
    _print(answer)
    if answer["status"] != "ready":
        sys.exit(1)


def warm(
    prompt: str | None = None, /, *, tokens: int | None = None, endpoint: str | None = None
) -> None:
    """Compute a text that many requests begin with, on every engine, so that it is cached.

    Args:
        prompt: The text.
        tokens: Compute so many dummy tokens instead, to touch the memory they need.
        endpoint: The socket; by default where a server on this machine opens it.
    """
    if (prompt is None) == (tokens is None):
        raise InvalidRequestError("give either a text or --tokens", "prompt")
    given = {"tokens": tokens} if prompt is None else {"prompt": prompt}
    _print(_ask(endpoint, cmd="warm", **given))


def drain(*, timeout: float = 300.0, endpoint: str | None = None) -> None:
    """Let the server take no more requests, and wait until those in flight have ended.

    Exits with 1 if some are left. The server stays up and refuses requests until it is restarted.

    Args:
        timeout: Seconds to wait.
        endpoint: The socket; by default where a server on this machine opens it.
    """
    deadline = time.monotonic() + timeout
    while not (answer := _ask(endpoint, cmd="drain"))["drained"] and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)
    _print(answer)
    if not answer["drained"]:
        sys.exit(1)


def _ask(endpoint: str | None, **payload: Any) -> dict[str, Any]:
    from nanovllm.cluster.control import send_control_request

    endpoint = endpoint or ServerConfig.from_env().zmq_control_endpoint
    answer = send_control_request(endpoint, payload)
    if "error" in answer:
        raise InvalidRequestError(str(answer.get("message", answer["error"])))
    return answer


def _print(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, indent=2) + "\n")
