"""The client's end of an engine process: start it, talk to it, notice when it dies or hangs."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import zmq
import zmq.asyncio

from nanovllm.engine.llm_engine import EngineStats
from nanovllm.errors import (
    InvalidRequestError,
    NotEnoughMemoryError,
    UnavailableError,
    UnsupportedModelError,
)
from nanovllm.worker.load import EngineRequest, WorkerLoad
from nanovllm.worker.messages import (
    AbortSequences,
    Answer,
    CancelCall,
    EncodeAudio,
    Failed,
    FromWorker,
    LoadAdapter,
    LogRecord,
    News,
    PauseSequences,
    Shutdown,
    Start,
    Started,
    UnloadAdapter,
    decode_from_worker,
    encode,
)

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT = 5.0
"""Seconds a process gets to end by itself."""
GROUP_TIMEOUT = 1.0
"""Seconds that what it has started gets, once it has ended."""
GROUP_POLL = 0.02

ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        InvalidRequestError,
        UnsupportedModelError,
        NotEnoughMemoryError,
        FileNotFoundError,
        PermissionError,
        ImportError,
        ValueError,
    )
}
"""What a worker's failure is raised as; anything else is a RuntimeError."""

MakeCall = Callable[[int], EncodeAudio | LoadAdapter | UnloadAdapter]
"""Makes a message that is answered, given the number of the call."""


