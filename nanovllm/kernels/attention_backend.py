"""The seam between the layers and whatever computes attention."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The KV cache a backend wants for one layer.

    Args:
        shape: Shape of the tensor that holds keys and values of all blocks.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a backend needs to know to lay out a layer's KV cache."""

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The rows of a step, as attention sees them.

    Row `i` has queries at positions `starts[i] .. starts[i] + lengths[i] - 1` and attends to all
    positions of its sequence up to each. Rows of one position come first.

    Args:
        starts: First position of each row.
        lengths: Positions of each row.
        block_tables: Blocks of each row's sequence, int64 `[num_rows, max_blocks]`.
    """

    starts: list[int]
    lengths: list[int]
    block_tables: Tensor


class AttentionBackend(Protocol):
    """Four methods: lay the cache out, write to it, plan a step, attend."""

    def cache_spec(self, config: CacheConfig) -> CacheSpec:
        """Shape and dtype of a layer's cache.

        Raises:
            ValueError: The backend cannot use this block size or dtype.
        """

    def write(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Store keys and values `[num_tokens, num_kv_heads, head_dim]` at `slots` [num_tokens]."""

    def plan(self, batch: AttentionBatch) -> Any:
        """Compute once a step what `run` needs in every layer."""

    def run(self, q: Tensor, cache: Tensor, metadata: Any, window: int | None) -> Tensor:
        """Attend from `q` `[num_tokens, num_heads, head_dim]` to the cache.

        Args:
            q: Queries of the step's rows, one row after the other.
            cache: The layer's cache, keys and values of the step already written.
            metadata: What `plan` returned.
            window: Positions a query sees, itself included; None is all before it.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """
