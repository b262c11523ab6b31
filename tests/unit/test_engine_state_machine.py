"""Random operations on the engine, with two fake runners that watch it, and invariants in between.

Whatever is batched, chunked, preempted, shared or failed, a sequence must come out as if it had run
alone, and nothing may be left behind.
"""

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.batch import EngineOutput, Key, Stop
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from tests.fake_runners import (
    AsyncFakeRunner,
    FakeRunner,
    FakeText,
    FakeVoice,
    Generated,
    InjectedError,
    InjectedInterrupt,
    SpeechFakeRunner,
)

MACHINE_SETTINGS = settings(
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

STREAMS: list[list[int]] = [[5, 3, 5, 5, 1, 2, 8, 4] * 4, [5, 3, 5, 7, 1, 2, 8, 4] * 4]
"""Prompts are beginnings of these, so that they share prefixes: the two part at position 3."""


class Expected:
    """What the test knows of a sequence, in none of the engine's terms.

    Args:
        seq: The engine's own record, to compare with.
        priority: What it was added with.
        root: Number of its adapter and salt: what its positions are cached below.
        generated: What it generates if nothing interferes, computed alone.
        finish_reason: How it ends then.
    """

    def __init__(
        self,
        seq: Sequence,
        priority: int,
        root: int,
        generated: list[Generated],
        finish_reason: str,
    ) -> None:
        self.seq, self.priority, self.root = seq, priority, root
        self.prompt = list(seq.keys)
        self.generated, self.finish_reason = generated, finish_reason
        self.keys: list[Key] = []
        self.outcome: str | None = None
        self.num_hashes = 0


class EngineMachine(RuleBasedStateMachine):
    """Drives an engine by random calls.

    Args:
        runner_class: The fake to run.
        depth: Steps in flight while the next is scheduled.
    """

    def __init__(self, runner_class: type[FakeRunner], depth: int) -> None:
        super().__init__()
        self.runner_class, self.depth = runner_class, depth
        self.expected: dict[int, Expected] = {}
        self.live: dict[int, Expected] = {}
        self.paused: set[int] = set()
        self.roots: dict[tuple[int | None, str | None], int] = {}
        self.contents: dict[bytes, list[int]] = {}

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 10),
        max_num_seqs=st.integers(1, 4),
        num_spare_tokens=st.sampled_from([0, 1, 3, 20]),
        max_num_adapters=st.integers(0, 2),
        max_cached_tokens=st.sampled_from([None, None, 0, 1, 5]),
        publishes=st.sampled_from([True, True, True, False]),
    )
    def build(
        self,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        num_spare_tokens: int,
        max_num_adapters: int,
        max_cached_tokens: int | None,
        publishes: bool,
    ) -> None:
        max_num_batched_tokens = max_num_seqs + num_spare_tokens
        self.max_model_len = min(num_blocks * block_size, 20)
        self.max_num_adapters = max_num_adapters
        self.max_cached_blocks = num_blocks
        if max_cached_tokens:
            self.max_cached_blocks = -(-max_cached_tokens // block_size)
        self.runner = self.runner_class(
            num_blocks, block_size, max_num_seqs, max_num_batched_tokens, self.max_model_len
        )
        self.blocks = BlockManager(num_blocks, block_size, publishes, max_cached_tokens)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs, max_num_batched_tokens, max_num_adapters
        )
        self.engine = LLMEngine(
            self.runner,
            self.scheduler,
            max_model_len=self.max_model_len,
            model_id="fake",
            async_scheduling=bool(self.depth),
        )

    @rule(
        stream=st.integers(0, 1),
        num_keys=st.integers(1, 19),
        tail=st.integers(0, 2),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.sampled_from([None, None, 1, 4, 9]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        root=st.sampled_from([(None, None)] * 4 + [(None, "a"), (1, None), (2, None), (3, "a")]),
        flags=st.integers(0, 9),
        num_forced=st.sampled_from([0, 1, 5]),
    )
    def add(
        self,
        stream: int,
        num_keys: int,
        tail: int,
        n: int,
        max_tokens: int | None,
        priority: int,
        root: tuple[int | None, str | None],
        flags: int,
        num_forced: int,
    ) -> None:
        num_keys = min(num_keys, self.max_model_len - 1)
        adapter_id, cache_salt = root if self.max_num_adapters else (None, root[1])
        keys: list[Key] = [*STREAMS[stream][:num_keys]]
        if tail and self.runner_class is SpeechFakeRunner:
            # Tokens and patches of the same bytes must not be taken for each other.
            for index in range(1, num_keys, tail):
                keys[index] = STREAMS[stream][index].to_bytes(8, "little")
        elif tail:
            keys[-1] = tail
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            seed=tail if flags & 1 else None,
            prompt_logprobs=0 if flags > 7 else None,
        )
        root_number = 1 + self.roots.setdefault((adapter_id, cache_salt), len(self.roots))
        seq_ids = self.engine.add(
            keys,
            params,
            priority=priority,
            cache_salt=cache_salt,
            adapter_id=adapter_id,
            schedules_ahead=not flags & 2,
            payload=self._payload(root_number, bool(flags & 4), num_forced if flags & 2 else 0),
        )
        assert len(seq_ids) == n
        for index, seq_id in enumerate(seq_ids):
            seq = next(seq for seq in self.scheduler.waiting if seq.seq_id == seq_id)
            generated, finish_reason = self.runner_class.generate(
                keys,
                params,
                self._payload(root_number, bool(flags & 4)),
                seed=seq.seed,
                sample_index=index,
                max_keys=min(len(keys) + (max_tokens or self.max_model_len), self.max_model_len),
            )
            expected = Expected(seq, priority, root_number, generated, finish_reason)
            self.expected[seq_id] = self.live[seq_id] = expected

    @precondition(lambda self: self.live)
    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._step()
            self.check()

    @precondition(lambda self: self.expected)
    @rule(which=st.integers(0, 30))
    def abort(self, which: int) -> None:
        seq_id = which % (len(self.expected) + 1)
        output = self.engine.abort(seq_id)
        if seq_id in self.live and self.live[seq_id].outcome is None:
            if output is None:
                # It ended in a step that failed, and its outcome is still to be reported.
                assert any(
                    news.seq_id == seq_id and news.finish_reason for news in self.engine._unreported
                )
                return
            assert output.finish_reason == "abort"
            self._take(output)
        else:
            assert output is None

    @precondition(lambda self: self.expected)
    @rule(which=st.lists(st.integers(0, 30), max_size=3), paused=st.booleans())
    def pause(self, which: list[int], paused: bool) -> None:
        seq_ids = [number % (len(self.expected) + 1) for number in which]
        self.engine.pause(seq_ids, paused)
        for seq_id in seq_ids:
            if self.scheduler.is_open(seq_id):
                self.paused.discard(seq_id)
                self.paused |= {seq_id} if paused else set()

    @precondition(lambda self: self.live)
    @rule(
        where=st.sampled_from([None, "before", "launch", "collect", None, None, None]),
        interrupt=st.booleans(),
    )
    def fail(self, where: str | None, interrupt: bool) -> None:
        """The next step fails; at depth 1 a collection that fails takes two steps along."""
        runner = self.runner
        runner.error = InjectedInterrupt if interrupt else InjectedError
        steps = {
            None: set[int](),  # failures are rare, or they would end all before it gets long
            "before": runner.fail_before_launch,
            "launch": runner.fail_launch,
            "collect": runner.fail_collect,
        }[where]
        steps.add(self.scheduler._step)
        with suppress(InjectedError, InjectedInterrupt):
            self._step()
            self._step()
        steps.clear()

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "engine"):
            return
        self._check_queues()
        self._check_sequences()
        self._check_blocks()
        self._check_hashes()

    def teardown(self) -> None:
        """Nobody starves, and nothing is left behind."""
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self._step()
            self.check()
        # What is left is paused, and a step leaves it as it is.
        assert all(self.scheduler.is_open(seq_id) for seq_id in self.live)
        num_computed = {seq_id: e.seq.num_computed for seq_id, e in self.live.items()}
        assert self.engine.step() == []
        assert num_computed == {seq_id: e.seq.num_computed for seq_id, e in self.live.items()}
        self.engine.pause(list(self.live), False)
        self.paused.clear()
        num_steps = sum(expected.seq.max_keys + 1 for expected in self.live.values())
        for _ in range((self.depth + 1) * num_steps + 2):
            if not self.engine.has_unfinished:
                break
            self._step()
            self.check()
        assert not self.engine.has_unfinished, "drained within the bound"
        assert not self.live
        assert self.engine.step() == []
        self.check()
        scheduler, blocks = self.scheduler, self.blocks
        assert scheduler.num_free_slots == scheduler.max_num_seqs
        assert blocks.num_free == blocks.num_blocks
        assert not scheduler._sequences
        assert not scheduler._adapters
        assert not scheduler._in_flight
        assert not self.engine._in_flight
        assert not self.engine._unreported
        assert set(self.runner.slots) <= set(scheduler._released) | self.runner._unsure
        assert len(self.contents) >= len(blocks._block_of_hash)
        stats = self.engine.stats()
        assert stats.num_output_tokens == sum(
            len(e.seq.keys) - len(e.prompt) for e in self.expected.values()
        )
        assert stats.num_errors == sum(e.outcome == "error" for e in self.expected.values())
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)

    def _payload(self, root: int, goes_on: bool, num_forced: int = 0) -> Any:
        if self.runner_class is SpeechFakeRunner:
            return FakeVoice(root, never_stops=goes_on)
        return FakeText(root, ignores_eos=goes_on, num_forced=num_forced)

    def _step(self) -> None:
        """Run a step and see that those who come first made progress."""
        scheduler = self.scheduler
        running, waiting = (
            [seq for seq in queue if seq.seq_id not in self.paused]
            for queue in (scheduler.running, scheduler.waiting)
        )
        at_rest = [
            (seq, seq.num_computed) for seq in scheduler.running if seq.seq_id in self.paused
        ]
        heads = running[:1] or waiting[:1]
        head_computed = [(seq.num_computed, seq.num_positions) for seq in heads]
        decoding = [
            (seq, seq.num_computed) for seq in running if seq.num_positions - seq.num_computed == 1
        ]
        num_preemptions = scheduler.num_preemptions
        for output in self.engine.step():
            self._take(output)
        for seq, (num_computed, num_positions) in zip(heads, head_computed, strict=True):
            if num_computed < num_positions:
                ended = not scheduler.is_open(seq.seq_id)
                assert ended or seq.num_computed > num_computed, "the first goes on"
        for seq, num_computed in decoding:
            stalled = scheduler.is_open(seq.seq_id) and seq.num_computed <= num_computed
            assert not stalled or scheduler.num_preemptions > num_preemptions, "a stream stalls"
        for seq, num_computed in at_rest:
            assert seq.num_computed in (num_computed, 0), "paused, and has a row"

    def _take(self, output: EngineOutput) -> None:
        """Compare news of a sequence with what it becomes when it runs alone."""
        expected = self.expected[output.seq_id]
        assert expected.outcome is None, "no news after the outcome"
        failed = output.finish_reason == "error"
        if output.key is not None:
            generated = expected.generated[len(expected.keys)]
            assert (output.key, output.payload) == (generated.key, generated.payload)
            expected.keys.append(output.key)
            stopped = generated.stop is not None
            # With several keys at once the end is news of its own.
            forces = getattr(expected.seq.payload, "num_forced", 0) > 0
            assert (output.finish_reason == "stop") == stopped or forces
        elif failed and "Injected" not in str(output.stop_reason):
            stop = expected.generated[len(expected.keys)].stop
            assert stop == Stop("error", str(output.stop_reason))
        elif output.finish_reason in ("stop", "length"):
            assert expected.seq.payload.num_forced, "an end without a key"
        else:
            assert output.finish_reason in ("abort", "error")
        if output.finish_reason is None:
            return
        expected.outcome = output.finish_reason
        if output.finish_reason in ("stop", "length"):
            assert expected.finish_reason == output.finish_reason
            assert expected.keys == [generated.key for generated in expected.generated]
            assert len(expected.seq.keys) <= expected.seq.max_keys <= self.max_model_len
        known = expected.prompt + expected.keys
        # A key that a failed step left unreported is dropped by an abort.
        assert expected.seq.keys == known or output.finish_reason == "abort"
        assert expected.seq.keys[: len(known)] == known
        assert not self.engine.scheduler.is_open(expected.seq.seq_id)
        assert not expected.seq.running
        assert not expected.seq.block_table
        assert 0 <= output.num_cached < len(expected.prompt)
        self._learn_hashes(expected)
        del self.live[output.seq_id]
        self.paused.discard(output.seq_id)

    def _check_queues(self) -> None:
        scheduler = self.scheduler
        waiting, running = scheduler.waiting, scheduler.running
        for queue in (waiting, running):
            order = [seq.precedence for seq in queue]
            assert order == sorted(order)
        assert {seq.seq_id for seq in waiting + running} == set(scheduler._sequences)
        assert len(waiting) + len(running) == len(scheduler._sequences)
        for seq in waiting + running:
            assert seq.precedence == (self.expected[seq.seq_id].priority, seq.seq_id)
        slots = [seq.slot for seq in running]
        assert sorted(slots + scheduler._free_slots) == list(range(scheduler.max_num_seqs))
        assert all(seq.slot < 0 and not seq.block_table for seq in waiting)
        assert {seq.seq_id for seq in waiting + running if seq.paused} == self._open_paused()
        assert scheduler.num_paused == len(self._open_paused())
        adapters = Counter(seq.adapter_id for seq in running if seq.adapter_id is not None)
        assert adapters == scheduler._adapters
        assert len(adapters) <= scheduler.max_num_adapters

    def _open_paused(self) -> set[int]:
        return {seq_id for seq_id in self.paused if self.scheduler.is_open(seq_id)}

    def _check_sequences(self) -> None:
        unreported: dict[int, list[Key]] = {}
        ended = set()
        for news in self.engine._unreported:
            if news.key is not None:
                unreported.setdefault(news.seq_id, []).append(news.key)
            if news.finish_reason is not None:
                ended.add(news.seq_id)
        assert set(self.scheduler._sequences) == set(self.live) - ended
        num_in_flight = len(self.engine._in_flight)
        assert num_in_flight <= self.depth
        for seq_id, expected in self.live.items():
            seq = expected.seq
            assert seq.keys == expected.prompt + expected.keys + unreported.get(seq_id, [])
            if seq_id in ended:
                continue
            # The last position of a sequence is never computed: nothing comes after it.
            assert seq.num_positions < seq.max_keys
            assert len(seq.keys) <= seq.num_positions <= len(seq.keys) + num_in_flight
            assert seq.num_computed <= seq.num_positions
            if seq.running:
                assert seq.capacity == len(seq.block_table) * self.blocks.block_size
                assert seq.num_computed <= seq.capacity
                self._check_memory(expected)

    def _check_memory(self, expected: Expected) -> None:
        """Position p lies in `block_table[p // bs] * bs + p % bs`."""
        seq, size = expected.seq, self.blocks.block_size
        known = min(seq.num_computed, len(seq.keys))
        values = self.runner.values_of(seq.keys[:known], expected.root)
        places = [seq.block_table[p // size] * size + p % size for p in range(known)]
        assert [self.runner.memory[place] for place in places] == values

    def _check_blocks(self) -> None:
        blocks = self.blocks
        counts = Counter(block for seq in self.scheduler.running for block in seq.block_table)
        assert all(blocks._ref_counts[b] == counts[b] for b in range(blocks.num_blocks))
        assert sorted([*blocks._blank, *blocks._cached, *counts]) == list(range(blocks.num_blocks))
        assert all(block in blocks._hash_of_block for block in blocks._cached)
        assert not any(block in blocks._hash_of_block for block in blocks._blank)
        assert blocks.num_cached <= self.max_cached_blocks

    def _check_hashes(self) -> None:
        """What can be found holds the keys it stands for, and all before them."""
        for expected in self.live.values():
            self._learn_hashes(expected)
        blocks, size = self.blocks, self.blocks.block_size
        assert {b: h for h, b in blocks._block_of_hash.items()} == blocks._hash_of_block
        for digest, block in blocks._block_of_hash.items():
            held = self.runner.memory[block * size : (block + 1) * size]
            assert held == self.contents[digest]

    def _learn_hashes(self, expected: Expected) -> None:
        """Note what each new hash stands for; the same hash never stands for anything else."""
        seq, size = expected.seq, self.blocks.block_size
        if len(seq.block_hashes) == expected.num_hashes:
            return
        values = self.runner.values_of(seq.keys, expected.root)
        for index in range(expected.num_hashes, len(seq.block_hashes)):
            content = values[index * size : (index + 1) * size]
            assert len(content) == size
            assert self.contents.setdefault(seq.block_hashes[index], content) == content
        expected.num_hashes = len(seq.block_hashes)


@pytest.mark.parametrize("max_examples", [250, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("runner_class", [AsyncFakeRunner, SpeechFakeRunner])
def test_engine_state_machine(
    runner_class: type[FakeRunner], depth: int, max_examples: int
) -> None:
    def machine() -> EngineMachine:
        return EngineMachine(runner_class, depth)

    limits = settings(MACHINE_SETTINGS, max_examples=max_examples)
    # Any factory will do, whatever its annotation says.
    run_state_machine_as_test(machine, settings=limits)  # type: ignore[arg-type]
