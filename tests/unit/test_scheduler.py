"""The scheduler without a runner: who gets a row in a step, and what becomes of the results."""

from collections.abc import Iterable

import pytest

from nanovllm.batch import Batch, EngineOutput, Key, StepResult, Stop
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 4


class Harness:
    """A scheduler whose results are made up: each sequence's next key is 1000 + its length."""

    def __init__(
        self,
        num_blocks: int = 100,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_num_adapters: int = 0,
    ) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs, max_num_batched_tokens, max_num_adapters
        )
        self.num_added = 0

    def add(
        self,
        num_keys: int,
        *,
        first_key: int | None = None,
        max_tokens: int = 100,
        priority: int = 0,
        adapter_id: int | None = None,
        schedules_ahead: bool = True,
    ) -> Sequence:
        """Queue a sequence; unless `first_key` is given it shares no prefix with another."""
        first_key = 100 * self.num_added if first_key is None else first_key
        seq = Sequence(
            self.num_added,
            list(range(first_key, first_key + num_keys)),
            SamplingParams(),
            num_keys + max_tokens,
            priority=priority,
            adapter_id=adapter_id,
            schedules_ahead=schedules_ahead,
        )
        self.num_added += 1
        self.scheduler.add(seq)
        return seq

    def schedule(self) -> Batch:
        batch = self.scheduler.schedule()
        assert batch is not None
        return batch

    def commit(self, batch: Batch, stops: dict[int, Stop] | None = None) -> dict[int, EngineOutput]:
        """Commit a step, slots in `stops` stopping; returns the news by sequence."""
        rows = zip(batch.slots, batch.starts, batch.lengths, batch.emits, strict=True)
        results = [
            StepResult(slot, 1000 + start + length, (stops or {}).get(slot))
            for slot, start, length, emits in rows
            if emits
        ]
        return {output.seq_id: output for output in self.scheduler.commit(batch, results)}

    def step(self, stops: dict[int, Stop] | None = None) -> Batch:
        batch = self.schedule()
        self.commit(batch, stops)
        return batch


def lengths(batch: Batch, seqs: Iterable[Sequence]) -> list[int]:
    """How many positions each sequence has in a batch."""
    by_slot = dict(zip(batch.slots, batch.lengths, strict=True))
    return [by_slot.get(seq.slot, 0) for seq in seqs]


def test_scheduler_prefill_then_decode_round_robin() -> None:
    harness = Harness()
    seqs = [harness.add(num_keys) for num_keys in (3, 4, 9)]

    prefill = harness.schedule()

    assert prefill.num_decodes == 0
    assert prefill.slots == [seq.slot for seq in seqs]
    assert prefill.starts == [0, 0, 0]
    assert prefill.lengths == [3, 4, 9]
    assert prefill.emits == [True] * 3
    assert [start.keys for start in prefill.started] == [seq.keys for seq in seqs]
    assert set(harness.commit(prefill)) == {0, 1, 2}
    for round_number in range(10):
        decode = harness.schedule()
        assert decode.num_decodes == 3
        assert decode.slots == [seq.slot for seq in seqs]
        assert decode.starts == [3 + round_number, 4 + round_number, 9 + round_number]
        assert decode.lengths == [1, 1, 1]
        assert decode.emits == [True] * 3
        assert decode.started == []
        news = harness.commit(decode)
        assert [news[seq.seq_id].key for seq in seqs] == [1000 + len(seq.keys) - 1 for seq in seqs]
    assert [len(seq.keys) for seq in seqs] == [14, 15, 20]


def test_decodes_do_not_stall_behind_a_chunked_prompt() -> None:
    harness = Harness(max_num_batched_tokens=8)
    decoding = [harness.add(2), harness.add(3)]
    harness.step()
    newcomer = harness.add(20)

    chunks = []
    while newcomer.num_computed < 20:
        batch = harness.schedule()
        assert batch.num_decodes == 2
        assert batch.lengths[:2] == [1, 1]
        assert batch.num_positions <= 8
        assert batch.emits == [True, True, newcomer.num_computed == 20]
        chunks.append(lengths(batch, [newcomer])[0])
        assert len(harness.commit(batch)) == 2 + (newcomer.num_computed == 20)

    assert chunks == [6, 6, 6, 2]
    assert [len(seq.keys) for seq in decoding] == [2 + 5, 3 + 5]
    assert harness.schedule().num_decodes == 3


