"""The link and the books of a worker, without a process."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import EngineConfig, SamplingParams
from nanovllm.batch import (
    EngineOutput,
    Key,
    SpeechPayload,
    SpeechRequest,
    TextPayload,
    TextRequest,
    TokenScores,
)
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import EngineStats, LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import InvalidRequestError
from nanovllm.worker.calls import IDLE_SLICE, STEP_SHARE, Calls
from nanovllm.worker.load import EXPECTED_OUTPUT_TOKENS, EngineRequest, WorkerLoad
from nanovllm.worker.messages import (
    AbortSequences,
    AddRequest,
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
    ToWorker,
    UnloadAdapter,
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
        Start(EngineConfig(model="m", hf_token="secret"), "/dir", [1], [0, 2], 2.0),
        AddRequest(5, [1, 2, 3], PARAMS, -1, "salt", TextRequest(frozenset({1}), ((2, 3),))),
        AddRequest(5, [1, b"patch", 101], PARAMS, 0, None, SpeechRequest(b"1234", 1.5), 3),
        AbortSequences([1, 2]),
        PauseSequences([1, 2], True),
        EncodeAudio(1, b"samples"),
        LoadAdapter(2, 7, "/dir"),
        UnloadAdapter(3, 7),
        Shutdown(),
    ],
)
def test_what_goes_to_a_worker_comes_out_as_it_went_in(message: ToWorker) -> None:
    assert decode_to_worker(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Started(EngineConfig().resolved_for("cpu"), 100, 512),
        Failed("InvalidRequestError", "no"),
        News(
            [
                EngineOutput(1, 42, SCORES, None, None, 16, 1.5),
                EngineOutput(2, b"digest", None, "stop", "END", 0, None),
                EngineOutput(3, None, None, "error", 7),
                EngineOutput(4, b"digest", SpeechPayload(b"audio", b"latents"), "length"),
            ],
            EngineStats(num_running=3),
            17,
            2,
        ),
        Answer(1, b"latents"),
        Answer(2, kind="InvalidRequestError", message="no"),
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


def make_loop(
    script: list[list[ToWorker]], callee: "FakeCallee | None" = None
) -> tuple[EngineLoop, FakeLink, AsyncFakeRunner]:
    runner = AsyncFakeRunner(64, 4, 4, 16, 32)
    engine = LLMEngine(runner, Scheduler(BlockManager(64, 4), 4, 16), max_model_len=32)
    link = FakeLink(script)
    loop = EngineLoop(engine, link, 0, callee or FakeCallee())  # type: ignore[arg-type]
    return loop, link, runner


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


def test_a_loop_whose_sequences_are_all_paused_waits() -> None:
    loop, link, runner = make_loop(
        [
            [add(0, max_tokens=3), add(1, max_tokens=3)],
            [PauseSequences([0, 1, 9], True)],
            [],
            [PauseSequences([1], False)],
            [],
        ]
    )
    loop.run()
    assert link.timeouts == [None, 0, None, None, 0, None]
    assert outcomes(link) == {1: "length"}
    last = link.sent[-1]
    assert isinstance(last, News)
    assert (last.stats.num_paused, last.stats.num_running) == (1, 1)
    assert runner.num_launched == 3


class FakeEncoding:
    """A recording whose frames each take so many seconds of a clock that stands otherwise."""

    def __init__(
        self, clock: "FakeClock", num_frames: int, frame_time: float, fails: bool = False
    ) -> None:
        self.clock, self.num_frames_left, self.frame_time = clock, num_frames, frame_time
        self.fails = fails
        self.slices: list[int] = []

    def advance(self, num_frames: int) -> None:
        if self.fails:
            raise RuntimeError("a bug")
        assert 1 <= num_frames <= self.num_frames_left
        self.num_frames_left -= num_frames
        self.clock.now += num_frames * self.frame_time
        self.slices.append(num_frames)

    def latents(self) -> bytes:
        return b"latents of %d" % sum(self.slices)


class FakeClock:
    """Time that passes when somebody says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeCallee:
    """Encodes what is registered by its audio; its adapters are a dictionary."""

    def __init__(self) -> None:
        self.encodings: dict[bytes, FakeEncoding] = {}
        self.adapters: FakeAdapters | None = FakeAdapters()

    def check(self, keys: Sequence[Key], payload: object) -> None:
        if 99 in keys:
            raise InvalidRequestError(f"99 with {payload!r:.20}")

    def encode(self, audio: bytes) -> FakeEncoding:
        if audio not in self.encodings:
            raise InvalidRequestError("no such audio")
        return self.encodings[audio]


class FakeAdapters(dict[int, Path]):
    """Adapters as they come from directories."""

    def load(self, adapter_id: int, directory: Path) -> list[str]:
        if directory == Path("missing"):
            raise FileNotFoundError("nothing there")
        if directory == Path("broken"):
            raise RuntimeError("a bug")
        self[adapter_id] = directory
        return ["a", "b"]

    def unload(self, adapter_id: int) -> None:
        del self[adapter_id]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("nanovllm.worker.calls.time", clock)
    return clock


def make_calls(callee: FakeCallee) -> tuple[Calls, list[Answer]]:
    answers: list[Answer] = []
    return Calls(callee, answers.append), answers


