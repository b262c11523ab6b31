"""The control socket: a few commands for whoever operates the server, as JSON over ZeroMQ.

    {"cmd": "metrics"}                  the pool's figures, as /metrics.json has them
    {"cmd": "health"}                   {"status": "ready" or "not_ready", "workers": [...]}
    {"cmd": "warm", "prompt": "..."}    computes a text on every engine; requests that begin with it
                                        find it cached
    {"cmd": "warm", "tokens": 512}      computes so many dummy tokens, so that memory and kernels
                                        are ready for prompts of that length
    {"cmd": "drain"}                    takes no more requests, and answers at once;
                                        `num_inflight` of "health" tells when the last has ended

A command that fails is answered with `{"error": code}`: `invalid_json`, `unknown_command`, or with
a `message` `invalid_request` and the codes of the API's errors.

There is no authentication, so the socket listens on this machine only. It is a ROUTER, which REQ
sockets cannot tell from a REP; but a slow command does not keep the next one waiting.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from nanovllm.cluster.stats import PoolStats
from nanovllm.errors import InvalidRequestError, UnavailableError

logger = logging.getLogger(__name__)

MAX_MESSAGE_SIZE = 1 << 20
"""Bytes of a request; who sends more is disconnected."""
CONNECT_TIMEOUT = 2.0
"""Seconds after which a client takes it that there is no server."""
MAX_PENDING = 16
"""Commands that run at a time; the others wait in the socket, which takes a few and then blocks."""


class Controlled(Protocol):
    """What the commands act on: a server, or a model by itself."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def is_ready(self) -> bool: ...
    def stats(self) -> PoolStats: ...
    async def warm(self, prompt: str | list[int]) -> int: ...
    async def drain(self, timeout: float | None = None) -> bool: ...


class ControlRequest(msgspec.Struct):
    """A command. See the module for what there is."""

    cmd: object = None
    prompt: str | None = None
    tokens: int | None = None


