"""Two runners without a model that watch the engine: every promise a batch makes is checked.

What a real runner computes at a position depends on all the keys before it, read through the block
table. The fakes keep a number in place of the keys and values, chained the same way, and compare
what they read with what the sequence ought to have there; so a stale block, a wrong hash, a wrong
slot or a position left out raises `AssertionError` in the step where it happens.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from zlib import crc32

from nanovllm.batch import Batch, Key, SlotStart, StepResult, Stop
from nanovllm.sampling_params import SamplingParams

GARBAGE = -1
"""What a failed step leaves in the cache."""

EOS = 0
"""The text fake's end-of-text id."""


class InjectedError(RuntimeError):
    """The failure a test asked for."""


class InjectedInterrupt(KeyboardInterrupt):
    """Ctrl-C in the middle of a step."""


class Generated(NamedTuple):
    """What follows a position: the next key, whether the model stops, what comes along."""

    key: Key
    stop: Stop | None
    payload: object


class FakeRequest(Protocol):
    """What a payload has to say to the fakes: below which root its positions are cached."""

    root: int


def chain(value: int, content: tuple[int, int], root: int) -> int:
    """What the cache holds at a position, given what it holds at the one before."""
    # Hashes of numbers do not depend on PYTHONHASHSEED, unlike those of strings and bytes.
    return hash((value, *content, root))


@dataclass(slots=True)
class FakeSlot:
    """What a running sequence owns in the runner.

    Args:
        start: What the scheduler said of it.
        root: What its positions are cached below.
        keys: Its keys, those generated in flight included.
        values: What the cache ought to hold at each position whose key is known.
        num_computed: Positions computed, or found in the cache; None until its first row.
        block_table: Its blocks.
    """

    start: SlotStart
    root: int
    keys: list[Key]
    values: list[int] = field(default_factory=list)
    num_computed: int | None = None
    block_table: list[int] = field(default_factory=list)


class FakeStep(NamedTuple):
    """A step in flight: its number, its results and the places it wrote."""

    number: int
    results: list[StepResult]
    written: list[int]