def test_the_budget_of_positions_is_shared_in_order() -> None:
    harness = Harness(max_num_seqs=4, max_num_batched_tokens=10)
    seqs = [harness.add(num_keys) for num_keys in (6, 9, 2)]

    assert lengths(harness.step(), seqs) == [6, 4, 0]
    assert lengths(harness.step(), seqs) == [1, 5, 2]
    assert lengths(harness.step(), seqs) == [1, 1, 1]


def test_a_chunk_that_leaves_one_position_goes_on_as_a_decode() -> None:
    harness = Harness(max_num_seqs=2, max_num_batched_tokens=5)
    seq = harness.add(6)

    first = harness.schedule()
    assert (first.lengths, first.emits) == ([5], [False])
    assert harness.commit(first) == {}
    second = harness.schedule()
    assert (second.lengths, second.emits, second.num_decodes) == ([1], [True], 1)
    assert harness.commit(second)[0].key == 1006
    assert len(seq.keys) == 7


def test_the_number_of_running_sequences_is_bounded() -> None:
    harness = Harness(max_num_seqs=2)
    seqs = [harness.add(3, max_tokens=2) for _ in range(3)]

    assert lengths(harness.step(), seqs) == [3, 3, 0]
    assert harness.scheduler.num_free_slots == 0
    assert lengths(harness.step(), seqs) == [0, 0, 0]  # both have ended
    last = harness.schedule()
    assert sorted(last.released) == [0, 1]
    assert lengths(last, seqs) == [0, 0, 3]


def test_waiting_sequences_start_by_priority_then_arrival() -> None:
    harness = Harness(max_num_seqs=1)
    seqs = [harness.add(1, priority=priority, max_tokens=1) for priority in (1, 0, 1, -5, 0)]

    order: list[int] = []
    while harness.scheduler.has_unfinished:
        order += harness.commit(harness.schedule())

    assert order == [3, 1, 4, 0, 2]
    assert not any(harness.scheduler.is_open(seq.seq_id) for seq in seqs)


def test_a_newcomer_leaves_a_block_for_each_running_sequence() -> None:
    harness = Harness(num_blocks=5)
    running = harness.add(BLOCK_SIZE)
    harness.step()
    newcomer = harness.add(3 * BLOCK_SIZE)

    # The running sequence takes its second block, and the three that are left would do.
    assert lengths(harness.step(), [running, newcomer]) == [1, 0]
    assert harness.blocks.num_free == 3
    harness.scheduler.abort(running.seq_id)
    assert lengths(harness.step(), [newcomer]) == [3 * BLOCK_SIZE]
    assert harness.scheduler.num_preemptions == 0


def test_the_youngest_of_the_lowest_priority_is_preempted() -> None:
    harness = Harness(num_blocks=7)
    urgent = harness.add(4, priority=-1)
    old = harness.add(4)
    young = harness.add(4)
    late_but_urgent = harness.add(4, priority=-1)
    harness.step()
    everyone = [urgent, late_but_urgent, old, young]
    assert harness.scheduler.running == everyone

    # All need a second block and three are left: the youngest gives way to none but itself.
    assert lengths(harness.step(), everyone) == [1, 1, 1, 0]
    assert harness.scheduler.waiting == [young]
    assert (young.num_computed, young.num_positions, young.block_table) == (0, 5, [])

    for _ in range(BLOCK_SIZE - 1):
        assert lengths(harness.step(), everyone) == [1, 1, 1, 0]
    # A third block each, and one is left: the old one arrived before the late one, but is not
    # as urgent.
    assert lengths(harness.step(), everyone) == [1, 1, 0, 0]
    assert harness.scheduler.waiting == [old, young]
    assert harness.scheduler.num_preemptions == 2


def test_the_first_sequence_is_never_preempted() -> None:
    harness = Harness(num_blocks=8, max_num_seqs=8)
    first = harness.add(3, max_tokens=8 * BLOCK_SIZE - 3)
    others = [harness.add(3, max_tokens=8 * BLOCK_SIZE - 3) for _ in range(7)]

    num_steps = 0
    while harness.scheduler.is_open(first.seq_id):
        num_keys = len(first.keys)
        harness.step()
        num_steps += 1
        assert len(first.keys) == num_keys + 1
    assert num_steps == 8 * BLOCK_SIZE - 3
    assert harness.scheduler.num_preemptions > 0
    while any(harness.scheduler.is_open(seq.seq_id) for seq in others):
        harness.step()
        num_steps += 1
        assert num_steps < 1000


