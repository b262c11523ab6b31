"""What becomes of the requests when something breaks: a worker, a client, the server, memory.

Each request must have exactly one outcome, nothing may hang, and nothing may be left behind: no
sequence, no KV block, no process.
"""

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cluster.control import send_control_request
from tests.serving import Server, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

LONG = {"max_tokens": 3000, "ignore_eos": True}
STEP_TIMEOUT = 2.0
CONTROL = f"tcp://127.0.0.1:{free_port()}"
DEADLINE, SLOW_DEADLINE = 90.0, 500.0
"""Seconds after which a test counts as hung."""


@dataclass
class Outcome:
    """What one client saw.

    Args:
        status: Of the answer; 0 if the connection ended before.
        finish_reasons: Those that came.
        errors: Codes of the errors that came, as an answer or as an event.
        done: Whether the answer, or the stream, came to its end.
        text: All of it.
    """

    status: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    done: bool = False
    text: str = ""

    @property
    def kind(self) -> str:
        """The one outcome, or what is wrong with it."""
        outcomes = self.finish_reasons + self.errors
        if len(outcomes) != 1:
            return f"{self.status} with the outcomes {outcomes}"
        if self.status == 200 and not self.done:
            return f"{outcomes[0]}, and then no end"
        return outcomes[0]


class Client:
    """Streams one completion over a connection of its own.

    Args:
        server: Whom to ask.
        **body: Of the request.
    """

    def __init__(self, server: Server, **body: Any) -> None:
        self.began = asyncio.Event()
        self.outcome = Outcome()
        self._port = server.port
        self._body = {"prompt": "Once upon a time", "stream": True} | body

    async def run(self) -> Outcome:
        """Read all of the answer."""
        reader = await self.send()
        await self.read(reader)
        return self.outcome

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Read the answer to its end, however that comes."""
        try:
            self.outcome.status = int((await reader.readline()).split()[1])
            async for line in reader:
                self._take(line)
        except (ConnectionError, IndexError):
            pass  # the outcome shows it
        finally:
            self.close()

    async def send(self, receive_buffer: int | None = None) -> asyncio.StreamReader:
        """Send the request and return where its answer comes."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        limit = receive_buffer or 1 << 16
        reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        body = json.dumps(self._body).encode()
        self._writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await self._writer.drain()
        return reader

    def close(self) -> None:
        """Leave without a word."""
        self._writer.transport.abort()

    def _take(self, line: bytes) -> None:
        if line.startswith(b"data: [DONE]"):
            self.outcome.done = True
            return
        if not line.startswith((b"data: ", b"{")):
            return
        self.outcome.done = line.startswith(b"{")  # a whole answer
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            self.outcome.errors.append(event["error"]["code"])
        for choice in event.get("choices", []):
            self.began.set()
            self.outcome.text += choice["text"]
            if choice["finish_reason"] is not None:
                self.outcome.finish_reasons.append(choice["finish_reason"])


def run(scenario: Coroutine[Any, Any, None], deadline: float = DEADLINE) -> None:
    asyncio.run(asyncio.wait_for(scenario, deadline))


async def begin(clients: list[Client]) -> list["asyncio.Task[Outcome]"]:
    """Start them all, and wait until half of them have got something."""
    tasks = [asyncio.create_task(client.run()) for client in clients]
    began = [asyncio.create_task(client.began.wait()) for client in clients]
    while sum(task.done() for task in began) < len(clients) // 2:
        assert not any(task.done() for task in tasks), "too short to be interrupted"
        await asyncio.sleep(0.01)
    for task in began:
        task.cancel()
    return tasks


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < deadline, "it does not come about"
        await asyncio.sleep(0.05)


async def settled(server: Server, timeout: float = 60.0) -> None:
    """Wait until all engines run and hold nothing, and see that a request gets its answer."""

    async def at_rest() -> bool:
        _, pool = await asyncio.to_thread(server.get, "/metrics.json")
        engines = pool["engines"]
        return bool(
            pool["inflight_total"] == 0
            and all(engine["state"] == "ready" for engine in engines)
            and not any(engine["num_inflight"] for engine in engines)
            and not any(engine["num_running"] + engine["num_waiting"] for engine in engines)
            and not any(engine["num_used_blocks"] for engine in engines)
        )

    await until(at_rest, timeout)
    for _ in range(2 * len(workers(server))):
        assert (await Client(server, max_tokens=4).run()).kind in ("length", "stop")