class WorkerClient:
    """One engine process, from `start` to `stop` or its death. Belongs to one event loop.

    Args:
        start: What the process shall build.
        address: Path of a Unix socket that does not exist yet, in a directory of our own.
        context: Makes the socket; a pool's clients share it.
        on_news: Called with every step's news.

    Attributes:
        started: What the engine has told of itself; None until it is ready.
        stats: The engine's counters as of its last news.
        load: What it has to do.
    """

    def __init__(
        self,
        start: Start,
        address: Path,
        context: zmq.asyncio.Context,
        on_news: Callable[[News], None],
    ) -> None:
        self.started: Started | None = None
        self.stats = EngineStats()
        self.load = WorkerLoad()
        self._start = start
        self._address = address
        self._on_news = on_news
        self._process: asyncio.subprocess.Process | None = None
        self._group_ended = False
        self._context = context
        self._socket: zmq.asyncio.Socket | None = None
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._call_ids = itertools.count()
        self._num_sent = 0
        self._num_handled = 0
        self._last_sign = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> Started:
        """Start the process and wait until its engine is ready.

        Raises:
            InvalidRequestError: The options or the checkpoint cannot be used.
            NotEnoughMemoryError: The engine does not fit.
            RuntimeError: The process died.
        """
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        # The side that connects may send at once, before the other one is there.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(f"ipc://{self._address}")
        # A session of its own: Ctrl-C is for us, and we decide what becomes of the worker. Its
        # standard input closes when we are gone, however that comes about.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nanovllm.worker",
            f"ipc://{self._address}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self._send(encode(self._start))
        died = asyncio.ensure_future(self._process.wait())
        received = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait((received, died), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((received,), timeout=1)  # a dead process may have said why
            if not received.done():
                raise RuntimeError(f"the engine process died while starting: {self._ending()}")
            message = received.result()
        finally:
            received.cancel()
            died.cancel()
        if isinstance(message, Failed):
            raise ERRORS.get(message.kind, RuntimeError)(message.message)
        if not isinstance(message, Started):
            raise RuntimeError(f"a worker answers with Started, got {type(message).__name__}")
        self.started = message
        self.stats.num_kv_blocks = message.num_kv_blocks  # the first news may be long in coming
        return message

    async def run(self, step_timeout: float) -> str:
        """Take news until the process is dead or of no use any more, and return what happened.

        Args:
            step_timeout: Seconds without a sign of life, while one is due, after which it counts as
                hung.
        """
        if self._process is None:
            raise RuntimeError("the worker has not been started")
        tasks = [
            asyncio.ensure_future(coroutine)
            for coroutine in (self._process.wait(), self._receive_news(), self._hang(step_timeout))
        ]
        died, receiving, _ = tasks
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if died in done:
            return self._ending()
        if receiving in done:
            # It ends by an exception alone. Whatever went wrong, nobody may wait for ever.
            logger.error("the news of an engine cannot be taken", exc_info=receiving.exception())
            return "its news cannot be taken"
        return f"no step ended within {step_timeout:g} s"

    @property
    def is_busy(self) -> bool:
        """Whether a sign of life is due: there is work, or something is unanswered."""
        unanswered = bool(self._calls) or self._num_sent > self._num_handled
        return self.load.num_runnable > 0 or unanswered

    @property
    def num_calls(self) -> int:
        """Calls without an answer."""
        return len(self._calls)

    def add(self, request: EngineRequest) -> None:
        """Send a request."""
        self._post(request.packed)
        self.load.open(request)

    def abort(self, seq_ids: Iterable[int]) -> None:
        """End sequences that nobody waits for any more; those that have ended do not matter."""
        if aborted := [seq_id for seq_id in seq_ids if self.load.close(seq_id)]:
            self._post(encode(AbortSequences(aborted)))

    def pause(self, seq_ids: Iterable[int], paused: bool) -> None:
        """Hold sequences back, or let them go on; those that have ended do not matter."""
        if known := [seq_id for seq_id in seq_ids if seq_id in self.load.sequences]:
            self._post(encode(PauseSequences(known, paused)))
            self.load.pause(known, paused)

    def call(self, make: MakeCall) -> "asyncio.Future[bytes]":
        """Send a message that is answered, after all that has been sent before it.

        Returns:
            The answer's data; cancelling it drops the call. It fails as the worker did, or with an
            `UnavailableError` if the worker dies first.
        """
        call_id = next(self._call_ids)
        self._post(encode(make(call_id)))
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: self._cancel(call_id) if done.cancelled() else None)
        return answer

    def _cancel(self, call_id: int) -> None:
        """Have a call dropped; it counts until the worker has answered."""
        if call_id in self._calls:
            self._post(encode(CancelCall(call_id)))

    def give_up(self, error: UnavailableError) -> list[int]:
        """Drop what it has to do and what it said of itself; returns the sequences it had.

        Args:
            error: What is told to those who wait for an answer.
        """
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()
        lost = list(self.load.sequences)
        self.load = WorkerLoad()
        self.stats = EngineStats()
        return lost

    async def stop(self) -> None:
        """End the process, by force if it does not end by itself or is still loading."""
        running = self._process is not None and self._process.returncode is None
        if self._process is not None and running and self.started is not None:
            self._send(encode(Shutdown()))
            try:
                await asyncio.wait_for(self._process.wait(), SHUTDOWN_TIMEOUT)
            except asyncio.TimeoutError:
                logger.warning("engine process %d does not end: it is killed", self._process.pid)
        await self.kill()

    async def kill(self) -> None:
        """End the process and its tensor-parallel ranks by force, and the link with it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._address.unlink(missing_ok=True)
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
            try:
                await asyncio.wait_for(self._process.wait(), SHUTDOWN_TIMEOUT)
            except asyncio.TimeoutError:  # stuck in the kernel, such as in a driver
                logger.error("engine process %d cannot be killed", self._process.pid)
        if not self._group_ended:
            self._group_ended = True  # its number may be another's later on
            await _end_group(self._process.pid)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _post(self, packed: bytes) -> None:
        """Send what is answered by news."""
        if not self.is_busy:
            self._last_sign = time.monotonic()
        self._num_sent += 1
        self._send(packed)

    def _send(self, packed: bytes) -> None:
        if self._socket is not None:
            sending = asyncio.ensure_future(self._socket.send(packed, zmq.NOBLOCK))
            sending.result()  # without a high-water mark nothing waits: it is done

    async def _receive(self) -> FromWorker:
        """Return the next message that is not just a line for the log."""
        if self._socket is None:
            raise RuntimeError("the link to the worker is closed")
        while True:
            message: FromWorker = decode_from_worker(await self._socket.recv())
            if not isinstance(message, LogRecord):
                return message
            logging.getLogger(message.logger).log(message.level, "%s", message.message)

    async def _receive_news(self) -> None:
        while True:
            message = await self._receive()
            self._last_sign = time.monotonic()
            if isinstance(message, Answer):
                self._take_answer(message)
            elif isinstance(message, News):
                self._num_handled = message.num_handled
                self.stats = message.stats
                self.load.take(message.outputs)
                self._on_news(message)

    def _take_answer(self, message: Answer) -> None:
        answer = self._calls.pop(message.call_id)
        if answer.done():  # nobody waits for it any more
            return
        if message.kind is None:
            answer.set_result(message.data)
        else:
            answer.set_exception(ERRORS.get(message.kind, RuntimeError)(message.message))

    async def _hang(self, step_timeout: float) -> None:
        """Return once the engine hangs."""
        while not self.is_busy or time.monotonic() - self._last_sign < step_timeout:
            await asyncio.sleep(min(step_timeout / 4, 1.0))

    def _ending(self) -> str:
        code = None if self._process is None else self._process.returncode
        return f"exit status {code}" if code is None or code >= 0 else f"killed by signal {-code}"


async def _end_group(leader: int) -> None:
    """End the ranks of an engine process that has ended.

    They do so by themselves and clear away what they have made, unless they are stopped or stuck.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
        os.killpg(leader, signal.SIGCONT)
        deadline = time.monotonic() + GROUP_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):  # ours if we are process 1
                os.waitpid(-leader, os.WNOHANG)
            os.killpg(leader, 0)
            await asyncio.sleep(GROUP_POLL)
        os.killpg(leader, signal.SIGKILL)