class ControlServer:
    """Answers commands in the event loop that `start` was called in.

    Args:
        endpoint: Where to listen: `tcp://127.0.0.1:5557`, or `ipc://` and the path of a socket.
        controlled: What the commands act on.
        metrics: What `metrics` answers.

    Raises:
        InvalidRequestError: The endpoint is not on this machine.

    Attributes:
        endpoint: Where it listens; after `start` with the port that was free for a port of 0.
    """

    def __init__(
        self, endpoint: str, controlled: Controlled, metrics: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.endpoint = _local(endpoint)
        self._controlled = controlled
        self._metrics = metrics
        self._socket: zmq.asyncio.Socket | None = None
        self._serving: asyncio.Task[None] | None = None
        self._pending: set[asyncio.Task[None]] = set()
        self._free = asyncio.Semaphore(MAX_PENDING)

    async def start(self) -> None:
        """Open the socket.

        Raises:
            InvalidRequestError: The endpoint is in use or cannot be listened on.
        """
        socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_SIZE)
        socket.setsockopt(zmq.RCVHWM, MAX_PENDING)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, "[" in self.endpoint)
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as e:
            socket.close()
            raise InvalidRequestError(
                f"the control socket cannot listen on {self.endpoint}: {e.strerror}",
                "zmq_control_endpoint",
            ) from e
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if self.endpoint.startswith("ipc:///"):
            os.chmod(self.endpoint.removeprefix("ipc://"), 0o600)
        self._socket = socket
        self._serving = asyncio.create_task(self._serve(socket))
        logger.info("the control socket listens on %s", self.endpoint)

    async def stop(self) -> None:
        """Close the socket; commands that still run are not answered."""
        tasks = [*self._pending] if self._serving is None else [self._serving, *self._pending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _serve(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            await self._free.acquire()
            *envelope, request = await socket.recv_multipart()
            task = asyncio.create_task(self._answer(socket, envelope, request))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)
            task.add_done_callback(lambda _: self._free.release())

    async def _answer(
        self, socket: zmq.asyncio.Socket, envelope: list[bytes], request: bytes
    ) -> None:
        reply = await self._reply(request)
        await socket.send_multipart([*envelope, json.dumps(reply).encode()])

    async def _reply(self, request: bytes) -> dict[str, Any]:
        try:
            return await self._run(msgspec.convert(msgspec.json.decode(request), ControlRequest))
        except InvalidRequestError as e:
            return {"error": e.code or "invalid_request", "message": str(e)}
        except UnavailableError as e:
            return {"error": e.code, "message": str(e)}
        except msgspec.ValidationError as e:
            return {"error": "invalid_request", "message": str(e)}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {"error": "invalid_json"}
        except Exception:  # a command must not end the socket that all others come by
            logger.exception("a control command failed")
            return {"error": "internal_error"}

    async def _run(self, request: ControlRequest) -> dict[str, Any]:
        if request.cmd == "metrics":
            return dict(self._metrics())
        if request.cmd == "health":
            return self._health()
        if request.cmd == "warm":
            return {"num_tokens": await self._controlled.warm(self._warm_prompt(request))}
        if request.cmd == "drain":
            drained = await self._controlled.drain(0)
            return {"drained": drained, "num_inflight": self._controlled.stats().num_inflight}
        return {"error": "unknown_command"}

    def _health(self) -> dict[str, Any]:
        stats = self._controlled.stats()
        names = ("index", "state", "pid", "num_restarts", "num_inflight")
        return {
            "status": "ready" if self._controlled.is_ready else "not_ready",
            "num_inflight": stats.num_inflight,
            "workers": [{name: getattr(w, name) for name in names} for w in stats.workers],
        }

    def _warm_prompt(self, request: ControlRequest) -> str | list[int]:
        if request.prompt is not None and request.tokens is None:
            return request.prompt
        if request.tokens is None or request.prompt is not None:
            raise InvalidRequestError("warm needs either prompt, a text, or tokens, a number")
        if not 1 <= request.tokens < self._controlled.max_model_len:
            raise InvalidRequestError(
                f"tokens must be in [1, {self._controlled.max_model_len - 1}], got {request.tokens}"
            )
        return [0] * request.tokens


def send_control_request(
    endpoint: str, payload: Mapping[str, Any], timeout: float = 60.0
) -> dict[str, Any]:
    """Send a command to a server's control socket and return the answer.

    Args:
        endpoint: Where the server listens.
        payload: The command, such as `{"cmd": "metrics"}`.
        timeout: Seconds to wait for the answer.

    Raises:
        InvalidRequestError: The endpoint is none.
        TimeoutError: There was no answer, or no server listens there.
    """
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, "[" in endpoint)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # writable only once connected
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as e:
            raise InvalidRequestError(
                f"{endpoint!r} is no endpoint ({e.strerror}): use tcp://127.0.0.1:5557, or ipc:// "
                "and a path",
                "endpoint",
            ) from e
        if not socket.poll(int(min(timeout, CONNECT_TIMEOUT) * 1000), zmq.POLLOUT):
            raise TimeoutError(
                f"nobody listens on {endpoint}: start the server with --zmq-control, or give the "
                "endpoint that it has"
            )
        socket.send(json.dumps(payload).encode())
        if not socket.poll(int(timeout * 1000)):
            raise TimeoutError(f"no answer from {endpoint} within {timeout:g} s")
        answer: dict[str, Any] = json.loads(socket.recv())
        return answer


def _local(endpoint: str) -> str:
    """An endpoint that only this machine can reach, in the form that ZeroMQ listens on.

    Raises:
        InvalidRequestError: It is another one.
    """
    transport, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if transport == "ipc" and address:
        return endpoint
    if transport == "tcp" and _is_port(port) and host in ("127.0.0.1", "localhost", "[::1]"):
        return f"tcp://{host.replace('localhost', '127.0.0.1')}:{port}"
    raise InvalidRequestError(
        f"the control socket has no authentication and listens on this machine only, got "
        f"{endpoint!r}: use tcp://127.0.0.1:5557, or ipc:// and a path",
        "zmq_control_endpoint",
    )


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 1 << 16