def test_a_preempted_sequence_resumes_from_what_it_had() -> None:
    harness = Harness(num_blocks=3)
    first, second = harness.add(4), harness.add(4)
    harness.step()
    victim_slot, victim_keys = second.slot, list(second.keys)

    batch = harness.schedule()  # each needs a second block and there is one

    assert lengths(batch, [first]) == [1]
    assert batch.released == [victim_slot]
    assert not second.running
    assert second.keys == victim_keys
    harness.commit(batch)
    # Its first block waits in the cache: freeing `first` lets it go on behind it.
    harness.scheduler.abort(first.seq_id)
    resumed = harness.schedule()
    assert resumed.released == [1 - victim_slot]
    assert resumed.started[0].keys == victim_keys
    assert resumed.started[0].num_prompt_keys == 4
    assert (resumed.starts, resumed.lengths, resumed.emits) == ([4], [1], [True])
    assert resumed.num_decodes == 0
    assert second.num_cached == 0  # counts only what was cached when it first ran


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    harness = Harness(num_blocks=3)
    harness.add(4)
    harness.add(4)
    harness.step()
    newcomer = harness.add(1, priority=-1)

    harness.step()

    assert harness.scheduler.num_preemptions == 1
    assert not newcomer.running


def test_adapters_are_bounded_and_starve_nobody() -> None:
    harness = Harness(max_num_seqs=3, max_num_adapters=1)
    first = harness.add(1, adapter_id=1, max_tokens=3)
    other = harness.add(1, adapter_id=2, max_tokens=3)
    same = harness.add(1, adapter_id=1, max_tokens=3)
    plain = harness.add(1, max_tokens=9)

    # `same` would fit, but a stream of its kind would keep `other` out; `plain` may pass.
    assert lengths(harness.step(), [first, other, same, plain]) == [1, 0, 0, 1]
    harness.step()
    harness.step()
    assert not harness.scheduler.is_open(first.seq_id)
    assert lengths(harness.step(), [other, same, plain]) == [1, 0, 1]
    while harness.scheduler.is_open(other.seq_id):
        assert not same.running
        harness.step()
    assert lengths(harness.step(), [same, plain]) == [1, 1]
    while harness.scheduler.has_unfinished:
        harness.step()
    assert not harness.scheduler._adapters


def test_sequences_of_one_adapter_run_together() -> None:
    harness = Harness(max_num_adapters=2)
    seqs = [harness.add(1, adapter_id=adapter_id) for adapter_id in (1, 2, 1, 2)]

    batch = harness.step()

    assert lengths(batch, seqs) == [1, 1, 1, 1]
    assert [start.adapter_id for start in batch.started] == [1, 2, 1, 2]


def test_a_position_is_scheduled_before_its_key_is_known() -> None:
    harness = Harness()
    seq = harness.add(3, max_tokens=4)

    first = harness.schedule()
    second = harness.schedule()

    assert (second.starts, second.lengths, second.num_decodes) == ([3], [1], 1)
    assert len(seq.keys) == 3
    assert seq.num_positions == 5
    assert harness.commit(first)[0].key == 1003
    third = harness.schedule()
    assert third.starts == [4]
    harness.commit(second)
    fourth = harness.schedule()
    assert fourth.starts == [5]
    harness.commit(third)
    # Position 6 would be its last key, which needs no step of its own.
    assert harness.scheduler.schedule() is None
    assert harness.commit(fourth)[0].finish_reason == "length"
    assert len(seq.keys) == 7


def test_a_sequence_may_wait_for_its_result() -> None:
    harness = Harness()
    ahead = harness.add(3)
    waits = harness.add(3, schedules_ahead=False)

    first = harness.schedule()
    second = harness.schedule()
    assert lengths(second, [ahead, waits]) == [1, 0]
    harness.commit(first)
    third = harness.schedule()
    assert lengths(third, [ahead, waits]) == [1, 1]


