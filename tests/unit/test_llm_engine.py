"""The engine around the scheduler: admission, steps in flight, failures, counters."""

import asyncio
import itertools
import logging
import signal
import time
from typing import Any

import pytest

from nanovllm.batch import EngineOutput, Key
from nanovllm.engine import block_manager, llm_engine, scheduler
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.interrupts import interrupts_held_back, interrupts_let_in
from nanovllm.sampling_params import SamplingParams
from tests.ctrl_c import ctrl_c_at_line
from tests.fake_runners import (
    AsyncFakeRunner,
    FakeRunner,
    FakeText,
    FakeVoice,
    InjectedError,
    InjectedInterrupt,
    SpeechFakeRunner,
)

BLOCK_SIZE = 4
PROMPT: list[Key] = [1, 2, 3, 4, 5]


class Harness:
    """An engine over a fake runner, and the news it gave."""

    def __init__(
        self,
        depth: int = 0,
        runner_class: type[FakeRunner] = AsyncFakeRunner,
        num_blocks: int = 32,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_num_adapters: int = 0,
        max_model_len: int = 40,
        **options: Any,
    ) -> None:
        self.runner = runner_class(
            num_blocks, BLOCK_SIZE, max_num_seqs, max_num_batched_tokens, max_model_len
        )
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens, max_num_adapters)
        self.engine = LLMEngine(
            self.runner,
            scheduler,
            max_model_len=max_model_len,
            async_scheduling=bool(depth),
            **options,
        )
        self.news: dict[int, list[EngineOutput]] = {}

    def add(self, keys: list[Key] | None = None, max_tokens: int | None = 6, **options: Any) -> int:
        """Queue a request of one sequence that no model ends."""
        voice = isinstance(self.runner, SpeechFakeRunner)
        payload = FakeVoice(never_stops=True) if voice else FakeText(ignores_eos=True)
        params = SamplingParams(max_tokens=max_tokens, seed=0)
        (seq_id,) = self.engine.add(keys or PROMPT, params, payload=payload, **options)
        return seq_id

    def step(self) -> list[EngineOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.news.setdefault(output.seq_id, []).append(output)
        return outputs

    def drain(self) -> dict[int, EngineOutput]:
        """Run to the end; returns the last news of each sequence."""
        for _ in range(1000):
            if not self.engine.has_unfinished:
                break
            self.step()
        assert not self.engine.has_unfinished
        assert self.blocks.num_free == self.blocks.num_blocks
        return {seq_id: outputs[-1] for seq_id, outputs in self.news.items()}

    def keys_of(self, seq_id: int) -> list[Key]:
        return [output.key for output in self.news[seq_id] if output.key is not None]


def test_an_empty_prompt_is_refused() -> None:
    harness = Harness()

    with pytest.raises(InvalidRequestError, match="the prompt is empty") as error:
        harness.engine.add([], SamplingParams())

    assert error.value.param == "prompt"
    assert not harness.engine.has_unfinished


@pytest.mark.parametrize("num_keys", [41, 1000])
def test_a_prompt_longer_than_the_context_is_refused(num_keys: int) -> None:
    harness = Harness(max_model_len=40)

    with pytest.raises(ContextLengthError) as error:
        harness.engine.add([1] * num_keys, SamplingParams())

    assert "40 tokens" in str(error.value)
    assert f"has {num_keys}" in str(error.value)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("max_tokens", [1, 6, None])
def test_a_prompt_that_fills_the_context_gives_one_key(depth: int, max_tokens: int | None) -> None:
    harness = Harness(depth, max_model_len=40, num_blocks=40 // BLOCK_SIZE)
    seq_id = harness.add([1] * 40, max_tokens)

    assert harness.drain()[seq_id].finish_reason == "length"

    assert len(harness.keys_of(seq_id)) == 1


def test_engines_of_opposite_seeds_draw_others() -> None:
    params, seeds = SamplingParams(max_tokens=1), []
    for seed in (1, -1):
        harness = Harness(seed=seed)
        harness.engine.add(PROMPT, params, payload=FakeText())
        (sequence,) = harness.engine.scheduler.waiting
        seeds.append(sequence.seed)
    assert seeds[0] != seeds[1]


def test_an_adapter_needs_an_engine_with_adapters() -> None:
    with pytest.raises(InvalidRequestError, match="without LoRA adapters") as error:
        Harness().engine.add(PROMPT, SamplingParams(), adapter_id=1)

    assert error.value.param == "adapter_id"


def test_the_longest_sequence_fits_the_cache() -> None:
    with pytest.raises(
        InvalidRequestError, match="max_model_len=41 does not fit a KV cache of 10 blocks of 4"
    ):
        Harness(num_blocks=10, max_model_len=41)
    Harness(num_blocks=10, max_model_len=40)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("num_keys", "max_tokens", "expected"),
    [(5, 6, 6), (5, 1, 1), (5, None, 35), (5, 1000, 35), (5, 35, 35), (39, None, 1), (39, 5, 1)],
)
def test_the_output_is_clipped_to_the_context(
    depth: int, num_keys: int, max_tokens: int | None, expected: int
) -> None:
    harness = Harness(depth, num_blocks=10, max_model_len=40)
    seq_id = harness.add([7] * num_keys, max_tokens)

    outcome = harness.drain()[seq_id]

    assert outcome.finish_reason == "length"
    assert len(harness.keys_of(seq_id)) == expected


def test_news_come_a_step_late_when_scheduling_ahead() -> None:
    sync, ahead = Harness(depth=0), Harness(depth=1)
    for harness in (sync, ahead):
        harness.add(max_tokens=3)

    assert [len(sync.step()) for _ in range(3)] == [1, 1, 1]
    assert [len(ahead.step()) for _ in range(4)] == [0, 1, 1, 1]
    assert ahead.runner.num_launched == 3
    assert sync.keys_of(0) == ahead.keys_of(0)
    assert sync.step() == ahead.step() == []


@pytest.mark.parametrize("runner_class", [AsyncFakeRunner, SpeechFakeRunner])
def test_results_do_not_depend_on_batch_mates(runner_class: type[FakeRunner]) -> None:
    alone = Harness(runner_class=runner_class)
    alone.add(max_tokens=20)
    alone.drain()
    crowded = Harness(1, runner_class, num_blocks=12, max_num_batched_tokens=5)
    for first_key in range(6):
        crowded.add([first_key, *PROMPT], 20, priority=-first_key % 3)
    seq_id = crowded.add(max_tokens=20)
    crowded.drain()

    assert crowded.engine.stats().num_preemptions > 0
    assert crowded.keys_of(seq_id) == alone.keys_of(0)


def test_completions_of_one_request_share_its_prompt() -> None:
    harness = Harness()
    params = SamplingParams(n=3, max_tokens=6, seed=5)

    seq_ids = harness.engine.add(PROMPT, params, payload=FakeText(ignores_eos=True))
    outcomes = harness.drain()

    assert seq_ids == [0, 1, 2]
    assert [outcomes[seq_id].num_cached for seq_id in seq_ids] == [0, BLOCK_SIZE, BLOCK_SIZE]
    assert len({tuple(harness.keys_of(seq_id)) for seq_id in seq_ids}) == 3


def test_prompt_scores_are_computed_by_one_completion() -> None:
    harness = Harness()
    harness.add(max_tokens=1)
    harness.drain()

    params = SamplingParams(n=2, max_tokens=1, prompt_logprobs=0)
    seq_ids = harness.engine.add(PROMPT, params, payload=FakeText())
    outcomes = harness.drain()

    assert [outcomes[seq_id].num_cached for seq_id in seq_ids] == [0, BLOCK_SIZE]


def test_salts_and_adapters_keep_prefixes_apart() -> None:
    harness = Harness(max_num_adapters=4)

    options: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"cache_salt": ""},
        {"adapter_id": 1},
        {"adapter_id": 2},
        {"adapter_id": 1, "cache_salt": "a"},
    ]

    for root, option in enumerate(options):
        seq_ids = []
        for _ in range(2):
            params = SamplingParams(max_tokens=1)
            # The fake checks what is read against the root.
            seq_ids += harness.engine.add(PROMPT, params, payload=FakeText(root), **option)
            outcomes = harness.drain()
        assert [outcomes[seq_id].num_cached for seq_id in seq_ids] == [0, BLOCK_SIZE]


