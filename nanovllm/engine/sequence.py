"""A sequence: keys at positions, and how far they are computed."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from nanovllm.batch import Key
from nanovllm.sampling_params import SamplingParams


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One completion of one request, from `add` to its outcome.

    It has `num_computed` of `num_positions`; a step computes some more. Decode and prefill differ
    only in how many are left. A position may be scheduled before its key is known on the host, so
    `num_positions` may run ahead of `len(keys)` by the results that are still in flight.

    The scheduler writes the progress and the slot, the block manager the block table and hashes.

    Args:
        seq_id: Unique in the engine; ids count up with arrival.
        keys: The prompt's keys; generated keys are appended.
        sampling_params: What to sample.
        max_keys: Length, prompt included, at which the sequence ends.
        seed: Seed of its random draws.
        sample_index: Which of the request's `n` completions this is.
        priority: Lower runs first; among equals the earlier arrival.
        adapter_id: LoRA adapter, or None.
        root_hash: What its block hashes start from: sequences share blocks only below one root.
        reads_cache: Whether it may start from cached blocks.
        schedules_ahead: Whether its next step can be scheduled before the last result is known.
        payload: Opaque to the engine, handed to the runner when a slot starts.
    """

    seq_id: int
    keys: list[Key]
    sampling_params: SamplingParams
    max_keys: int
    _: KW_ONLY
    seed: int = 0
    sample_index: int = 0
    priority: int = 0
    adapter_id: int | None = None
    root_hash: bytes = b""
    reads_cache: bool = True
    schedules_ahead: bool = True
    payload: Any = None

    precedence: tuple[int, int] = field(init=False)
    num_prompt_keys: int = field(init=False)
    num_positions: int = field(init=False)
    num_computed: int = field(init=False, default=0)
    num_cached: int = field(init=False, default=0)
    paused: bool = field(init=False, default=False)
    scheduled_time: float | None = field(init=False, default=None)
    slot: int = field(init=False, default=-1)
    start_step: int = field(init=False, default=-1)

    block_table: list[int] = field(init=False, default_factory=list)
    capacity: int = field(init=False, default=0)
    block_hashes: list[bytes] = field(init=False, default_factory=list)
    num_published: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.keys = list(self.keys)
        self.num_prompt_keys = self.num_positions = len(self.keys)
        self.precedence = (self.priority, self.seq_id)

    @property
    def running(self) -> bool:
        return self.slot >= 0

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, keys={len(self.keys)}/{self.max_keys}, "
            f"computed={self.num_computed}/{self.num_positions}, slot={self.slot})"
        )