def test_a_block_is_published_once_its_last_key_is_known() -> None:
    harness = Harness()
    seq = harness.add(BLOCK_SIZE - 1)
    first = harness.schedule()
    second = harness.schedule()
    newcomer = harness.add(BLOCK_SIZE - 1, first_key=0)
    newcomer.keys.append(1003)
    newcomer.num_positions += 1

    # The block is computed by the second step, but its last key comes with the first.
    assert harness.blocks._hash_of_block == {}
    harness.commit(first)
    assert list(harness.blocks._hash_of_block) == seq.block_table[:1]
    harness.commit(second)
    newcomer.keys.append(7)
    newcomer.num_positions += 1
    third = harness.schedule()
    assert third.starts == [BLOCK_SIZE, BLOCK_SIZE]


def test_results_of_an_aborted_sequence_are_dropped() -> None:
    harness = Harness()
    aborted, goes_on = harness.add(3), harness.add(3)
    first = harness.schedule()
    second = harness.schedule()

    output = harness.scheduler.abort(aborted.seq_id)

    assert output is not None
    assert output.finish_reason == "abort"
    assert output.key is None
    newcomer = harness.add(3)
    third = harness.schedule()  # the newcomer takes the slot while both steps are in flight
    assert newcomer.slot in third.released
    assert list(harness.commit(first)) == [goes_on.seq_id]
    assert list(harness.commit(second)) == [goes_on.seq_id]
    assert set(harness.commit(third)) == {goes_on.seq_id, newcomer.seq_id}
    assert len(newcomer.keys) == 4
    assert len(aborted.keys) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_results_from_before_a_preemption_are_dropped(fails: bool) -> None:
    harness = Harness(num_blocks=3)
    first, victim = harness.add(3), harness.add(3)
    harness.step()
    slot = victim.slot
    decoding = harness.schedule()
    preempting = harness.schedule()
    assert lengths(decoding, [first]) == [1]
    assert slot in decoding.slots
    assert preempting.released == [slot]
    assert not victim.running

    # It resumes in the very slot it had, while the result of its row from before is in flight.
    harness.scheduler.abort(first.seq_id)
    urgent = harness.add(1, priority=-1)
    resuming = harness.schedule()
    assert (urgent.slot, victim.slot) == (1 - slot, slot)

    if fails:
        outputs = harness.scheduler.fail(decoding, "lost")
        assert [output.seq_id for output in outputs] == [urgent.seq_id, victim.seq_id]
        return
    assert harness.commit(decoding) == {}
    assert harness.commit(preempting) == {}
    assert len(victim.keys) == 4
    news = harness.commit(resuming)
    assert (news[victim.seq_id].key, news[urgent.seq_id].key) == (1004, 1001)


def test_prefix_is_shared_within_a_step() -> None:
    harness = Harness()
    first = harness.add(2 * BLOCK_SIZE + 1, first_key=0)
    second = harness.add(2 * BLOCK_SIZE + 3, first_key=0)

    batch = harness.schedule()

    assert batch.starts == [0, 2 * BLOCK_SIZE]
    assert batch.lengths == [2 * BLOCK_SIZE + 1, 3]
    assert first.block_table[:2] == second.block_table[:2]
    assert (first.num_cached, second.num_cached) == (0, 2 * BLOCK_SIZE)


def test_only_what_is_scheduled_of_a_chunk_can_be_shared() -> None:
    harness = Harness(max_num_seqs=3, max_num_batched_tokens=12)
    harness.add(3)
    harness.step()
    first = harness.add(3 * BLOCK_SIZE, first_key=0, priority=1)
    second = harness.add(3 * BLOCK_SIZE, first_key=0, priority=2)

    # One decode, eleven positions of the first: two blocks, and nothing left for the second.
    assert lengths(harness.step(), [first, second]) == [11, 0]
    batch = harness.step()
    # The first is computed whole, but the second must compute its last position itself.
    assert lengths(batch, [first, second]) == [1, BLOCK_SIZE]
    assert batch.starts[-1] == 2 * BLOCK_SIZE


@pytest.mark.parametrize("num_keys", [BLOCK_SIZE, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1])
def test_a_full_hit_computes_at_least_one_position(num_keys: int) -> None:
    harness = Harness()
    harness.add(num_keys, first_key=0, max_tokens=1)
    harness.step()
    again = harness.add(num_keys, first_key=0)

    batch = harness.schedule()

    assert batch.emits == [True]
    assert batch.starts[0] + batch.lengths[0] == num_keys
    assert 1 <= batch.lengths[0] <= BLOCK_SIZE
    assert again.num_cached == batch.starts[0]