@pytest.mark.parametrize("no_seed", [None, -1])
def test_a_seed_is_drawn_for_requests_without_one(no_seed: int | None) -> None:
    def seeds(engine_seed: int) -> list[int]:
        harness = Harness(seed=engine_seed)
        for _ in range(2):
            params = SamplingParams(n=2, seed=no_seed)
            harness.engine.add(PROMPT, params, payload=FakeText())
        return [seq.seed for seq in harness.engine.scheduler.waiting]

    first = seeds(1)

    assert first[0] == first[1] != first[2] == first[3]
    assert all(0 <= seed < 2**64 for seed in first)
    assert first == seeds(1) != seeds(2)


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (7, 7), (-2, 2**64 - 2)])
def test_a_given_seed_is_kept(given: int, expected: int) -> None:
    harness = Harness()
    harness.engine.add(PROMPT, SamplingParams(seed=given), payload=FakeText())

    assert harness.engine.scheduler.waiting[0].seed == expected


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["fail_before_launch", "fail_launch", "fail_collect"])
@pytest.mark.parametrize("error", [InjectedError, InjectedInterrupt])
def test_a_failed_step_ends_its_sequences_and_no_others(
    depth: int, where: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness(depth, max_num_seqs=2)
    harness.runner.error = error
    getattr(harness.runner, where).add(2)
    failing = [harness.add(), harness.add([9, *PROMPT])]
    waiting = [harness.add(PROMPT), harness.add([9, *PROMPT])]

    # At depth 1 a step is collected a call after its launch.
    for _ in range(2 + depth * (where == "fail_collect")):
        harness.step()
    with pytest.raises(error), caplog.at_level(logging.ERROR):
        harness.step()

    reported = "step 2 failed and ended 2 sequences" in caplog.text
    assert reported is issubclass(error, Exception)
    assert harness.engine.has_unfinished
    first = harness.step()
    assert {output.seq_id for output in first if output.finish_reason} == set(failing)
    outcomes = harness.drain()
    for seq_id in failing:
        assert outcomes[seq_id].finish_reason == "error"
        assert outcomes[seq_id].key is None
        assert str(outcomes[seq_id].stop_reason).startswith(f"{error.__name__}: ")
        assert [output.finish_reason for output in harness.news[seq_id]].count("error") == 1
        assert len(harness.keys_of(seq_id)) == 2
    for seq_id in waiting:
        assert outcomes[seq_id].finish_reason == "length"
        assert len(harness.keys_of(seq_id)) == 6
    assert harness.engine.stats().num_errors == 2


@pytest.mark.parametrize("depth", [0, 1])
def test_ctrl_c_anywhere_leaves_the_engine_usable(depth: int) -> None:
    num_interrupts = 0
    for line in itertools.count(1):
        harness = Harness(depth)
        harness.add(max_tokens=4)
        try:
            with ctrl_c_at_line(line, llm_engine, scheduler, block_manager):
                harness.engine.add([9, *PROMPT], SamplingParams(n=2), payload=FakeText())
                for _ in range(3):
                    harness.step()
                harness.engine.abort(1)
            break
        except KeyboardInterrupt:
            num_interrupts += 1
        harness.runner.interrupted([step.handle for step in harness.engine._in_flight])
        seq_id = harness.add()
        assert harness.drain()[seq_id].finish_reason == "length"
        harness.step()
        assert not harness.engine.scheduler._in_flight
        assert harness.engine.scheduler.num_free_slots == 4
    assert num_interrupts > 300


def test_asyncio_hears_of_one_ctrl_c_once() -> None:
    """It heard of it again when it was raised again behind the end."""

    async def press(let_in: bool) -> int:
        calls: list[int] = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, calls.append, 1)
        try:
            with interrupts_held_back():
                signal.raise_signal(signal.SIGINT)
                if let_in:
                    with interrupts_let_in():
                        pass
            for _ in range(3):
                await asyncio.sleep(0.01)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        return len(calls)

    assert [asyncio.run(press(let_in)) for let_in in (False, True)] == [1, 1]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["launch", "collect"])
