"""The seam between the layers and whatever computes attention."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The KV cache a backend wants for one layer, filled with zeros.

    Args:
        shape: Shape of the tensor that holds keys and values of all blocks.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What a backend needs to know of the layers it serves.

    Args:
        block_size: Positions in a KV block.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head; scores are divided by its root.
        dtype: Of queries, and of the cache unless that is quantized.
        quantize_cache: Whether keys and values are kept in int8, with a scale a position and head.
    """

    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    quantize_cache: bool = False


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The rows of a step, as attention sees them.

    Row `i` has queries at positions `starts[i] .. starts[i] + lengths[i] - 1` and attends to all
    positions of its sequence up to each. Rows of one position come first.

    Args:
        starts: First position of each row, `[num_rows]`.
        lengths: Positions of each row, `[num_rows]`.
        block_tables: Blocks of each row's sequence, int64 `[num_rows, max_blocks]`.
    """

    starts: IntArray
    lengths: IntArray
    block_tables: Tensor


class HeadNorms(NamedTuple):
    """Weights `[head_dim]` of the norms of queries and keys, and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


class AttentionBackend(Protocol):
    """Four methods: lay the cache out, write to it, plan a step, attend."""

    def cache_spec(self, num_blocks: int) -> CacheSpec:
        """Shape and dtype of a layer's cache of so many blocks."""

    def write(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """Norm and rotate the heads, and store keys and values.

        Args:
            qkv: Projections `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`.
            norms: Norms of queries and keys by head, if the model has them.
            rotary: Cosines and sines, each float32 `[num_tokens, 1, head_dim / 2]`.
            cache: The layer's cache.
            slots: Where each token's keys and values go, `[num_tokens]`.

        Returns:
            The queries, `[num_tokens, num_heads, head_dim]`.
        """

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