def test_stops_and_errors_end_a_sequence() -> None:
    harness = Harness()
    seqs = [harness.add(3) for _ in range(4)]
    batch = harness.schedule()

    news = harness.commit(
        batch,
        {
            seqs[0].slot: Stop("stop"),
            seqs[1].slot: Stop("stop", 17),
            seqs[2].slot: Stop("error", "NaN"),
        },
    )

    assert [news[i][1:2] + news[i][3:5] for i in range(4)] == [
        (1003, "stop", None),
        (1003, "stop", 17),
        (None, "error", "NaN"),
        (1003, None, None),
    ]
    assert [len(seq.keys) for seq in seqs] == [4, 4, 3, 4]
    assert harness.scheduler.running == [seqs[3]]


def test_a_stop_at_the_length_limit_is_a_stop() -> None:
    harness = Harness()
    seq = harness.add(3, max_tokens=1)

    news = harness.commit(harness.schedule(), {0: Stop("stop")})

    assert news[seq.seq_id].finish_reason == "stop"


@pytest.mark.parametrize("state", ["waiting", "in flight", "decoding", "preempted", "ended"])
def test_abort_in_every_state(state: str) -> None:
    harness = Harness(num_blocks=3)
    first, seq = harness.add(4), harness.add(4)
    if state != "waiting":
        batch = harness.schedule()
    if state in ("decoding", "preempted"):
        harness.commit(batch)
    if state == "preempted":
        harness.step()
        assert harness.scheduler.waiting == [seq]
    if state == "ended":
        harness.commit(batch, {seq.slot: Stop("stop")})

    output = harness.scheduler.abort(seq.seq_id)

    if state == "ended":
        assert output is None
    else:
        assert output is not None
        assert (output.seq_id, output.finish_reason) == (seq.seq_id, "abort")
    assert not harness.scheduler.is_open(seq.seq_id)
    assert not seq.running
    assert not seq.block_table
    assert harness.scheduler.abort(seq.seq_id) is None
    if state == "in flight":
        assert list(harness.commit(batch)) == [first.seq_id]
    harness.scheduler.abort(first.seq_id)
    assert not harness.scheduler.has_unfinished
    assert harness.scheduler.schedule() is None
    assert harness.blocks.num_free == 3
    assert harness.scheduler.num_free_slots == 8


def test_abort_of_an_unknown_sequence() -> None:
    assert Harness().scheduler.abort(5) is None


def test_a_failed_step_ends_its_sequences_and_forgets_its_hashes() -> None:
    harness = Harness(max_num_seqs=2)
    running = harness.add(2 * BLOCK_SIZE, first_key=0)
    harness.step()
    newcomer = harness.add(3 * BLOCK_SIZE, first_key=500)
    waiting = harness.add(3 * BLOCK_SIZE, first_key=500)
    batch = harness.schedule()

    outputs = harness.scheduler.fail(batch, "out of memory")

    assert [output.seq_id for output in outputs] == [running.seq_id, newcomer.seq_id]
    assert all(output.finish_reason == "error" for output in outputs)
    assert all(output.stop_reason == "out of memory" for output in outputs)
    # What earlier steps wrote can still be used, what this one did not write cannot.
    assert harness.blocks.num_cached == 2
    batch = harness.schedule()
    assert (batch.starts, batch.lengths) == ([0], [3 * BLOCK_SIZE])
    assert waiting.num_cached == 0
    assert len(batch.released) == 2


def test_a_failed_step_takes_later_ones_along() -> None:
    harness = Harness()
    first = harness.add(3)
    first_step = harness.schedule()
    second = harness.add(BLOCK_SIZE)
    harness.schedule()

    outputs = harness.scheduler.fail(first_step, "lost")

    assert {output.seq_id for output in outputs} == {first.seq_id, second.seq_id}
    assert len(outputs) == 2
    assert harness.blocks.num_free == 100
    assert harness.blocks.num_cached == 0
    assert harness.scheduler.schedule() is None


