"""Who runs in a step, and what becomes of the results."""

import time
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from nanovllm.batch import (
    Batch,
    EngineOutput,
    SlotStart,
    SpeechPayload,
    StepResult,
    TextPayload,
)
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

precedence = attrgetter("precedence")


@dataclass(slots=True)
class StepInFlight:
    """A scheduled step that is not committed yet."""

    batch: Batch
    sequences: list[Sequence] = field(default_factory=list)
    emitting: list[Sequence] = field(default_factory=list)
    published: list[int] = field(default_factory=list)


class Scheduler:
    """Fills steps under four budgets: positions, running sequences, KV blocks, adapters.

    `waiting` and `running` are kept in order of precedence (priority, then arrival). In a step,
    running sequences come first: those with one position left, then those with more; what remains
    goes to waiting ones. When blocks run out the running sequence of least precedence is preempted
    and recomputed later, so the one of most precedence always goes on.

    A step may be scheduled while earlier ones are in flight. Steps are committed in order.

    A paused sequence gets no rows. It keeps its slot and blocks until one that can run needs them;
    then it is preempted before any other.

    Args:
        block_manager: Owner of the KV blocks; its pool holds at least one sequence of full length.
        max_num_seqs: Sequences that run at the same time, and so the number of slots.
        max_num_batched_tokens: Positions in a step, at least `max_num_seqs`.
        max_num_adapters: Different LoRA adapters among the running sequences.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_adapters: int = 0,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} must be at least "
                f"max_num_seqs={max_num_seqs}"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_adapters = max_num_adapters
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_keys = 0
        self.num_cached_keys = 0
        self.num_forced_keys = 0
        self._sequences: dict[int, Sequence] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._released: list[int] = []
        self._adapters: Counter[int] = Counter()
        self._num_paused = 0
        self._in_flight: deque[StepInFlight] = deque()
        self._step = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def has_runnable(self) -> bool:
        """Whether a sequence has not ended and is not paused."""
        return len(self._sequences) > self._num_paused

    @property
    def num_paused(self) -> int:
        """Sequences that have not ended and get no rows."""
        return self._num_paused

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def is_open(self, seq_id: int) -> bool:
        """Whether a sequence has been added and has not ended."""
        return seq_id in self._sequences

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, seq, key=precedence)
        self._sequences[seq.seq_id] = seq

    def abort(self, seq_id: int) -> EngineOutput | None:
        """End a sequence at any moment; None if it has ended already."""
        seq = self._sequences.get(seq_id)
        return None if seq is None else self._finish(seq, None, None, "abort", None)

    def pause(self, seq_ids: Iterable[int], paused: bool) -> None:
        """Give sequences no more rows, or again; those that have ended do not matter.

        Results in flight still come in.
        """
        for seq_id in seq_ids:
            seq = self._sequences.get(seq_id)
            if seq is not None and seq.paused != paused:
                seq.paused = paused
                self._num_paused += 1 if paused else -1

    def schedule(self) -> Batch | None:
        """Fill the next step; None if nothing can run before results come in."""
        step = StepInFlight(Batch(self._step))
        num_preemptions = self.num_preemptions
        prefills = self._schedule_decodes(step)
        step.batch.num_decodes = len(step.sequences)
        budget = self.max_num_batched_tokens - step.batch.num_decodes
        for seq in prefills:
            if budget and seq.running:
                budget -= self._add_row(step, seq, budget)
        if self.num_preemptions == num_preemptions:
            self._admit(step, budget)
        if not step.sequences:
            return None
        step.batch.released, self._released = self._released, []
        self._in_flight.append(step)
        self._step += 1
        return step.batch

    def commit(self, batch: Batch, results: Iterable[StepResult]) -> list[EngineOutput]:
        """Take the results of the oldest step in flight.

        Results of sequences that ended or were preempted since are dropped.

        Returns:
            News of every sequence that got a key, in row order.
        """
        step = self._pop(batch)
        outputs = []
        block_size = self.block_manager.block_size
        for seq, result in zip(step.emitting, results, strict=True):
            if seq.slot != result.slot or seq.start_step > batch.step:
                continue
            _, key, stop, payload, forced = result
            if stop is not None and stop.reason == "error":
                outputs.append(self._finish(seq, None, payload, "error", stop.detail))
                continue
            if forced or (stop is not None and stop.keeps_key):
                outputs += self._take_several(seq, result)
                continue
            keys = seq.keys
            keys.append(key)
            num_keys = len(keys)
            if stop is not None:
                outputs.append(self._finish(seq, key, payload, stop.reason, stop.detail))
            elif num_keys >= seq.max_keys:
                outputs.append(self._finish(seq, key, payload, "length", None))
            else:
                if seq.num_positions < num_keys:
                    seq.num_positions = num_keys
                elif num_keys % block_size == 0 and self._in_flight:
                    self._publish(self._in_flight[-1], seq)
                outputs.append(
                    EngineOutput(
                        seq.seq_id, key, payload, None, None, seq.num_cached, seq.scheduled_time
                    )
                )
        return outputs

    def _take_several(self, seq: Sequence, result: StepResult) -> list[EngineOutput]:
        """Take a key and those forced behind it, of a sequence that is not scheduled ahead."""
        _, key, stop, payload, forced = result
        new_keys = [key, *forced][: seq.max_keys - len(seq.keys)]
        self.num_forced_keys += len(new_keys) - 1
        seq.keys += new_keys
        seq.num_positions = len(seq.keys)
        outputs = [
            EngineOutput(
                seq.seq_id,
                new_key,
                None if index else payload,
                num_cached=seq.num_cached,
                scheduled_time=seq.scheduled_time,
            )
            for index, new_key in enumerate(new_keys)
        ]
        if stop is not None and len(new_keys) == 1 + len(forced):
            outputs.append(self._finish(seq, None, None, stop.reason, stop.detail))
        elif len(seq.keys) >= seq.max_keys:
            outputs.append(self._finish(seq, None, None, "length", None))
        return outputs

    def fail(self, batch: Batch, message: str) -> list[EngineOutput]:
        """Give up the oldest step in flight and all after it, which build on what it wrote.

        Sequences that only got blocks in them start over: the runner may not know of these.

        Returns:
            The outcome "error" of every sequence that had a row in one of them.
        """
        failed = [self._pop(batch), *self._in_flight]
        self._in_flight.clear()
        outputs = []
        for step in failed:
            self.block_manager.unpublish(step.published)
            for seq in step.sequences:
                if seq.running and seq.start_step <= step.batch.step:
                    outputs.append(self._finish(seq, None, None, "error", message))
        grown = {slot for step in failed for slot, _, _ in step.batch.new_blocks}
        for seq in [seq for seq in self.running if seq.slot in grown]:
            self._preempt(seq)
        return outputs

    def _schedule_decodes(self, step: StepInFlight) -> list[Sequence]:
        """Give every running sequence with one position left its row; return the longer ones.

        Written out rather than composed of `_add_row`: at 256 rows a step this loop is what the
        scheduler costs.
        """
        batch, sequences, emitting = step.batch, step.sequences, step.emitting
        slots, starts = batch.slots, batch.starts
        block_size = self.block_manager.block_size
        longer = []
        for seq in self._unpaused() if self._num_paused else self.running:
            start = seq.num_computed
            num_left = seq.num_positions - start
            if num_left == 1:
                if start == seq.capacity and not self._grow(step, seq):
                    break
                computed = start + 1
                slots.append(seq.slot)
                starts.append(start)
                sequences.append(seq)
                emitting.append(seq)
                seq.num_computed = computed
                if seq.schedules_ahead and computed + 1 < seq.max_keys:
                    seq.num_positions = computed + 1
                if computed % block_size == 0:
                    self._publish(step, seq)
            elif num_left:
                if seq.num_positions > seq.capacity and not self._grow_to_fit(step, seq):
                    break
                longer.append(seq)
        batch.lengths = [1] * len(slots)
        batch.emits = [True] * len(slots)
        return longer

    def _unpaused(self) -> Iterator[Sequence]:
        """The running sequences that may have rows, but for those preempted on the way."""
        for seq in tuple(self.running):  # a paused one before may be preempted
            if seq.running and not seq.paused:
                yield seq

    def _grow(self, step: StepInFlight, seq: Sequence) -> bool:
        """Append a block, preempting from the end of `running`; False if `seq` was the end."""
        while not self.block_manager.num_free:
            victim = next(self._paused(), self.running[-1])
            self._preempt(victim)
            if victim is seq:
                return False
        index = len(seq.block_table)
        block_id = self.block_manager.append_block(seq)
        step.batch.new_blocks.append((seq.slot, index, [block_id]))
        return True

    def _grow_to_fit(self, step: StepInFlight, seq: Sequence) -> bool:
        """Append the blocks that forced keys need; a prompt has them. False as for `_grow`."""
        num_before = len(step.batch.new_blocks)
        while seq.num_positions > seq.capacity:
            if not self._grow(step, seq):
                del step.batch.new_blocks[num_before:]
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.num_computed = 0
        seq.num_positions = len(seq.keys)
        insort(self.waiting, seq, key=precedence)
        self.num_preemptions += 1

    def _add_row(self, step: StepInFlight, seq: Sequence, budget: int) -> int:
        """Schedule as many of a sequence's positions as the budget allows."""
        batch, start = step.batch, seq.num_computed
        length = min(seq.num_positions - start, budget)
        computed = start + length
        emits = computed == seq.num_positions
        batch.slots.append(seq.slot)
        batch.starts.append(start)
        batch.lengths.append(length)
        batch.emits.append(emits)
        step.sequences.append(seq)
        seq.num_computed = computed
        if emits:
            step.emitting.append(seq)
            if seq.schedules_ahead and computed + 1 < seq.max_keys:
                seq.num_positions = computed + 1
        self._publish(step, seq)
        return length

    def _admit(self, step: StepInFlight, budget: int) -> None:
        """Start waiting sequences in order of precedence while the budgets last.

        A sequence that waits for an adapter lets pass only those that need none: otherwise a
        steady stream for loaded adapters would keep it out for ever.
        """
        index, adapters_blocked = 0, False
        while budget and index < len(self.waiting):
            seq = self.waiting[index]
            if seq.paused:
                index += 1
                continue
            if seq.adapter_id is not None and (adapters_blocked or not self._adapter_fits(seq)):
                adapters_blocked = True
                index += 1
                continue
            if not self._make_room(seq):
                break
            # Those that gave way may stand before it now.
            index = bisect_left(self.waiting, seq.precedence, key=precedence)
            del self.waiting[index]
            self._start(step, seq)
            budget -= self._add_row(step, seq, budget)

    def _adapter_fits(self, seq: Sequence) -> bool:
        """Whether its adapter may run, perhaps once paused sequences gave way."""
        return self._has_adapter(seq) or bool(self._adapter_victims())

    def _has_adapter(self, seq: Sequence) -> bool:
        """Whether its adapter is in use, or one more may be."""
        in_use = self._adapters
        return seq.adapter_id in in_use or len(in_use) < self.max_num_adapters

    def _adapter_victims(self) -> list[Sequence]:
        """All the users of an adapter, if they are paused; of the one of least precedence."""
        users: defaultdict[int, list[Sequence]] = defaultdict(list)
        for seq in self._paused():
            if seq.adapter_id is not None:
                users[seq.adapter_id].append(seq)
                if len(users[seq.adapter_id]) == self._adapters[seq.adapter_id]:
                    return users[seq.adapter_id]
        return []

    def _make_room(self, seq: Sequence) -> bool:
        """Give a sequence its blocks, and see that a slot and an adapter are free for it.

        Paused ones give way, but only if that is enough.
        """
        victims = self._victims(seq) if self._num_paused else []
        if victims is None:
            return False
        for victim in victims:
            self._preempt(victim)
        # A block of growth for each running sequence: a newcomer is not to preempt them.
        return bool(self._free_slots) and self.block_manager.allocate(seq, len(self.running))

    def _victims(self, seq: Sequence) -> list[Sequence] | None:
        """The paused sequences that must give way for one to start; None if all are too few."""
        needs_adapter = seq.adapter_id is not None and not self._has_adapter(seq)
        first = self._adapter_victims() if needs_adapter else []
        paused = [*first, *(victim for victim in self._paused() if victim not in first)]
        num_blocks_from = self.block_manager.num_to_free(seq, paused, len(self.running))
        if num_blocks_from is None:
            return None
        num_victims = max(len(first), num_blocks_from, not self._free_slots)
        return paused[:num_victims] if num_victims <= len(paused) else None

    def _paused(self) -> Iterator[Sequence]:
        """The running sequences that are paused, the one of least precedence first."""
        if self._num_paused:
            yield from (seq for seq in reversed(self.running) if seq.paused)

    def _start(self, step: StepInFlight, seq: Sequence) -> None:
        seq.slot = self._free_slots.pop()
        seq.start_step = step.batch.step
        if seq.scheduled_time is None:
            seq.scheduled_time = time.monotonic()
            seq.num_cached = seq.num_computed
            self.num_prompt_keys += seq.num_prompt_keys
            self.num_cached_keys += seq.num_cached
        if seq.adapter_id is not None:
            self._adapters[seq.adapter_id] += 1
        insort(self.running, seq, key=precedence)
        step.batch.new_blocks.append((seq.slot, 0, list(seq.block_table)))
        step.batch.started.append(
            SlotStart(
                slot=seq.slot,
                keys=list(seq.keys),
                num_prompt_keys=seq.num_prompt_keys,
                sampling_params=seq.sampling_params,
                sample_index=seq.sample_index,
                seed=seq.seed,
                adapter_id=seq.adapter_id,
                payload=seq.payload,
            )
        )

    def _leave(self, seq: Sequence) -> None:
        """Take a running sequence's slot, blocks and adapter back."""
        del self.running[bisect_left(self.running, seq.precedence, key=precedence)]
        self.block_manager.free(seq)
        self._free_slots.append(seq.slot)
        self._released.append(seq.slot)
        seq.slot = -1
        if seq.adapter_id is not None:
            self._adapters[seq.adapter_id] -= 1
            self._adapters += Counter()  # drops those at zero

    def _finish(
        self,
        seq: Sequence,
        key: int | bytes | None,
        payload: TextPayload | SpeechPayload | None,
        reason: str,
        detail: int | str | None,
    ) -> EngineOutput:
        if seq.running:
            self._leave(seq)
        else:
            del self.waiting[bisect_left(self.waiting, seq.precedence, key=precedence)]
        self._num_paused -= seq.paused
        del self._sequences[seq.seq_id]
        return EngineOutput(
            seq.seq_id, key, payload, reason, detail, seq.num_cached, seq.scheduled_time
        )

    def _publish(self, step: StepInFlight, seq: Sequence) -> None:
        """Publish a sequence's full blocks, the last of which `step` writes."""
        step.published += self.block_manager.publish(seq)

    def _pop(self, batch: Batch) -> StepInFlight:
        step = self._in_flight.popleft()
        if step.batch is not batch:
            raise RuntimeError(f"step {batch.step} is not the oldest in flight")
        return step
