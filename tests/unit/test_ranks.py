"""Processes of tensor-parallel ranks, played by scripts: who died, who says so, who is left."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from nanovllm import SamplingParams
from nanovllm.batch import Batch, SlotStart, StepResult, TextRequest
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError, RankDiedError
from nanovllm.runners.parallel import Call, Collect, Launch, LoadAdapter, ParallelRunner, follow
from nanovllm.worker import ranks
from nanovllm.worker.ranks import RankProcesses

PLAY = """
import os, sys, time
from nanovllm.errors import InvalidRequestError, RankDiedError
from nanovllm.worker.ranks import Failed, Ready, link_of_rank, portable
class Odd(Exception):
    def __init__(self, a, b): super().__init__(a + b)
link = link_of_rank(int(sys.argv[1]))
"""
FAILS = "link.send(Ready()); link.send(Failed(InvalidRequestError('a bad model', 'model')))"
MISSES = """
link.send(Ready())
if rank == 1: time.sleep(.1); os._exit(3)
link.send(Failed(RankDiedError(f'rank {rank} lost another one')))
"""
ODD = "link.send(Failed(portable(Odd('too', ' odd'))))"
OBEYS = "link.send(Ready()); link.send(Ready())\nwhile (call := link.recv()) is not None: pass"
LIVES = "link.send(Ready()); link.send(Ready()); time.sleep(100)"
CRASHES = "link.send(Ready()); link.send(Ready()); link.recv(); os.abort()"

CALL: Any = 7
Start = Callable[..., RankProcesses]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    started: list[RankProcesses] = []

    def run(script: str, size: int = 2) -> RankProcesses:
        played = PLAY + "rank = link.recv().rank\n" + script
        monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-c", played))
        started.append(RankProcesses(EngineConfig(tensor_parallel_size=size), Path("/model")))
        return started[-1]

    yield run
    for processes in started:
        processes.close()
        assert not any(map(psutil.pid_exists, processes.pids))
        assert not processes.meeting.parent.exists()


def ended(pid: int) -> bool:
    """Whether a process comes to its end, though perhaps nobody has asked how."""
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_twice(processes: RankProcesses) -> None:
    processes.wait_until_ready()
    processes.wait_until_ready()


def test_ranks_are_told_and_end(start: Start) -> None:
    processes = start(OBEYS, 3)
    assert processes.meeting.parent.stat().st_mode & 0o777 == 0o700
    processes.wait_until_ready()
    assert processes.meet(lambda: 7) == 7
    processes.loaded()
    processes.send(CALL)
    processes.check()
    aborted: list[bool] = []
    processes.abort = lambda: aborted.append(True)
    begun = time.monotonic()
    processes.close()
    assert time.monotonic() - begun < 2
    assert aborted
    with pytest.raises(RankDiedError, match="have been ended"):
        processes.check()


def test_a_fork_that_ends_leaves_the_ranks(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = start(OBEYS)
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: -1)
        processes.close()
    wait_twice(processes)
    processes.send(CALL)


def test_what_fails_while_loading_is_raised_as_it_is(start: Start) -> None:
    processes = start(FAILS)
    with pytest.raises(InvalidRequestError, match="a bad model") as caught:
        wait_twice(processes)
    assert caught.value.param == "model"
    with pytest.raises(InvalidRequestError):  # who waits for something else is let go, too
        processes.meet(lambda: time.sleep(20))


def test_what_connecting_raises_is_raised(start: Start) -> None:
    def connect() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        start(OBEYS).meet(connect)


def test_an_error_that_cannot_be_sent_is_told(start: Start) -> None:
    with pytest.raises(RuntimeError, match="Odd: too odd"):
        start(ODD).wait_until_ready()


def test_a_rank_that_dies_is_named(start: Start) -> None:
    processes = start(LIVES, 3)
    aborted: list[bool] = []
    processes.abort = lambda: aborted.append(True)
    processes.wait_until_ready()
    processes.loaded()
    os.kill(processes.pids[1], 9)
    begun = time.monotonic()
    message = rf"tensor-parallel rank 2 \(pid {processes.pids[1]}\) died: exit code -9"
    assert str(processes.failure()).startswith("tensor-parallel rank 2")
    for call in (processes.check, lambda: processes.send(CALL)):
        with pytest.raises(RankDiedError, match=message):
            call()
    assert str(processes.lost()) == str(processes.fail(RuntimeError("later")))
    assert time.monotonic() - begun < 2
    for pid in processes.pids:  # the others go with it
        assert ended(pid)
    processes.close()
    assert aborted


def test_who_died_is_named_and_not_who_misses_it(start: Start) -> None:
    processes = start(MISSES, 4)
    with pytest.raises(RankDiedError, match=r"rank 1 \(pid \d+\) died: exit code 3"):
        wait_twice(processes)


def test_a_crash_while_running_is_told(start: Start) -> None:
    processes = start(CRASHES)
    processes.wait_until_ready()
    processes.loaded()
    processes.send(CALL)
    assert "rank 1" in str(processes.lost())
    assert "exit code -6" in str(processes.lost())


def test_a_rank_that_does_not_answer_is_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.02)
    processes = start(LIVES)
    processes.wait_until_ready()
    processes.loaded()
    assert "does not answer" in str(processes.lost())
    with pytest.raises(RankDiedError, match="does not answer"):
        processes.check()


def test_a_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ranks, "COMMAND", ("/nowhere/python",))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        RankProcesses(EngineConfig(tensor_parallel_size=2), Path("/model"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "sys.exit(1)", "os._exit(0)"])
def test_no_rank_outlives_the_first(how: str) -> None:
    script = f"""
