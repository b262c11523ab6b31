"""The link and the books of a worker, without a process."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import EngineConfig, SamplingParams
from nanovllm.batch import EngineOutput, TextPayload, TextRequest, TokenScores
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import EngineStats, LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import InvalidRequestError
from nanovllm.worker.load import EXPECTED_OUTPUT_TOKENS, EngineRequest, WorkerLoad
from nanovllm.worker.messages import (
    AbortSequences,
    AddRequest,
    Failed,
    FromWorker,
    LogRecord,
    News,
    Shutdown,
    Start,
    Started,
    ToWorker,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from nanovllm.worker.process import MAX_FAILED_STEPS, EngineLoop, visible_device
from tests.fake_runners import AsyncFakeRunner, FakeText, InjectedError

PARAMS = SamplingParams(
    n=2, stop=["a"], logit_bias={3: -1.5}, stop_token_ids=[7], max_tokens=None, seed=2**63
)
SCORES = TextPayload(TokenScores([1, 2], [-0.5, -1.0], 1), [None, TokenScores([3], [-2.0], 4)])


@pytest.mark.parametrize(
    "message",
    [
        Start(EngineConfig(model="m", hf_token="secret"), "/dir", 1, [0, 2], 2.0),
        AddRequest(5, [1, 2, 3], PARAMS, -1, "salt", TextRequest(frozenset({1}), ((2, 3),))),
        AbortSequences([1, 2]),
        Shutdown(),
    ],
)
def test_what_goes_to_a_worker_comes_out_as_it_went_in(message: ToWorker) -> None:
    assert decode_to_worker(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Started(EngineConfig(), 100, 512),
        Failed("InvalidRequestError", "no"),
        News(
            [
                EngineOutput(1, 42, SCORES, None, None, 16, 1.5),
                EngineOutput(2, b"digest", None, "stop", "END", 0, None),
                EngineOutput(3, None, None, "error", 7),
            ],
            EngineStats(num_running=3),
            17,
            2,
        ),
        LogRecord("nanovllm.x", 20, "hello"),
    ],
)
def test_what_comes_from_a_worker_comes_out_as_it_went_in(message: FromWorker) -> None:
    assert decode_from_worker(encode(message)) == message


def request(first_seq_id: int = 0, num_prompt: int = 10, **params: Any) -> EngineRequest:
    sampling = SamplingParams(**({"max_tokens": 4} | params))
    message = AddRequest(first_seq_id, [1] * num_prompt, sampling, 0, None, TextRequest())
    return EngineRequest(message)


def books(load: WorkerLoad) -> tuple[int, int, int]:
    return load.num_inflight, load.outstanding_tokens, load.waiting_tokens


def test_a_request_is_its_prompt_and_the_output_expected_of_it() -> None:
    load = WorkerLoad()
    load.open(request(n=2))
    assert books(load) == (1, 10 + 8, 10)
    load.take([EngineOutput(0, 5)])
    assert books(load) == (1, 7, 0)
    load.take([EngineOutput(0, 5, None, "stop"), EngineOutput(1, 5)])
    assert books(load) == (1, 5, 0)
    load.take([EngineOutput(1, 5, None, "length")])
    assert books(load) == (0, 0, 0)


@pytest.mark.parametrize("max_tokens", [None, 100_000])
def test_an_output_without_a_near_end_counts_so_much_and_no_more(max_tokens: int | None) -> None:
    load = WorkerLoad()
    load.open(request(max_tokens=max_tokens))
    assert load.outstanding_tokens == 10 + EXPECTED_OUTPUT_TOKENS
    load.take([EngineOutput(0, 5)] * (EXPECTED_OUTPUT_TOKENS + 10))
    assert books(load) == (1, 0, 0)


def test_only_what_is_open_can_be_closed() -> None:
    load = WorkerLoad()
    load.open(request())
    assert load.close(0)
    assert not load.close(0)
    assert not load.close(99)
    load.take([EngineOutput(0, 5), EngineOutput(99, 5, None, "stop")])
    assert books(load) == (0, 0, 0)


@given(st.data())
def test_whatever_happens_the_books_end_at_zero(data: st.DataObject) -> None:
    load, next_id = WorkerLoad(), 0
    for _ in range(data.draw(st.integers(1, 20))):
        kind = data.draw(st.sampled_from(["open", "key", "finish", "close"]))
        if kind == "open":
            n = data.draw(st.integers(1, 3))
            load.open(request(next_id, data.draw(st.integers(1, 9)), n=n))
            next_id += n
        elif load.sequences:
            seq_id = data.draw(st.sampled_from(sorted(load.sequences)))
            if kind == "close":
                load.close(seq_id)
            else:
                load.take([EngineOutput(seq_id, 1, None, "stop" if kind == "finish" else None)])
        assert min(books(load)) >= 0
    for seq_id in list(load.sequences):
        load.close(seq_id)
    assert books(load) == (0, 0, 0)


class FakeLink:
    """A link with a script: each entry is what one call of `receive` finds."""

    def __init__(self, script: list[list[ToWorker]]) -> None:
        self.script = script
        self.sent: list[FromWorker] = []
        self.timeouts: list[float | None] = []

    def receive(self, timeout: float | None) -> Iterator[ToWorker]:
        self.timeouts.append(timeout)
        yield from self.script.pop(0) if self.script else [Shutdown()]

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)


def make_loop(script: list[list[ToWorker]]) -> tuple[EngineLoop, FakeLink, AsyncFakeRunner]:
    runner = AsyncFakeRunner(64, 4, 4, 16, 32)
    engine = LLMEngine(runner, Scheduler(BlockManager(64, 4), 4, 16), max_model_len=32)
    link = FakeLink(script)
    return EngineLoop(engine, link, 0), link, runner  # type: ignore[arg-type]


def add(first_seq_id: int, num_prompt: int = 3, **params: Any) -> AddRequest:
    sampling = SamplingParams(**({"max_tokens": 3, "ignore_eos": True} | params))
    return AddRequest(first_seq_id, [5] * num_prompt, sampling, 0, None, FakeText(ignores_eos=True))  # type: ignore[arg-type]


def outcomes(link: FakeLink) -> dict[int, str]:
    news = [
        output for message in link.sent if isinstance(message, News) for output in message.outputs
    ]
    return {output.seq_id: output.finish_reason for output in news if output.finish_reason}


def test_the_loop_reports_each_step_and_then_waits() -> None:
    loop, link, _ = make_loop([[add(10, n=2)], [], []])
    loop.run()
    assert outcomes(link) == {10: "length", 11: "length"}
    assert link.timeouts == [None, 0, 0, None]
    last = link.sent[-1]
    assert isinstance(last, News)
    assert (last.stats.num_running, last.stats.num_used_blocks) == (0, 0)


def test_an_abort_frees_what_the_sequence_holds() -> None:
    loop, link, _ = make_loop([[add(0, max_tokens=20)], [], [AbortSequences([0, 5])]])
    loop.run()
    assert outcomes(link) == {}
    last = link.sent[-1]
    assert isinstance(last, News)
    assert (last.stats.num_running, last.stats.num_used_blocks) == (0, 0)


def test_every_message_is_answered_with_how_many_there_were() -> None:
    loop, link, _ = make_loop([[add(0, max_tokens=1)], [AbortSequences([7]), AbortSequences([8])]])
    loop.run()
    handled = [message.num_handled for message in link.sent if isinstance(message, News)]
    assert handled == [1, 3, 4]


def test_an_id_may_be_below_those_before_it() -> None:
    """Requests that stood in line have lower ids than those that passed them."""
    loop, link, _ = make_loop([[add(5, max_tokens=2), add(0)], [], [], []])
    loop.run()
    assert outcomes(link) == {5: "length", 0: "length"}


def test_an_id_that_is_taken_is_refused() -> None:
    loop, link, _ = make_loop([[add(5), add(4, n=2)]])
    loop.run()
    assert outcomes(link)[4] == "error"


def test_what_no_message_can_hold_is_refused_before_it_is_sent() -> None:
    with pytest.raises(OverflowError):
        request(max_tokens=2**70)
    with pytest.raises(UnicodeEncodeError):
        request(stop=["\ud800"])


def test_a_device_is_one_of_those_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_device(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5")
    assert visible_device(1) == "GPU-5"
    with pytest.raises(InvalidRequestError, match="device 2 is not among the 2"):
        visible_device(2)


def test_a_request_that_the_engine_refuses_ends_with_an_error() -> None:
    loop, link, _ = make_loop([[add(0, num_prompt=99, n=2)]])
    loop.run()
    assert outcomes(link) == {0: "error", 1: "error"}


def test_a_failed_step_ends_its_sequences_and_the_loop_goes_on() -> None:
    loop, link, runner = make_loop([[add(0)], [add(3)], [], [], [], []])
    runner.fail_launch = {0}
    loop.run()
    assert outcomes(link) == {0: "error", 3: "length"}


@pytest.mark.parametrize("pauses", [[], [[]], [[], []]])
def test_steps_that_all_fail_end_the_worker(pauses: list[list[ToWorker]]) -> None:
    """However much time there is between the requests that fail."""
    script: list[list[ToWorker]] = []
    for i in range(2 * MAX_FAILED_STEPS):
        script += [[add(i)], *pauses]
    loop, _, runner = make_loop(script)
    runner.fail_launch = set(range(100))
    with pytest.raises(InjectedError):
        loop.run()
