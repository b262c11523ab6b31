"""The sockets that the server listens on, opened before anything else is started."""

import errno
import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

from nanovllm.config import ServerConfig
from nanovllm.errors import InvalidRequestError

OPEN_TO_ALL = 0o666
"""Mode of a new socket of the file system; its directory may keep others out."""
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Why one of several addresses is left out: `localhost` may have one that the machine has not."""


def open_sockets(server: ServerConfig) -> list[socket.socket]:
    """Listen where the options say; who connects waits until the server takes connections.

    Raises:
        InvalidRequestError: The place is taken, or there is no such place.
    """
    if server.uds is None:
        return _open_addresses(server.host, server.port)
    try:
        return [_open_path(server.uds)]
    except OSError as e:
        raise InvalidRequestError(f"uds: {server.uds}: {e.strerror or e}", "uds") from e


def _open_addresses(host: str, port: int) -> list[socket.socket]:
    """Listen at every address that a host's name stands for."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as e:
        raise InvalidRequestError(f"host {host!r} is unknown: {e}", "host") from e
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, *_, address in found):
        try:
            sockets.append(socket.create_server(address, family=family))
        except OSError as e:
            problem = e
            if e.errno not in NOT_HERE:
                break
    if problem is None or (sockets and problem.errno in NOT_HERE):
        return sockets
    for sock in sockets:
        sock.close()
    raise _refusal(problem, host, port) from problem


def _refusal(e: OSError, host: str, port: int) -> InvalidRequestError:
    """What is told of a port or host that the system does not give."""
    if e.errno == errno.EADDRINUSE:
        return InvalidRequestError(f"port {port} is in use: choose another with --port", "port")
    if e.errno == errno.EACCES:
        return InvalidRequestError(
            f"port {port} is not for this user: choose one from 1024 on with --port", "port"
        )
    return InvalidRequestError(
        f"host {host!r} cannot be listened on: {os.strerror(e.errno or 0)}; use 127.0.0.1, or "
        "0.0.0.0 for all addresses of this machine",
        "host",
    )


def _open_path(path: str) -> socket.socket:
    """Listen at a path of the file system."""
    mode = _make_way(path)
    with ExitStack() as opened:
        sock = opened.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen()
        opened.pop_all()
    return sock


def _make_way(path: str) -> int:
    """Remove the socket of a server that has ended; return the mode of the next one."""
    if not os.path.lexists(path):
        return OPEN_TO_ALL
    if not Path(path).is_socket():
        raise InvalidRequestError(
            f"uds: {path}: is there and no socket; remove it, or choose another path", "uds"
        )
    with socket.socket(socket.AF_UNIX) as trial:
        trial.setblocking(False)  # as many may wait for the other server as can
        if trial.connect_ex(path) != errno.ECONNREFUSED:
            raise InvalidRequestError(f"uds: {path}: another server listens there", "uds")
    mode = stat.S_IMODE(os.stat(path).st_mode)
    os.unlink(path)
    return mode