import os, sys
from pathlib import Path
from typing import Any
from nanovllm.config import EngineConfig
from nanovllm.worker import ranks
ranks.COMMAND = (sys.executable, "-c", {PLAY + LISTENS!r})
processes = ranks.RankProcesses(EngineConfig(tensor_parallel_size=3), Path("/model"))
processes.wait_until_ready()
print(processes.meeting.parent, *processes.pids, flush=True)
{how}
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    scratch, *pids = run.stdout.split()
    assert len(pids) == 2, run.stderr
    assert all(ended(int(pid)) for pid in pids)
    assert not Path(scratch).exists()


LISTENS = """
import queue, threading
from nanovllm.worker.ranks import listen
threading.Thread(target=listen, args=(link, queue.SimpleQueue()), daemon=True).start()
link.send(Ready())
time.sleep(100)
"""


class Recorder:
    """Plays the other ranks, and a runner."""

    num_kv_blocks, max_model_len, block_size, grammars, adapters = 7, 32, 4, None, None

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.error: Exception | None = None
        self.action: Callable[[], None] = lambda: None
        self.num_closed = 0

    def check(self) -> None:
        if self.error is not None:
            raise RankDiedError(str(self.error))

    def send(self, call: Call) -> None:
        self.check()
        self.sent.append(pickle.loads(pickle.dumps(call)))

    def lost(self) -> RankDiedError:
        return RankDiedError("rank 5 died")

    def fail(self, error: Exception) -> Exception:
        self.error = self.error or error
        return self.error

    def close(self) -> None:
        self.num_closed += 1

    def launch(self, batch: Batch) -> int:
        self.sent.append("launched")
        self.action()
        return batch.step

    def collect(self, step: int) -> list[StepResult]:
        self.action()
        return [StepResult(0, step)]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def runner(recorder: Recorder) -> ParallelRunner:
    return ParallelRunner(recorder, recorder)  # type: ignore[arg-type]


