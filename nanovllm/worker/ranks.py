"""The processes that run a model together with this one: start them, notice when one dies."""

import contextlib
import math
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError, RankDiedError

if TYPE_CHECKING:
    from nanovllm.runners.parallel import Call

COMMAND = (sys.executable, "-m", "nanovllm.worker.rank")
"""Starts a rank, given the number of its end of the link."""
GRACE = 0.3
"""Seconds in which the first trouble that is heard of may turn out to follow from another."""
END_TIMEOUT = 5.0
"""Seconds a process gets to end by itself."""


class Task(NamedTuple):
    """What a rank is to be.

    Args:
        config: Options of the engine, resolved for the device.
        directory: The checkpoint.
        rank: Number of the rank, from 1.
        meeting: See `TensorParallel.connect`.
    """

    config: EngineConfig
    directory: Path
    rank: int
    meeting: Path


class Ready(NamedTuple):
    """A rank has come a step further: it has started, or its model is loaded."""


class Failed(NamedTuple):
    """A rank cannot go on, and ends."""

    error: Exception


MetT = TypeVar("MetT")

End = None
"""Tells a rank to end."""


class RankProcesses:
    """All ranks but the first, which this process is. See `runners.parallel.Ranks`.

    A thread listens to them. When one dies or fails it ends the others: whoever waits for them, in
    whatever library, is let go by that.

    Args:
        config: Options, resolved for the device.
        directory: The checkpoint.

    Attributes:
        meeting: See `TensorParallel.connect`.
        abort: Called when they are ended, perhaps from that thread.
    """

    def __init__(self, config: EngineConfig, directory: Path) -> None:
        self._scratch = tempfile.mkdtemp(prefix="nanovllm-ranks-")  # nobody else may enter
        self.meeting = Path(self._scratch, "meeting")
        self.abort: Callable[[], None] = lambda: None
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._num_ready = 0
        self._is_loaded = self._closed = False
        self._failure: Exception | None = None
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        try:
            for _ in range(1, config.tensor_parallel_size):
                self._start_process()
        except BaseException:
            self._thread.start()
            self.close()
            raise
        self._thread.start()
        for rank, link in enumerate(self._processes, 1):
            with contextlib.suppress(OSError):  # it has died: `wait_until_ready` knows more
                link.send(Task(config, directory, rank, self.meeting))

    def _start_process(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        # Not by `multiprocessing`, which would run the caller's script again. Its end of the pipe
        # tells a process when we are gone.
        process = subprocess.Popen(
            [*COMMAND, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=not _ignores_signals(),
        )
        self._processes[ours] = process
        theirs.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def wait_until_ready(self) -> None:
        """Return once each has come a step further since the last call.

        Raises:
            Exception: What one of them failed with, or a `RankDiedError`.
        """
        with self._changed:
            num_ready = len(self._processes)
            self._changed.wait_for(lambda: self._failure or self._num_ready >= num_ready)
            if self._failure is not None:
                raise self._failure
            self._num_ready -= num_ready

    def meet(self, connect: Callable[[], MetT]) -> MetT:
        """Wait for the ranks in a way that would go on for long if one were lost.

        Raises:
            Exception: What one of them failed with, or a `RankDiedError`, or what `connect` raised.
        """
        ended: list[Callable[[], MetT]] = []

        def run() -> None:
            outcome = _outcome(connect)
            with self._changed:
                ended.append(outcome)
                self._changed.notify_all()

        threading.Thread(target=run, daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._failure or ended)
            if self._failure is not None:
                raise self._failure
        return ended[0]()

    def loaded(self) -> None:
        """Wait for all models to be loaded; what fails from now on is no error of the caller's."""
        self.wait_until_ready()
        self._is_loaded = True

    def check(self) -> None:
        """See `Ranks.check`."""
        if self._failure is not None:
            raise RankDiedError(str(self._failure))
        if self._closed:
            raise RankDiedError("the tensor-parallel ranks have been ended")

    def send(self, call: "Call") -> None:
        """See `Ranks.send`."""
        self.check()
        try:
            for link in self._processes:
                link.send(call)
        except OSError as e:
            raise self.lost() from e

    def lost(self) -> RankDiedError:
        """See `Ranks.lost`."""
        unknown = RankDiedError("a tensor-parallel rank does not answer")
        return RankDiedError(str(self.failure() or self.fail(unknown)))

    def failure(self, timeout: float = 10 * GRACE) -> Exception | None:
        """What happened to one of them, waiting a little for it to be known."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure, timeout)
        return self._failure

    def fail(self, error: Exception) -> Exception:
        """See `Ranks.fail`."""
        with self._changed:
            failure = self._failure = self._failure or error
            self._changed.notify_all()
        self._kill()
        self.abort()
        return failure

    def close(self) -> None:
        """See `Ranks.close`."""
        if os.getpid() != self._pid:  # a fork of this process ends, and they are not its own
            return
        self._closed = True
        for link in self._processes:
            with contextlib.suppress(OSError):
                link.send(End)
        deadline = time.monotonic() + END_TIMEOUT
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        self._kill()
        self.abort()
        if threading.current_thread() is not self._thread:  # the garbage collector's choice
            self._thread.join(END_TIMEOUT)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    def _listen(self) -> None:
        """Hear the processes until all have ended."""
        troubles: dict[int, Exception] = {}
        ranks = {link: rank for rank, link in enumerate(self._processes, 1)}
        open_links, deadline = set(ranks), math.inf
        while open_links and (left := deadline - time.monotonic()) > 0:
            for link in wait(open_links, None if left == math.inf else left):
                if isinstance(link, Connection) and not self._hear(link, ranks[link], troubles):
                    open_links.remove(link)
            if troubles and deadline == math.inf:
                deadline = time.monotonic() + GRACE
        if troubles and not self._closed:
            # Those who only miss another one do not know why.
            cause = min(troubles.values(), key=lambda error: isinstance(error, _MissingError))
            self.fail(cause.known if isinstance(cause, _MissingError) else cause)
        for link in ranks:
            link.close()

    def _hear(self, link: Connection, rank: int, troubles: dict[int, Exception]) -> bool:
        """Take what a process says; False if it has ended."""
        process = self._processes[link]
        name = f"tensor-parallel rank {rank} (pid {process.pid})"
        try:
            message = link.recv()
        except (EOFError, OSError):
            code = _exit_code(process)
            if not self._closed and rank not in troubles:
                how = "its link is closed" if code is None else f"exit code {code}"
                troubles[rank] = RankDiedError(f"{name} died: {how}")
            return False
        if isinstance(message, Failed):
            error: Exception = message.error
            if isinstance(error, RankDiedError):
                error = _MissingError(error)
            elif self._is_loaded:
                error = RankDiedError(f"{name} failed: {type(error).__name__}: {error}")
            troubles[rank] = error
        else:
            with self._changed:
                self._num_ready += 1
                self._changed.notify_all()
        return True


def _ignores_signals() -> bool:
    """Whether we are an engine process, whose ranks stay in its group, to be ended with it.

    They inherit that it ignores what is sent to the group. In other programs Ctrl-C is for the
    program alone, and ranks have a session of their own.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    return all(signal.getsignal(number) == signal.SIG_IGN for number in numbers)


class _MissingError(Exception):
    """A rank's complaint that it misses another."""

    def __init__(self, known: RankDiedError) -> None:
        super().__init__(str(known))
        self.known = known


def _outcome(call: Callable[[], MetT]) -> Callable[[], MetT]:
    """Returns or raises what a call does."""
    try:
        result = call()
    except Exception as e:  # noqa: BLE001  # for whoever waits
        error = e

        def fail() -> MetT:
            raise error

        return fail
    return lambda: result


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """How a process ended that has closed its link; None if it still runs."""
    try:
        return process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        return None


def portable(error: Exception) -> Exception:
    """An error that can be sent: itself if it is Python's or ours, or what it says."""
    if type(error).__module__ in ("builtins", InvalidRequestError.__module__):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def link_of_rank(descriptor: int) -> Connection:
    """A rank's end of its link to the first one."""
    os.set_inheritable(descriptor, False)
    return Connection(descriptor)


def listen(link: Connection, calls: "queue.SimpleQueue[Any]") -> None:
    """Pass on what the first rank says; end at once when it says so, or has closed the link."""
    meeting: Path | None = None
    try:
        while (call := link.recv()) is not End:
            if isinstance(call, Task):
                meeting = call.meeting
            calls.put(call)
    except (EOFError, OSError):  # it was killed, and could not clear away what it has made
        if meeting is not None:
            shutil.rmtree(meeting.parent, ignore_errors=True)
    os._exit(0)
