"""A sequence: keys at positions, and how far they are computed."""

from typing import Any

from nanovllm.batch import Key
from nanovllm.sampling_params import SamplingParams


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

    __slots__ = (
        "adapter_id",
        "block_hashes",
        "block_table",
        "capacity",
        "finished",
        "keys",
        "max_keys",
        "num_cached",
        "num_computed",
        "num_positions",
        "num_prompt_keys",
        "num_published",
        "paused",
        "payload",
        "precedence",
        "reads_cache",
        "root_hash",
        "sample_index",
        "sampling_params",
        "scheduled_time",
        "schedules_ahead",
        "seed",
        "seq_id",
        "slot",
        "start_step",
    )

    def __init__(
        self,
        seq_id: int,
        keys: list[Key],
        sampling_params: SamplingParams,
        max_keys: int,
        *,
        seed: int = 0,
        sample_index: int = 0,
        priority: int = 0,
        adapter_id: int | None = None,
        root_hash: bytes = b"",
        reads_cache: bool = True,
        schedules_ahead: bool = True,
        payload: Any = None,
    ) -> None:
        self.seq_id = seq_id
        self.keys = list(keys)
        self.num_prompt_keys = len(keys)
        self.sampling_params = sampling_params
        self.max_keys = max_keys
        self.seed = seed
        self.sample_index = sample_index
        self.precedence = (priority, seq_id)
        self.adapter_id = adapter_id
        self.root_hash = root_hash
        self.reads_cache = reads_cache
        self.schedules_ahead = schedules_ahead
        self.payload = payload

        self.num_computed = 0
        self.num_positions = len(keys)
        self.num_cached = 0
        self.finished = False
        self.paused = False
        self.scheduled_time: float | None = None
        self.slot = -1
        self.start_step = -1

        self.block_table: list[int] = []
        self.capacity = 0
        self.block_hashes: list[bytes] = []
        self.num_published = 0

    @property
    def running(self) -> bool:
        return self.slot >= 0

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, keys={len(self.keys)}/{self.max_keys}, "
            f"computed={self.num_computed}/{self.num_positions}, slot={self.slot})"
        )