def test_ctrl_c_interrupts_the_runner(
    depth: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(depth)
    first = harness.add()
    computed = []

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        computed.append(True)

    monkeypatch.setattr(harness.runner, where, interrupted)
    before = signal.getsignal(signal.SIGINT)
    if where == "collect" and depth:
        harness.step()
    with pytest.raises(KeyboardInterrupt):
        harness.step()
    assert not computed
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    harness.runner.interrupted([])
    second = harness.add()
    outcomes = harness.drain()
    assert [outcomes[seq_id].finish_reason for seq_id in (first, second)] == ["error", "length"]


def test_a_sequence_whose_new_blocks_are_lost_starts_over() -> None:
    num_preemptions = 0
    for step in range(12):
        # Two sequences need blocks for forced keys at a time, and one uses the budget up.
        harness = Harness(max_num_seqs=2, max_num_batched_tokens=2)
        harness.runner.fail_before_launch.add(step)
        params, payload = SamplingParams(max_tokens=20), FakeText(ignores_eos=True, num_forced=5)
        for key in range(2):
            harness.engine.add([key], params, schedules_ahead=False, payload=payload)
        with pytest.raises(InjectedError):
            harness.drain()
        harness.drain()  # the fake looks at the blocks
        num_preemptions += harness.engine.stats().num_preemptions
    assert num_preemptions


def test_an_error_of_an_earlier_step_surfaces_while_a_launch_fails() -> None:
    harness = Harness(depth=1)
    harness.runner.fail_collect.add(1)
    harness.runner.fail_launch.add(2)
    failing = harness.add()
    harness.step()
    harness.step()

    with pytest.raises(InjectedError, match="collection of step 1"):
        harness.step()

    after = harness.add()
    outcomes = harness.drain()
    assert outcomes[failing].finish_reason == "error"
    assert outcomes[after].finish_reason == "length"


def test_no_news_of_a_sequence_after_its_abort() -> None:
    harness = Harness(depth=1)
    # It waits for each result, so it has no row in the step that fails.
    aborted = harness.add(schedules_ahead=False)
    harness.step()
    harness.add([9, *PROMPT])
    harness.runner.fail_launch.add(1)
    with pytest.raises(InjectedError):
        harness.step()

    output = harness.engine.abort(aborted)

    assert output is not None
    assert output.finish_reason == "abort"
    assert aborted not in {output.seq_id for output in harness.step()}
    assert not harness.engine.has_unfinished


def test_idle_time_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that ended early has left a step in flight."""
    harness = Harness(depth=1)
    seq_id = harness.add()
    for _ in range(3):
        harness.step()
    harness.engine.abort(seq_id)
    assert harness.engine.has_work
    after_a_while = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: after_a_while)

    harness.add()
    harness.drain()

    stats = harness.engine.stats()
    assert stats.prefill_time + stats.decode_time < 60


def test_abort_frees_and_answers_once() -> None:
    harness = Harness()
    seq_id = harness.add()
    harness.step()

    output = harness.engine.abort(seq_id)

    assert output is not None
    assert (output.seq_id, output.finish_reason, output.key) == (seq_id, "abort", None)
    assert harness.engine.abort(seq_id) is None
    assert harness.engine.abort(12345) is None
    assert not harness.engine.has_unfinished
    assert harness.blocks.num_free == harness.blocks.num_blocks
    assert harness.step() == []


def test_an_error_of_the_model_ends_one_sequence() -> None:
    harness = Harness(runner_class=SpeechFakeRunner)
    for first_key in range(12):
        harness.add([first_key, 1], 20)

    outcomes = harness.drain()

    failed = [o for o in outcomes.values() if o.finish_reason == "error"]
    assert failed
    assert len(failed) < 12
    assert all(o.key is None and o.stop_reason == "NaN in the patch" for o in failed)
    assert harness.engine.stats().num_errors == len(failed)


@pytest.mark.parametrize("depth", [0, 1])
def test_stats_count_what_happened(depth: int) -> None:
    harness = Harness(depth, max_num_seqs=2)
    engine = harness.engine
    for _ in range(3):
        harness.add(max_tokens=4)
    assert engine.stats().num_waiting == 3
    harness.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks) == (2, 1, 32)
    assert stats.num_used_blocks == 3  # they share one
    harness.drain()

    stats = engine.stats()

    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_cached_blocks > 0
    assert stats.num_prompt_tokens == 3 * len(PROMPT)
    # The third finds the first block and the one that its equals filled with their output.
    assert stats.num_cached_tokens == 2 * BLOCK_SIZE
    assert stats.num_output_tokens == 3 * 4
    assert stats.num_computed_tokens == 3 * (len(PROMPT) + 3) - 2 * BLOCK_SIZE
    assert stats.num_steps == harness.runner.num_launched
    assert stats.num_preemptions == stats.num_errors == 0
    assert stats.prefill_time > 0
    assert stats.decode_time > 0


def test_news_carry_what_was_cached_and_when_it_ran() -> None:
    harness = Harness()
    harness.add()
    harness.drain()
    seq_id = harness.add()

    outcome = harness.drain()[seq_id]

    assert outcome.num_cached == BLOCK_SIZE
    assert outcome.scheduled_time is not None
    assert len({output.scheduled_time for output in harness.news[seq_id]}) == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_an_engine_whose_sequences_are_all_paused_has_nothing_to_do(depth: int) -> None:
    harness = Harness(depth)
    first, second = harness.add(), harness.add()
    for _ in range(2):
        harness.step()
    harness.engine.pause([first, second, 99], True)
    for _ in range(depth):  # what is in flight still comes in
        assert harness.engine.has_work
        assert {news.seq_id for news in harness.step()} == {first, second}
    assert not harness.engine.has_work
    assert harness.engine.has_unfinished
    assert harness.step() == []
    stats = harness.engine.stats()
    assert (stats.num_paused, stats.num_running) == (2, 2)

    harness.engine.pause([first], False)
    harness.engine.abort(second)
    assert [news.finish_reason for news in harness.drain().values()] == ["length", None]
    assert harness.engine.stats().num_paused == 0