def workers(server: Server) -> list[int]:
    """Process ids of the engines, the oldest first."""
    pids: list[int] = []
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        with suppress(OSError):  # of a thread that has just ended
            pids += map(int, (task / "children").read_text().split())
    return sorted(pids)


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def memory(server: Server) -> int:
    """Bytes of memory that the API process has."""
    num_pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """A server of two engines that counts an engine as hung soon, with a control socket."""
    with Server(
        replicas=2,
        step_timeout=STEP_TIMEOUT,
        max_num_seqs=64,
        zmq_control=True,
        zmq_control_endpoint=CONTROL,
    ) as server:
        yield server


async def break_worker(server: Server, number: signal.Signals, num_streams: int) -> None:
    """Signal one engine under load; its requests end with an error, the others as they should."""
    num_engines = len(workers(server))
    victim = workers(server)[0]
    clients = [
        Client(server, prompt=f"Story {i}.", max_tokens=300, ignore_eos=True, stream=i % 4 > 0)
        for i in range(num_streams)
    ]
    tasks = await begin(clients)
    os.kill(victim, number)
    counts = Counter(outcome.kind for outcome in await asyncio.gather(*tasks))
    assert set(counts) <= {"length", "engine_died", "not_ready"}, counts
    assert counts["engine_died"] + counts["not_ready"] >= num_streams // num_engines // 2, counts
    assert bool(counts["length"]) == (num_engines > 1), counts
    await settled(server)
    assert len(workers(server)) == num_engines
    assert not lives(victim)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_one_of_two_workers_breaks(pair: Server, number: signal.Signals) -> None:
    run(break_worker(pair, number, 64))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_the_only_worker_breaks(number: signal.Signals) -> None:
    with Server(step_timeout=STEP_TIMEOUT, max_num_seqs=64) as server:
        run(break_worker(server, number, 64))
        status, answer = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4})
        assert status == 200, answer


async def leave(server: Server, num_clients: int) -> None:
    """Clients that go away: before, while or after they are answered, most of them in between."""
    draws = random.Random(0)

    async def one(index: int) -> None:
        await asyncio.sleep(draws.random() * num_clients / 100)
        streams = index % 4 > 0
        client = Client(server, prompt=f"Story {index}.", stream=streams, n=1 + index % 2, **LONG)
        try:
            await client.send()
            await asyncio.sleep(draws.random() ** 4)
        finally:
            client.close()

    stayed = [Client(server, prompt=f"I stay {i}.", max_tokens=200) for i in range(4)]
    outcomes = asyncio.gather(*(client.run() for client in stayed))
    await asyncio.gather(*(one(index) for index in range(num_clients)))
    assert {outcome.kind for outcome in await outcomes} <= {"length", "stop"}
    await settled(server)


def test_the_control_socket_tells_of_the_engines(pair: Server) -> None:
    health = send_control_request(CONTROL, {"cmd": "health"})
    assert health["status"] == "ready"
    assert sorted(worker["pid"] for worker in health["workers"]) == workers(pair)
    assert send_control_request(CONTROL, {"cmd": "metrics"}).keys() == (
        pair.get("/metrics.json")[1].keys()
    )
    warmed = send_control_request(CONTROL, {"cmd": "warm", "tokens": 320})
    assert warmed == {"num_tokens": 320}
    engines = pair.get("/metrics.json")[1]["engines"]
    assert not any(engine["num_inflight"] for engine in engines)


def test_disconnects_at_random_moments(pair: Server) -> None:
    run(leave(pair, 150))


@pytest.mark.slow
def test_a_thousand_disconnects(pair: Server) -> None:
    run(leave(pair, 1000), SLOW_DEADLINE)


async def stop_reading(server: Server, num_readers: int, num_tokens: int) -> None:
    """Readers that stop cost bounded memory and hold up nobody; what they have missed comes when
    they read on."""
    before = memory(server)
    body = {"max_tokens": num_tokens, "ignore_eos": True, "n": 4}
    clients = [Client(server, prompt=f"Storm {i}.", **body) for i in range(num_readers)]
    readers = [await client.send(receive_buffer=4096) for client in clients]
    others = [Client(server, prompt=f"Story {i}.", max_tokens=60) for i in range(8)]
    for outcome in await asyncio.gather(*(client.run() for client in others)):
        assert outcome.kind in ("length", "stop")
    await settled(server, timeout=SLOW_DEADLINE)
    assert memory(server) - before < 64 << 20
    for client, reader in zip(clients[::2], readers[::2], strict=True):
        await client.read(reader)
        assert client.outcome.finish_reasons == ["length"] * 4
        assert client.outcome.done
    for client in clients[1::2]:
        client.close()
    await settled(server)