@pytest.mark.parametrize("frame_time", [0.001, 0.003, 0.05])
def test_a_recording_gets_its_share_of_the_steps(clock: FakeClock, frame_time: float) -> None:
    callee = FakeCallee()
    callee.encodings[b"a"] = FakeEncoding(clock, 100, frame_time)
    calls, answers = make_calls(callee)
    calls.take(EncodeAudio(5, b"a"))
    num_steps = 0
    while calls.is_busy:
        begun = clock.now
        calls.advance_after(0.1)
        num_steps += 1
        assert clock.now - begun <= max(frame_time, STEP_SHARE * 0.1) + 1e-9
    assert answers == [Answer(5, b"latents of 100")]
    assert clock.now == pytest.approx(100 * frame_time)
    share = clock.now / (0.1 * num_steps)
    assert 0.8 * STEP_SHARE < share < 1.1 * STEP_SHARE


def test_recordings_take_turns_and_an_idle_engine_encodes_in_long_slices(clock: FakeClock) -> None:
    callee = FakeCallee()
    long = callee.encodings[b"long"] = FakeEncoding(clock, 1000, 0.01)
    short = callee.encodings[b"short"] = FakeEncoding(clock, 20, 0.01)
    calls, answers = make_calls(callee)
    calls.take(EncodeAudio(1, b"long"))
    calls.take(EncodeAudio(2, b"short"))
    while not answers:
        begun = clock.now
        calls.advance_idle()
        assert clock.now - begun <= IDLE_SLICE + 1e-9
    assert answers == [Answer(2, b"latents of 20")]
    assert sum(long.slices) < 40
    assert max(short.slices) * 0.01 == pytest.approx(IDLE_SLICE)


def test_a_recording_nobody_waits_for_is_dropped_and_answered_once(clock: FakeClock) -> None:
    callee = FakeCallee()
    for name in (b"left", b"wanted"):
        callee.encodings[name] = FakeEncoding(clock, 20, 0.01)
    loop, link, _ = make_loop(
        [
            [EncodeAudio(1, b"left"), EncodeAudio(2, b"wanted")],
            [CancelCall(1)],
            *[[]] * 20,
            [CancelCall(1), CancelCall(2)],
        ],
        callee,
    )
    loop.run()
    answers = [sent for sent in link.sent if isinstance(sent, Answer)]
    assert answers == [Answer(1), Answer(2, b"latents of 20")]
    assert sum(callee.encodings[b"left"].slices) < 20


def test_what_cannot_be_done_is_answered_with_the_error(clock: FakeClock) -> None:
    callee = FakeCallee()
    callee.encodings[b"fails"] = FakeEncoding(clock, 2, 1, fails=True)
    calls, answers = make_calls(callee)
    calls.take(EncodeAudio(1, b"unknown"))
    calls.take(LoadAdapter(2, 7, "missing"))
    calls.take(LoadAdapter(3, 7, "broken"))
    calls.take(EncodeAudio(4, b"fails"))
    calls.advance_idle()
    kinds = [(answer.call_id, answer.kind) for answer in answers]
    assert kinds == [
        (1, "InvalidRequestError"),
        (2, "FileNotFoundError"),
        (3, "RuntimeError"),
        (4, "RuntimeError"),
    ]
    assert answers[1].message == "nothing there"
    assert not calls.is_busy


def test_what_a_model_has_not_is_answered_so() -> None:
    callee = FakeCallee()
    callee.adapters = None
    calls, answers = make_calls(callee)
    calls.take(EncodeAudio(1, b""))
    calls.take(UnloadAdapter(2, 7))
    assert [answer.kind for answer in answers] == ["InvalidRequestError"] * 2


def test_adapters_come_and_go_and_a_request_needs_its_own() -> None:
    callee = FakeCallee()
    calls, answers = make_calls(callee)
    adapted = AddRequest(0, [5], PARAMS, 0, None, SpeechRequest(), 7)
    with pytest.raises(InvalidRequestError, match="adapter with id 7 is not loaded"):
        calls.check(adapted)
    calls.take(LoadAdapter(1, 7, "/lora"))
    calls.check(adapted)
    calls.take(UnloadAdapter(2, 7))
    with pytest.raises(InvalidRequestError):
        calls.check(adapted)
    assert answers == [Answer(1, b"a\nb"), Answer(2)]


def test_what_the_runner_cannot_start_ends_alone() -> None:
    bad = AddRequest(1, [99], SamplingParams(), 0, None, TextRequest())
    loop, link, _ = make_loop([[add(0), bad]], FakeCallee())
    loop.run()
    assert outcomes(link)[1] == "error"


def test_the_loop_encodes_between_steps_and_looks_at_its_link_meanwhile(clock: FakeClock) -> None:
    callee = FakeCallee()
    callee.encodings[b"a"] = encoding = FakeEncoding(clock, 500, IDLE_SLICE / 10)
    script: list[list[ToWorker]] = [[EncodeAudio(8, b"a")], [], [add(0)]]
    loop, link, _ = make_loop(script + [[]] * 200, callee)
    loop.run()
    answer = next(index for index, sent in enumerate(link.sent) if isinstance(sent, Answer))
    assert link.sent[answer] == Answer(8, b"latents of 500")
    assert outcomes(link) == {0: "length"}
    assert len(encoding.slices) > 20
    # It waits for nothing as long as there is something to encode, and then for a request.
    assert link.timeouts[0] is None
    assert set(link.timeouts[1 : answer - 1]) == {0}
    assert link.timeouts[-1] is None