class FakeRunner:
    """Memory, slots and the checks on batches; subclasses say what a position is.

    Args:
        num_blocks: Blocks of the KV cache.
        block_size: Positions in a block.
        max_num_seqs: Number of slots.
        max_num_batched_tokens: Positions a batch may have.
        max_model_len: Longest sequence.

    Attributes:
        memory: What each place of the cache holds.
        fail_before_launch: Numbers of the steps that fail before anything has been done.
        fail_launch: Numbers of the steps whose launch fails halfway.
        fail_collect: Numbers of the steps whose collection fails.
        error: What is raised then.
        last_batch: The batch launched last.
        num_launched: Batches launched, failed ones included.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.memory: list[int] = [GARBAGE] * (num_blocks * block_size)
        self.fail_before_launch: set[int] = set()
        self.fail_launch: set[int] = set()
        self.fail_collect: set[int] = set()
        self.error: type[BaseException] = InjectedError
        self.last_batch: Batch | None = None
        self.num_launched = 0
        self.slots: dict[int, FakeSlot] = {}
        # A failed launch may or may not have applied its changes to these slots.
        self._unsure: set[int] = set()
        self._in_flight: list[FakeStep] = []

    @classmethod
    def generate(
        cls,
        keys: list[Key],
        params: SamplingParams,
        payload: FakeRequest,
        *,
        seed: int,
        sample_index: int,
        max_keys: int,
    ) -> tuple[list[Generated], str]:
        """What a sequence must become, computed alone, without blocks or batches.

        Returns:
            What is generated, the position that fails included, and the finish reason.
        """
        slot = cls._new_slot(SlotStart(0, keys, len(keys), params, sample_index, seed, 0, payload))
        generated: list[Generated] = []
        while len(slot.keys) < max_keys:
            cls._extend_values(slot)
            generated.append(cls._next(slot, slot.values[-1]))
            cls._take(slot, generated[-1].key)
            stop = generated[-1].stop
            if stop is not None:
                return generated, stop.reason
        return generated, "length"

    @classmethod
    def values_of(cls, keys: list[Key], root: int) -> list[int]:
        """What the cache must hold at each position of a sequence."""
        values, value = [], root
        for key in keys:
            value = chain(value, cls._content(key), root)
            values.append(value)
        return values

    def launch(self, batch: Batch) -> FakeStep:
        """Compute a step; its results are seen only when it is collected."""
        self.last_batch = batch
        self.num_launched += 1
        if batch.step in self.fail_before_launch:
            self._unsure.update(batch.released, (start.slot for start in batch.started))
            raise self.error(f"before launch of step {batch.step}")
        self._apply_slots(batch)
        self._check_rows(batch)
        written = self._write(batch)
        if batch.step in self.fail_launch:
            self._spoil(written[len(written) // 2 :])
            raise self.error(f"launch of step {batch.step}")
        rows = zip(batch.slots, batch.starts, batch.lengths, batch.emits, strict=True)
        results = []
        for slot_id, start, length, emits in rows:
            slot = self.slots[slot_id]
            slot.num_computed = end = start + length
            value = self._read(slot, end)
            if not emits:
                assert end < len(slot.keys), f"the row of slot {slot_id} should emit"
                continue
            assert end == len(slot.keys), f"slot {slot_id} emits at {end}, not at its end"
            generated = self._next(slot, value)
            self._take(slot, generated.key)
            results.append(self._force(StepResult(slot_id, *generated), slot))
        handle = FakeStep(batch.step, results, written)
        self._in_flight.append(handle)
        return handle

    def collect(self, handle: FakeStep) -> list[StepResult]:
        """Hand out a step's results."""
        if handle.number in self.fail_collect:
            for step in self._in_flight:
                self._spoil(step.written)
            self._in_flight.clear()
            raise self.error(f"collection of step {handle.number}")
        assert self._in_flight.pop(0) is handle, "steps are collected in order"
        return handle.results

    def interrupted(self, known: list[FakeStep]) -> None:
        """Ctrl-C came, perhaps just before or after what we did last.

        Args:
            known: The steps in flight that the engine knows.
        """
        self._unsure.update(range(self.max_num_seqs))
        self._in_flight = known

    def _apply_slots(self, batch: Batch) -> None:
        for slot_id in batch.released:
            assert slot_id in self.slots or slot_id in self._unsure, f"{slot_id} never started"
            self.slots.pop(slot_id, None)
            self._unsure.discard(slot_id)
        for start in batch.started:
            slot_id = start.slot
            assert 0 <= slot_id < self.max_num_seqs
            assert slot_id not in self.slots or slot_id in self._unsure, f"{slot_id} started twice"
            assert start.seed is not None
            assert 0 < start.num_prompt_keys <= len(start.keys)
            self._unsure.discard(slot_id)
            self.slots[slot_id] = self._new_slot(start)
            self._extend_values(self.slots[slot_id])
        for slot_id, index, block_ids in batch.new_blocks:
            table = self.slots[slot_id].block_table
            assert index == len(table), f"blocks of slot {slot_id} at {index}, not {len(table)}"
            assert all(0 <= block_id < self.num_blocks for block_id in block_ids)
            table += block_ids
            assert len(set(table)) == len(table), "a block stands twice in a table"

    def _check_rows(self, batch: Batch) -> None:
        assert batch.slots, "an empty batch"
        assert len(set(batch.slots)) == len(batch.slots), "a slot has two rows"
        assert batch.num_positions <= self.max_num_batched_tokens
        started = {start.slot for start in batch.started}
        assert started <= set(batch.slots), "a slot started without a row"
        rows = zip(batch.slots, batch.starts, batch.lengths, batch.emits, strict=True)
        for row, (slot_id, start, length, _) in enumerate(rows):
            slot = self.slots[slot_id]
            if slot.num_computed is None:
                assert start % self.block_size == 0, "hits are whole blocks"
                assert start < len(slot.keys), "at least one position is computed"
                slot.num_computed = start
            assert start == slot.num_computed, f"slot {slot_id} goes on at {start}"
            assert length >= 1
            assert start + length <= min(len(slot.keys), self.max_model_len), "no key there"
            assert start + length <= len(slot.block_table) * self.block_size, "no block there"
            is_decode = slot_id not in started and len(slot.keys) - start == 1
            assert is_decode == (row < batch.num_decodes), "decodes come first, and are counted"

    def _write(self, batch: Batch) -> list[int]:
        """Write all positions of a step before any is read."""
        written = []
        for slot_id, start, length in zip(batch.slots, batch.starts, batch.lengths, strict=True):
            slot = self.slots[slot_id]
            for position in range(start, start + length):
                place = self._place(slot, position)
                self.memory[place] = slot.values[position]
                written.append(place)
        assert len(set(written)) == len(written), "two rows write to one place"
        return written

    def _read(self, slot: FakeSlot, end: int) -> int:
        """Attend to all positions before `end`."""
        read = [self.memory[self._place(slot, position)] for position in range(end)]
        assert read == slot.values[:end], f"slot {slot.start.slot} reads what is not its own"
        return read[-1]

    def _place(self, slot: FakeSlot, position: int) -> int:
        size = self.block_size
        return slot.block_table[position // size] * size + position % size

    def _spoil(self, places: list[int]) -> None:
        for place in places:
            self.memory[place] = GARBAGE

    @classmethod
    def _new_slot(cls, start: SlotStart) -> FakeSlot:
        return FakeSlot(start, start.payload.root, list(start.keys))

    @classmethod
    def _extend_values(cls, slot: FakeSlot) -> None:
        value = slot.values[-1] if slot.values else slot.root
        for key in slot.keys[len(slot.values) :]:
            value = chain(value, cls._content(key), slot.root)
            slot.values.append(value)

    @classmethod
    def _take(cls, slot: FakeSlot, key: Key) -> None:
        """Put a generated key where the next step finds it."""
        slot.keys.append(key)
        cls._extend_values(slot)

    @classmethod
    def _content(cls, key: Key) -> tuple[int, int]:
        """A key as numbers; a token and a patch never give the same."""
        if isinstance(key, int):
            return 0, key
        return 1, crc32(key)

    @classmethod
    def _next(cls, slot: FakeSlot, value: int) -> Generated:
        """What follows the last position, given what was read there."""
        raise NotImplementedError

    @classmethod
    def _force(cls, result: StepResult, slot: FakeSlot) -> StepResult:
        """The result with the keys behind it that need no step."""
        return result


@dataclass(slots=True)
class FakeText:
    """Payload of the text fake.

    Args:
        root: What its positions are cached below.
        ignores_eos: Whether the end-of-text id does not end it.
        num_forced: Keys that are known with each sampled one, as with a grammar.
    """

    root: int = 0
    ignores_eos: bool = False
    num_forced: int = 0


class AsyncFakeRunner(FakeRunner):
    """Text-like: keys are token ids, a step's are known to the host only when it is collected."""

    VOCAB_SIZE = 23

    @classmethod
    def _next(cls, slot: FakeSlot, value: int) -> Generated:
        draw = chain(value, (slot.start.seed, slot.start.sample_index), slot.root)
        key = draw % cls.VOCAB_SIZE
        stops = key == EOS and not slot.start.payload.ignores_eos
        return Generated(key, Stop("stop") if stops else None, None)

    @classmethod
    def _force(cls, result: StepResult, slot: FakeSlot) -> StepResult:
        forced: list[Key] = []
        stop = result.stop
        while stop is None and len(forced) < slot.start.payload.num_forced:
            key, stop, _ = cls._next(slot, slot.values[-1])
            cls._take(slot, key)
            forced.append(key)
        if forced and stop is not None:
            stop = Stop("stop", keeps_key=True)
        return result._replace(stop=stop, forced=forced)


@dataclass(slots=True)
class FakeVoice:
    """Payload of the speech fake.

    Args:
        root: What its positions are cached below.
        patches: The audio of patches generated so far by their digest: a key alone is not enough
            to feed a position again.
        never_stops: Whether the stop head is ignored.
    """

    root: int = 0
    patches: dict[bytes, int] = field(default_factory=dict)
    never_stops: bool = False


@dataclass(slots=True)
class FakeVoiceSlot(FakeSlot):
    """A slot with a decoder state that has seen `num_decoded` patches, in order."""

    state: int = 0
    num_decoded: int = 0


class SpeechFakeRunner(FakeRunner):
    """Speech-like: generated keys are digests of patches, and a slot has a running state.

    A patch depends on the state as well as on the cache, so a state that misses a patch, sees one
    twice or is not rebuilt when a sequence resumes shows in all that follows.
    """

    @classmethod
    def _new_slot(cls, start: SlotStart) -> FakeSlot:
        voice = start.payload
        slot = FakeVoiceSlot(start, voice.root, list(start.keys), state=voice.root)
        for key in start.keys[start.num_prompt_keys :]:
            assert isinstance(key, bytes)
            cls._decode(slot, voice.patches[key])
        return slot

    @classmethod
    def _next(cls, slot: FakeSlot, value: int) -> Generated:
        assert isinstance(slot, FakeVoiceSlot)
        assert slot.num_decoded == len(slot.keys) - slot.start.num_prompt_keys
        seed = chain(slot.state, (slot.start.seed, slot.start.sample_index), slot.root)
        patch = chain(value, (2, seed), slot.root)
        digest = (patch % 2**64).to_bytes(8, "little")
        voice = slot.start.payload
        voice.patches[digest] = patch
        cls._decode(slot, patch)
        if patch % 37 == 0:
            return Generated(digest, Stop("error", "NaN in the patch"), None)
        stops = patch % 11 == 0 and not voice.never_stops
        return Generated(digest, Stop("stop") if stops else None, slot.state)

    @staticmethod
    def _decode(slot: FakeVoiceSlot, patch: int) -> None:
        slot.state = chain(slot.state, (3, patch), slot.root)
        slot.num_decoded += 1


def rows_of(batch: Batch) -> list[tuple[int, int, int, bool]]:
    """A batch's rows as `(slot, start, length, emits)`."""
    return list(zip(batch.slots, batch.starts, batch.lengths, batch.emits, strict=True))