def test_readers_that_stop(pair: Server) -> None:
    run(stop_reading(pair, num_readers=8, num_tokens=300))


@pytest.mark.slow
def test_readers_that_stop_for_long(pair: Server) -> None:
    run(stop_reading(pair, num_readers=16, num_tokens=1500), SLOW_DEADLINE)


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server whose KV cache has 40 blocks."""
    with Server(num_kv_blocks=40, block_size=16, max_num_seqs=32) as server:
        yield server


async def overfill(server: Server, num_requests: int) -> None:
    """Requests that together need many times the KV cache all get all of their tokens."""
    draws = random.Random(0)
    clients = [
        Client(
            server,
            prompt=[draws.randrange(3, 1000) for _ in range(draws.randrange(1, 300))],
            max_tokens=draws.randrange(150, 250),
            ignore_eos=True,
            return_token_ids=True,
        )
        for _ in range(num_requests)
    ]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    counts = Counter([(await task).kind for task in tasks])
    # The queue may be full, and says so before it takes a request.
    assert set(counts) <= {"length", "overloaded"}, counts
    assert counts["length"] >= min(num_requests, 160), counts
    await settled(server)


def test_many_requests_on_few_blocks(small: Server) -> None:
    run(overfill(small, 16))


@pytest.mark.slow
def test_two_hundred_long_requests_on_forty_blocks(small: Server) -> None:
    run(overfill(small, 200), SLOW_DEADLINE)


@pytest.fixture
def own_tmp(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose temporary directory must be as empty afterwards as before."""
    yield {"TMPDIR": str(tmp_path)}
    assert not list(tmp_path.glob("nanovllm-*"))


def test_sigterm_lets_requests_end(own_tmp: dict[str, str]) -> None:
    """What runs may end; what comes is refused, and told so; nothing is left behind."""

    async def scenario(server: Server) -> None:
        pids = workers(server)
        clients = [Client(server, max_tokens=200, ignore_eos=True) for _ in range(16)]
        tasks = await begin(clients)
        server.process.send_signal(signal.SIGTERM)
        await until(lambda: server.get("/ready")[0] == 503)
        late = await Client(server, max_tokens=4).run()
        assert (late.status, late.kind) == (503, "not_ready")
        assert Counter([(await task).kind for task in tasks]) == {"length": 16}
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert not any(lives(pid) for pid in pids)

    with Server(shutdown_timeout=60, env=own_tmp) as server:
        run(scenario(server))


def test_a_second_sigterm_ends_at_once(own_tmp: dict[str, str]) -> None:
    """Requests that are cut off are told of it."""

    async def scenario(server: Server) -> None:
        pids = workers(server)
        tasks = await begin([Client(server, **LONG) for _ in range(16)])
        server.process.send_signal(signal.SIGTERM)
        await until(lambda: server.get("/ready")[0] == 503)
        assert not any(task.done() for task in tasks)
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert Counter([(await task).kind for task in tasks]) == {"not_ready": 16}
        assert not any(lives(pid) for pid in pids)

    with Server(shutdown_timeout=300, env=own_tmp) as server:
        run(scenario(server))


@pytest.mark.slow
def test_sigterm_does_not_wait_for_those_who_do_not_move(own_tmp: dict[str, str]) -> None:
    """Neither a reader that has stopped nor an engine that hangs keeps the server up."""

    async def scenario(server: Server) -> None:
        pids = workers(server)
        clients = [Client(server, n=4, **LONG) for _ in range(6)]
        for client in clients:
            await client.send(receive_buffer=4096)
        await asyncio.sleep(1)
        os.kill(pids[0], signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert not any(lives(pid) for pid in pids)
        for client in clients:
            client.close()

    with Server(replicas=2, shutdown_timeout=3, env=own_tmp) as server:
        run(scenario(server))


def test_engines_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        pids = workers(server)
        tasks = await begin([Client(server, **LONG) for _ in range(4)])
        server.process.kill()
        await until(lambda: not any(lives(pid) for pid in pids), timeout=20)
        for outcome in await asyncio.gather(*tasks):  # nobody is left to say why
            assert not outcome.finish_reasons + outcome.errors
            assert not outcome.done

    with Server(env={"TMPDIR": str(tmp_path)}) as server:
        run(scenario(server))
