"""The seam between the layers and whatever computes attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


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
        backend: What `attention_backend` asks for.
        cascade: Whether blocks that several rows of a step share may be read once for all.
        deterministic: Whether a row's result may not depend on the other rows.
    """

    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    quantize_cache: bool = False
    backend: str = "auto"
    cascade: bool = True
    deterministic: bool = False


class BlockTables(NamedTuple):
    """Which blocks each sequence has, twice: on the device, and on the host for who plans there.

    Each is int64 `[num_slots, max_blocks]`; the entries past a sequence's blocks mean nothing.
    """

    device: Tensor
    host: IntArray

    @classmethod
    def zeros(cls, num_slots: int, max_blocks: int, device: torch.device) -> "BlockTables":
        """Tables of no blocks at all. On a CPU the two are one."""
        host = np.zeros((num_slots, max_blocks), dtype=np.int64)
        return cls(torch.from_numpy(host).to(device), host)

    def append(self, new_blocks: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Enter blocks `(slot, index, block_ids)`, which come from that index on."""
        if not new_blocks:
            return
        slots = np.repeat(
            [slot for slot, _, _ in new_blocks], [len(ids) for _, _, ids in new_blocks]
        )
        columns = np.concatenate([np.arange(at, at + len(ids)) for _, at, ids in new_blocks])
        self.host[slots, columns] = np.concatenate([ids for _, _, ids in new_blocks])
        device = self.device.device
        if device.type != "cpu":
            # From the host's table: if a place is named twice, both say what it holds in the end.
            entries = to_device(np.stack([slots, columns, self.host[slots, columns]]), device)
            self.device[entries[0], entries[1]] = entries[2]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The rows of a step, as attention sees them.

    Row `i` has queries at positions `starts[i] .. starts[i] + lengths[i] - 1` and attends to all
    positions of its sequence up to each. A row that only pads has one query at position -1, which
    attends to nothing.

    Args:
        starts: First position of each row, `[num_rows]`.
        lengths: Positions of each row, `[num_rows]`.
        slots: Which of the tables is each row's, `[num_rows]`.
        tables: Blocks of the sequences.
        device_slots: `slots` on the device.
        device_ends: Position after each row's last, on the device, int64 `[num_rows]`.
    """

    starts: IntArray
    lengths: IntArray
    slots: IntArray
    tables: BlockTables
    device_slots: Tensor
    device_ends: Tensor

    @classmethod
    def of(
        cls, starts: IntArray, lengths: IntArray, slots: IntArray, tables: BlockTables
    ) -> "AttentionBatch":
        """The batch of some rows, what the device needs of them copied there."""
        device = tables.device.device
        return cls(
            starts,
            lengths,
            slots,
            tables,
            to_device(slots, device),
            to_device(starts + lengths, device),
        )

    def row_tables(self, block_size: int) -> Tensor:
        """The tables of the rows one by one, no wider than they need, on the device."""
        longest = int((self.starts + self.lengths).max(initial=0))
        return self.tables.device[self.device_slots, : -(-longest // block_size)]


class PlanBuffers:
    """What plans for a captured graph keep from one replay to the next, at fixed addresses."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._copied: dict[str, npt.NDArray[Any]] = {}

    def keep(self, name: str, make: Callable[[], T]) -> T:
        """What is kept under a name, made at first."""
        if name not in self._kept:
            self._kept[name] = make()
        return cast(T, self._kept[name])

    def put(self, name: str, array: npt.NDArray[Any], device: torch.device) -> Tensor:
        """Copy a host array, always of the same shape under one name, to its place."""
        place = self.keep(name, lambda: to_device(array, device))
        # Most often it is what the step before had.
        if not np.array_equal(self._copied.setdefault(name, array), array):
            place.copy_(staged(array, device), non_blocking=True)
            self._copied[name] = array
        return place


class HeadNorms(NamedTuple):
    """Weights of the norms of queries and keys, float32 `[head_dim]`, and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


class AttentionBackend(Protocol):
    """Four methods: lay the cache out, write to it, plan a step, attend."""

    @property
    def capturable(self) -> bool:
        """Whether steps of decodes can be captured in a graph: see `plan`."""

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
            slots: Where each token's keys and values go, `[num_tokens]`; nowhere if that is -1,
                which only happens where steps are captured.

        Returns:
            The queries, `[num_tokens, num_heads, head_dim]`.
        """

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> Any:
        """Compute once a step what `run` needs in every layer.

        Args:
            batch: The rows.
            buffers: Given for a batch of decodes whose `run` is captured in a graph, or replayed:
                always the same for one graph. What is returned then refers to tensors of the batch,
                which keep their addresses, and to these buffers, and to nothing else.
        """

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


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy a host array to the device, without waiting for it where the device allows."""
    tensor = staged(array, device)
    if device.type == "cpu":
        return tensor
    return tensor.to(device, non_blocking=device.type == "cuda")


def staged(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor whose copy to the device need not be waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # From pageable memory the copy would wait; pinned memory stays ours until it has been read.
    return tensor.pin_memory() if device.type == "cuda" else tensor