def test_every_rank_does_what_the_first_does(recorder: Recorder, runner: ParallelRunner) -> None:
    compiling: Future[Any] = Future()  # which cannot be pickled
    request = TextRequest(grammar="start: /a/", matcher=compiling)
    start = SlotStart(0, [1, 2], 2, SamplingParams(), 0, 0, None, request)
    handle = runner.launch(Batch(5, started=[start]))
    assert runner.collect(handle) == [StepResult(0, 5)]
    launch, launched, collect = recorder.sent
    assert (launched, collect) == ("launched", Collect(launch.number))
    assert launch.batch.started == [replace(start, payload=TextRequest(grammar="start: /a/"))]
    assert start.payload is request
    assert (runner.num_kv_blocks, runner.max_model_len, runner.block_size) == (7, 32, 4)


def raises(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_an_error_of_the_first_rank_ends_the_others(
    recorder: Recorder, runner: ParallelRunner
) -> None:
    recorder.action = raises(MemoryError("no room"))
    with pytest.raises(MemoryError):
        runner.launch(Batch(0))
    with pytest.raises(RankDiedError, match="rank 0 failed: MemoryError: no room"):
        runner.launch(Batch(1))
    with pytest.raises(RankDiedError, match="rank 0 failed"):
        runner.check_alive()


def test_an_error_that_follows_from_the_end_of_a_rank_is_that(
    recorder: Recorder, runner: ParallelRunner
) -> None:
    handle = runner.launch(Batch(0))
    recorder.action = raises(RankDiedError("rank 0 lost another one"))
    with pytest.raises(RankDiedError, match="rank 5 died"):
        runner.collect(handle)

    def abort() -> None:  # as a device does whose communication is given up
        recorder.error = RankDiedError("rank 5 died")
        raise RuntimeError("device error")

    recorder.action = abort
    with pytest.raises(RankDiedError, match="rank 5 died"):
        runner.collect(handle)


def test_results_from_after_the_end_of_a_rank_are_not_used(
    recorder: Recorder, runner: ParallelRunner
) -> None:
    handle = runner.launch(Batch(0))
    recorder.action = lambda: setattr(recorder, "error", RankDiedError("rank 5 died"))
    with pytest.raises(RankDiedError, match="rank 5 died"):
        runner.collect(handle)


def test_an_interrupt_waits(recorder: Recorder, runner: ParallelRunner) -> None:
    ended = []

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(True)

    recorder.action = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        runner.launch(Batch(0))
    assert ended
    assert signal.getsignal(signal.SIGINT) is before
    recorder.action = lambda: None
    runner.launch(Batch(1))
    with ThreadPoolExecutor() as pool:  # where there are no signals
        pool.submit(runner.launch, Batch(2)).result()


def test_an_interrupt_waits_while_the_ranks_are_told(
    recorder: Recorder, runner: ParallelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = recorder.send

    def interrupted(call: Call) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        send(call)

    monkeypatch.setattr(recorder, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.launch(Batch(0))
    assert recorder.sent[1:] == ["launched"]


def test_a_runner_that_is_dropped_ends_the_ranks(recorder: Recorder) -> None:
    runner = ParallelRunner(recorder, recorder)  # type: ignore[arg-type]
    del runner
    gc.collect()
    assert recorder.num_closed == 1
    other = ParallelRunner(recorder, recorder)  # type: ignore[arg-type]
    other.close()
    other.close()
    assert recorder.num_closed == 2


def test_steps_that_were_dropped_are_not_collected(recorder: Recorder) -> None:
    steps: list[Call] = [Launch(number, Batch(10 + number)) for number in range(3)]
    calls = iter([*steps, Collect(2)])
    collected = []
    recorder.collect = lambda step: collected.append(step) or []  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(StopIteration):
        follow(recorder, lambda: next(calls))  # type: ignore[arg-type]
    assert collected == [12]
    with pytest.raises(RuntimeError, match="no adapters"):
        follow(recorder, lambda: LoadAdapter(1, Path("/a")))  # type: ignore[arg-type]
