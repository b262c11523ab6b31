"""Sequences that wait for their grammar in an engine process, without a process."""

from concurrent.futures import Future
from typing import Any, NamedTuple, cast

import pytest

from nanovllm import SamplingParams
from nanovllm.batch import EngineOutput, TextRequest
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.text.grammar_compiler import GrammarCompiler
from nanovllm.worker.forms import Forms
from tests.fake_runners import AsyncFakeRunner


class Payload(NamedTuple):
    """A text request that the fake runner understands, too."""

    grammar: str | None
    matcher: Any = None
    root: int = 0
    ignores_eos: bool = True
    num_forced: int = 0


class ScriptedCompiler:
    """Compiles when told to."""

    def __init__(self) -> None:
        self.known: dict[str, object] = {}

    def compiled(self, grammar: str) -> object | None:
        return self.known.get(grammar)

    def compile(self, grammar: str) -> object:
        raise AssertionError("in this test nothing reaches the thread")


class ScriptedThread:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, *work: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


class Worker:
    """An engine with a fake runner, and what holds its sequences back."""

    def __init__(self) -> None:
        runner = AsyncFakeRunner(64, 4, 4, 16, 32)
        self.engine = LLMEngine(runner, Scheduler(BlockManager(64, 4), 4, 16), max_model_len=32)
        self.compiler, self.thread = ScriptedCompiler(), ScriptedThread()
        self.forms = Forms(self.engine, cast(GrammarCompiler, self.compiler))
        self.forms._thread = self.thread  # type: ignore[assignment]

    def add(self, grammar: str | None, n: int = 1) -> list[int]:
        request = self.forms.prepare(cast(TextRequest, Payload(grammar)))
        seq_ids = self.engine.add(
            [5, 5], SamplingParams(n=n, max_tokens=3), schedules_ahead=False, payload=request
        )
        self.forms.hold(seq_ids, request)
        return seq_ids

    def work(self) -> list[EngineOutput]:
        """Step until there is nothing to do."""
        outputs = self.forms.settle()
        while self.engine.has_work:
            outputs += self.engine.step()
        return outputs


@pytest.fixture
def worker() -> Worker:
    return Worker()


def ended(outputs: list[EngineOutput]) -> dict[int, str]:
    return {output.seq_id: output.finish_reason for output in outputs if output.finish_reason}


def test_who_has_no_form_or_a_known_one_does_not_wait(worker: Worker) -> None:
    worker.compiler.known["g"] = object()
    (free,), (known,) = worker.add(None), worker.add("g")
    assert not worker.forms.is_busy
    assert ended(worker.work()) == {free: "length", known: "length"}


def test_others_run_while_one_waits(worker: Worker) -> None:
    waiting = worker.add("g", n=2)
    (free,) = worker.add(None)
    assert ended(worker.work()) == {free: "length"}
    assert worker.forms.is_busy
    assert worker.engine.stats().num_paused == 2
    worker.thread.futures[0].set_result(object())
    assert ended(worker.work()) == dict.fromkeys(waiting, "length")
    assert not worker.forms.is_busy


def test_who_waits_can_be_aborted(worker: Worker) -> None:
    (seq_id,) = worker.add("g")
    output = worker.engine.abort(seq_id)
    assert output is not None
    assert output.finish_reason == "abort"
    worker.thread.futures[0].set_result(object())
    assert worker.work() == []
    assert not worker.engine.has_unfinished


def test_a_failure_ends_its_own_sequences(worker: Worker) -> None:
    failing, good = worker.add("bad", n=2), worker.add("g")
    worker.thread.futures[0].set_exception(ValueError("too complex"))
    worker.thread.futures[1].set_result(object())
    outputs = worker.work()
    assert ended(outputs) == {**dict.fromkeys(failing, "error"), good[0]: "length"}
    assert {out.stop_reason for out in outputs if out.finish_reason == "error"} == {"too complex"}


def test_a_slow_reader_s_pause_and_the_wait_do_not_undo_each_other(worker: Worker) -> None:
    (seq_id,) = worker.add("g")
    worker.forms.pause([seq_id], True)
    worker.forms.pause([seq_id], False)
    assert worker.work() == []  # read again, and yet not compiled
    worker.forms.pause([seq_id], True)
    worker.thread.futures[0].set_result(object())
    assert worker.work() == []  # compiled, and yet not read
    worker.forms.pause([seq_id], False)
    assert ended(worker.work()) == {seq_id: "length"}


def test_a_pause_of_others_goes_through(worker: Worker) -> None:
    (waiting,), (free,) = worker.add("g"), worker.add(None)
    worker.forms.pause([waiting, free, 99], True)
    assert worker.work() == []
    worker.forms.pause([waiting, free, 99], False)
    assert ended(worker.work()) == {free: "length"}
    worker.engine.abort(waiting)
