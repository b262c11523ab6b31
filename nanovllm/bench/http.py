"""Just enough of an HTTP/1.1 client to put a server under load.

The client shares the machine with the server that it measures, so it has to be cheap: a streamed
token costs a few microseconds here, an order of magnitude less than with a general client.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from nanovllm.errors import InvalidRequestError

MAX_READ = 1 << 16


class ProtocolError(ConnectionError):
    """The server sent what is not HTTP, or closed the connection in the middle of it."""


@dataclass(slots=True)
class Connection:
    """An open connection; `is_used` once it has carried a request."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_used: bool = False


class Response:
    """Status and headers (names in lower case) of a response whose body is still to come."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self.is_read = False
        self._reader = reader

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection can carry another request after this one."""
        has_end = "content-length" in self.headers or self._is_chunked
        return self.is_read and has_end and self.headers.get("connection", "").lower() != "close"

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it comes.

        Raises:
            ProtocolError: It breaks off.
        """
        reader = self._reader
        try:
            if self._is_chunked:
                while size := int((await reader.readline()).partition(b";")[0], 16):
                    yield await reader.readexactly(size)
                    await reader.readexactly(2)
                while (await reader.readline()).strip():
                    pass  # trailers
            elif (length := self.headers.get("content-length")) is not None:
                yield await reader.readexactly(int(length))
            else:
                while data := await reader.read(MAX_READ):
                    yield data
        except (asyncio.IncompleteReadError, ValueError) as e:
            raise ProtocolError("the response broke off") from e
        self.is_read = True

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    @property
    def _is_chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"


class HTTPClient:
    """Sends requests to one server, over connections that it keeps for the next request.

    Args:
        url: Base URL, `http://` or `https://`; its path goes before that of each request.
        headers: Sent with every request.

    Raises:
        InvalidRequestError: It is no such URL.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as e:
            raise InvalidRequestError(f"{url!r} is not a URL: {e}", "url") from e
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError(f"{url!r} is not an http or https URL", "url")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        lines = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "nanovllm-bench"}
        lines |= headers or {}
        if any(not (value.isascii() and value.isprintable()) for value in lines.values()):
            raise InvalidRequestError("URL and API key must be printable ASCII")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[Connection] = []

    @asynccontextmanager
    async def send(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """Send a request; the body of its response is read inside the `async with`.

        Args:
            method: HTTP method.
            path: Path below the base URL.
            body: JSON, if any.

        Raises:
            OSError: There is no connection, or it broke; `ProtocolError` is one.
        """
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json"
            f"\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection, response = await self._exchange(head.encode("latin-1") + body)
        try:
            yield response
        finally:
            if response.keeps_alive:
                self._idle.append(connection)
            else:
                connection.writer.close()

    def close(self) -> None:
        """Close the connections that no request uses."""
        while self._idle:
            self._idle.pop().writer.close()

    async def _exchange(self, message: bytes) -> tuple[Connection, Response]:
        """Send a message and read the head of the response to it.

        A server may close a kept connection at the moment we use it; then another one is tried.
        """
        while True:
            connection = await self._connect()
            was_used, connection.is_used = connection.is_used, True
            try:
                connection.writer.write(message)
                head = await connection.reader.readuntil(b"\r\n\r\n")
                return connection, _parse_head(head, connection.reader)
            except BaseException as e:
                connection.writer.close()
                if isinstance(e, asyncio.LimitOverrunError):
                    raise ProtocolError("the head of the response has no end") from e
                if not isinstance(e, asyncio.IncompleteReadError | ConnectionResetError):
                    raise
                if not was_used:
                    raise ProtocolError("the server closed the connection unanswered") from e

    async def _connect(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof():
                return connection
            connection.writer.close()
        streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        return Connection(*streams)


def _parse_head(head: bytes, reader: asyncio.StreamReader) -> Response:
    status_line, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    version, _, rest = status_line.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
        raise ProtocolError(f"this is no HTTP/1.1 response: {status_line[:80]!r}")
    fields = (line.partition(":") for line in lines)
    return Response(
        int(rest[:3]), {name.lower(): value.strip() for name, _, value in fields}, reader
    )