def test_a_sequence_preempted_since_survives_a_failed_step() -> None:
    harness = Harness(num_blocks=3)
    first, victim = harness.add(3), harness.add(3)
    harness.step()
    failed = harness.schedule()
    harness.schedule()
    assert not victim.running

    outputs = harness.scheduler.fail(failed, "lost")

    assert [output.seq_id for output in outputs] == [first.seq_id]
    assert lengths(harness.step(), [victim]) == [4]


def test_steps_are_committed_in_order() -> None:
    harness = Harness()
    harness.add(3)
    harness.schedule()
    second = harness.schedule()

    with pytest.raises(RuntimeError, match="step 1 is not the oldest in flight"):
        harness.scheduler.commit(second, [])


def test_the_result_of_every_row_is_needed() -> None:
    harness = Harness()
    harness.add(3)

    with pytest.raises(ValueError, match="zip"):
        harness.scheduler.commit(harness.schedule(), [])


def test_the_budget_has_room_for_every_running_sequence() -> None:
    with pytest.raises(
        ValueError, match="max_num_batched_tokens=7 must be at least max_num_seqs=8"
    ):
        Harness(max_num_seqs=8, max_num_batched_tokens=7)


def test_new_blocks_name_their_place_in_the_table() -> None:
    harness = Harness()
    seq = harness.add(BLOCK_SIZE + 1)
    places: dict[int, int] = {}
    for _ in range(3 * BLOCK_SIZE):
        for slot, index, block_ids in harness.step().new_blocks:
            assert slot == seq.slot
            places |= dict(enumerate(block_ids, index))

    assert places == dict(enumerate(seq.block_table))
    assert len(seq.block_table) == 4


def test_keys_of_several_kinds_pass_through() -> None:
    harness = Harness()
    keys: list[Key] = [1, b"patch", 2, b"", 3]
    seq = Sequence(0, keys, SamplingParams(), 10)
    harness.scheduler.add(seq)

    batch = harness.step()

    assert batch.started[0].keys == keys
    assert len(harness.blocks._hash_of_block) == 1


def test_a_paused_sequence_gets_no_rows_and_keeps_what_it_holds() -> None:
    harness = Harness()
    first, second = harness.add(6), harness.add(6)
    harness.step()
    slot, table = first.slot, list(first.block_table)

    harness.scheduler.pause([first.seq_id, 99], True)
    for _ in range(3):
        assert lengths(harness.step(), [first, second]) == [0, 1]
    assert (first.slot, first.block_table) == (slot, table)
    assert harness.scheduler.num_paused == 1

    harness.scheduler.pause([first.seq_id], False)
    assert lengths(harness.step(), [first, second]) == [1, 1]
    assert harness.scheduler.num_preemptions == 0


def test_a_prompt_that_waits_or_is_half_computed_can_be_paused() -> None:
    harness = Harness(max_num_batched_tokens=8)
    chunked, waiting = harness.add(20), harness.add(4)
    harness.step()
    harness.scheduler.pause([chunked.seq_id, waiting.seq_id], True)
    assert harness.scheduler.schedule() is None
    assert not harness.scheduler.has_runnable
    harness.scheduler.pause([waiting.seq_id], False)
    assert lengths(harness.step(), [chunked, waiting]) == [0, 4]
    harness.scheduler.pause([chunked.seq_id], False)
    assert lengths(harness.step(), [chunked, waiting]) == [7, 1]


def test_the_results_of_a_paused_sequence_still_come_in() -> None:
    harness = Harness()
    seq = harness.add(3)
    batch = harness.schedule()
    harness.scheduler.pause([seq.seq_id], True)
    assert harness.commit(batch)[seq.seq_id].key == 1003
    assert harness.scheduler.schedule() is None


@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"num_blocks": 5}])
def test_a_paused_sequence_gives_way_to_one_that_can_run(limits: dict[str, int]) -> None:
    harness = Harness(**limits)
    first, second = harness.add(6), harness.add(6)
    harness.step()
    harness.scheduler.pause([first.seq_id, second.seq_id], True)
    third = harness.add(6)
    batch = harness.step()
    assert lengths(batch, [third]) == [6]
    # The older one keeps its place: the one of less precedence is enough.
    assert first.running
    assert not second.running
    assert batch.released != []
    harness.scheduler.abort(third.seq_id)
    harness.scheduler.pause([first.seq_id, second.seq_id], False)
    # Of its seven keys, a block was still in the cache.
    assert lengths(harness.step(), [first, second]) == [1, 3]


