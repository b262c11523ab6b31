"""Run the application: `nanovllm serve`."""

import asyncio
import contextlib
import ipaddress
import logging
import math
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from nanovllm.config import EngineConfig, PoolConfig, ServerConfig, SpeechConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.server.app import create_app
from nanovllm.server.listening import open_sockets
from nanovllm.server.logs import configure_logging
from nanovllm.server.protocol import BoundedProtocol
from nanovllm.server.state import ServerState

logger = logging.getLogger(__name__)

STARTUP_FAILED = 2
MAX_FILES = 1 << 16
"""File descriptors to ask the system for; each connection takes one, and some memory."""
DRAIN_TICK = 0.05


def serve(
    server: ServerConfig,
    engine: EngineConfig,
    pool: PoolConfig,
    speech: SpeechConfig | None = None,
) -> int:
    """Serve until a signal; return the exit status of the process.

    Args:
        server: Where and whom to serve.
        engine: What to serve.
        pool: With how many engines.
        speech: Which speech model beside it, and which voices.

    Raises:
        InvalidRequestError: The certificate, or where to listen, cannot be used.
    """
    configure_logging(server)
    _check_files(server)
    if server.uds is None and not server.api_key and not _is_loopback(server.host):
        logger.warning(
            "everybody who reaches %s may use this server: set --api-key, or NANOVLLM_API_KEY",
            server.host,
        )
    app = create_app(server, engine, pool, speech or SpeechConfig())
    state: ServerState = app.state.server
    config = uvicorn.Config(
        app,
        host=server.host,
        port=server.port,
        uds=server.uds,
        ssl_keyfile=server.ssl_keyfile,
        ssl_certfile=server.ssl_certfile,
        http=_protocol(server),
        # A WebSocket's bytes would pass by the limits of `BoundedProtocol`; no route has one.
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=server.access_log,
        server_header=False,
        timeout_keep_alive=server.keep_alive_timeout,  # type: ignore[arg-type]  # a delay
        h11_max_incomplete_event_size=server.max_header_size,
    )
    sockets = open_sockets(server)
    with contextlib.suppress(KeyboardInterrupt):
        DrainingServer(config, state).run(sockets)
    if server.uds is not None:
        Path(server.uds).unlink(missing_ok=True)
    return 0 if state.startup_error is None else STARTUP_FAILED


class DrainingServer(uvicorn.Server):
    """A server that keeps answering while it drains, at least with 503, and then ends with 0.

    A second signal ends it at once.

    Args:
        config: What uvicorn needs to know.
        state: Whose requests are drained.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heed a terminal that is closed as well, unless `nohup` says not to."""
        with super().capture_signals():
            heeds = (
                threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
            )
            if heeds:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                if heeds:
                    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # Unlike uvicorn's, this does not note the signal down to die of it in the end.
        if sig != signal.SIGHUP:  # the shell and the kernel may both send it
            self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            url = self._url()
            logger.info("listening on %s; the playground is at /, the API's docs at /docs", url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timeout = self._state.config.shutdown_timeout
        deadline = time.monotonic() + timeout
        if not await self._drain(timeout):
            logger.warning("the requests that are left are aborted")
            await self._state.close(force=self.force_exit)  # their clients hear of it
        # What is left is the last bytes of answers; nobody may take for ever to read them.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(deadline - time.monotonic()))
        if self.force_exit:
            self.config.timeout_graceful_shutdown = 1
            self.force_exit = False  # uvicorn would leave the engines behind
        await super().shutdown(sockets)

    async def _drain(self, timeout: float) -> bool:
        """Wait for the requests in flight; False if some are left, or a second signal came."""
        if inflight := self._state.stats().num_inflight:
            logger.info("requests in flight: %d; they get up to %g s to end", inflight, timeout)
        draining = asyncio.ensure_future(self._state.drain(timeout))
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(DRAIN_TICK)
        if draining.done():
            return draining.result()
        draining.cancel()
        return False

    def _url(self) -> str:
        if self.config.uds is not None:
            return f"unix:{self.config.uds}"
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _check_files(server: ServerConfig) -> None:
    """Try what uvicorn would fail at with an error that names no file."""
    if server.ssl_keyfile is not None and server.ssl_certfile is None:
        raise InvalidRequestError("ssl_keyfile needs ssl_certfile", "ssl_certfile")
    for name in ("ssl_certfile", "ssl_keyfile"):
        if path := getattr(server, name):
            try:
                Path(path).read_bytes()
            except OSError as e:
                raise InvalidRequestError(f"{name}: {path}: {e.strerror}", name) from e
    if server.ssl_certfile is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, _no_password)
        except (ssl.SSLError, ValueError) as e:
            key = server.ssl_keyfile or server.ssl_certfile
            raise InvalidRequestError(
                f"ssl_certfile {server.ssl_certfile} and ssl_keyfile {key} are no PEM files of a "
                f"certificate and its key: {e}",
                "ssl_certfile",
            ) from e


def _no_password() -> str:
    """OpenSSL would ask at the terminal otherwise."""
    raise ValueError("the key is encrypted")


def _protocol(server: ServerConfig) -> type[BoundedProtocol]:
    """The connections' class, with this server's bounds."""
    bounds = {
        "request_timeout": server.request_timeout,
        # The engines, libraries and logs need files, too.
        "max_connections": _raise_file_limit() * 3 // 4,
    }
    return type("Connection", (BoundedProtocol,), bounds)


def _raise_file_limit() -> int:
    """Allow this process as many open files as it may have; return their number."""
    if sys.platform == "win32":
        return MAX_FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS may have a lower limit yet
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_FILES)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