def test_an_older_one_gives_way_when_it_is_paused_and_nobody_loses_a_step() -> None:
    harness = Harness(num_blocks=6)
    first, second, third = harness.add(4), harness.add(3), harness.add(3)
    harness.step()
    harness.step()
    harness.scheduler.pause([first.seq_id], True)
    while harness.blocks.num_free:
        harness.step()
    while first.running:
        before = second.num_computed, third.num_computed
        harness.step()
        assert (second.num_computed, third.num_computed) == (before[0] + 1, before[1] + 1)
    assert harness.scheduler.num_preemptions == 1


def test_a_paused_sequence_lends_its_adapter_slot() -> None:
    harness = Harness(max_num_adapters=1)
    first, second = harness.add(3, adapter_id=1), harness.add(3, adapter_id=2)
    harness.step()
    assert not second.running
    harness.scheduler.pause([first.seq_id], True)
    assert lengths(harness.step(), [second]) == [3]
    assert not first.running


def test_nobody_gives_way_to_one_whose_adapter_still_has_no_room() -> None:
    harness = Harness(max_num_adapters=1)
    running, paused = harness.add(3, adapter_id=1), harness.add(3, adapter_id=1)
    harness.step()
    harness.scheduler.pause([paused.seq_id], True)
    other = harness.add(3, adapter_id=2)
    assert lengths(harness.step(), [running, paused, other]) == [1, 0, 0]
    assert paused.running
    assert harness.scheduler.num_preemptions == 0
    harness.scheduler.pause([running.seq_id], True)
    assert lengths(harness.step(), [other]) == [3]
    assert harness.scheduler.num_preemptions == 2


def test_the_adapter_of_least_precedence_gives_way() -> None:
    harness = Harness(max_num_adapters=3)
    seqs = [harness.add(3, adapter_id=adapter_id) for adapter_id in (1, 2, 3, 2, 1)]
    harness.step()
    harness.scheduler.pause([seq.seq_id for seq in seqs if seq.adapter_id != 3], True)
    other = harness.add(3, adapter_id=4)
    assert lengths(harness.step(), [seqs[2], other]) == [1, 3]
    assert [seq.running for seq in seqs] == [True, False, True, False, True]


@pytest.mark.parametrize("adapter_id", [None, 2])
def test_nobody_gives_way_to_one_that_still_has_no_room(adapter_id: int | None) -> None:
    harness = Harness(num_blocks=8, max_num_adapters=1)
    running, paused = harness.add(18), harness.add(3, adapter_id=1)
    harness.step()
    harness.scheduler.pause([paused.seq_id], True)
    waiting = harness.add(10, adapter_id=adapter_id)
    # Two blocks and the paused one's make three, of which the running one is to have one to grow.
    assert lengths(harness.step(), [running, paused, waiting]) == [1, 0, 0]
    assert paused.running
    harness.scheduler.abort(running.seq_id)
    assert lengths(harness.step(), [paused, waiting]) == [0, 10]


def test_blocks_that_others_hold_too_do_not_count_as_room() -> None:
    harness = Harness(num_blocks=8)
    running = harness.add(13, first_key=0)
    harness.step()
    paused = harness.add(13, first_key=0)
    harness.step()
    assert paused.num_cached == 12
    harness.scheduler.pause([paused.seq_id], True)
    # Three are free; the paused one would give back its last block, and its block of growth.
    too_long, fits = harness.add(13), harness.add(12)
    assert lengths(harness.step(), [running, paused, too_long, fits]) == [1, 0, 0, 0]
    assert harness.scheduler.num_preemptions == 0
    harness.scheduler.abort(too_long.seq_id)
    assert lengths(harness.step(), [running, fits]) == [1, 12]
    assert not paused.running


def test_a_paused_sequence_can_be_aborted() -> None:
    harness = Harness()
    running, waiting = harness.add(3), harness.add(3)
    harness.scheduler.pause([waiting.seq_id], True)
    harness.step()
    harness.scheduler.pause([running.seq_id], True)
    for seq in (running, waiting):
        news = harness.scheduler.abort(seq.seq_id)
        assert news is not None
        assert news.finish_reason == "abort"
    assert harness.scheduler.num_paused == 0
    assert not harness.scheduler.has_unfinished
    assert harness.blocks.num_free == harness.blocks.num_blocks
