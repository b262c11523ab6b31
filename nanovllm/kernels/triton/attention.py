"""Attention over the paged cache by our Triton kernels: what is launched, and on what."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    BlockTables,
    HeadNorms,
    IntArray,
    PlanBuffers,
    to_device,
)
from nanovllm.kernels.sdpa import PagedCache
from nanovllm.kernels.triton.decode_kernels import combine_kernel, decode_kernel, shared_kernel
from nanovllm.kernels.triton.kv_write import write_kv
from nanovllm.kernels.triton.prefill_kernel import prefill_kernel

MAX_HEAD_DIM = 256
"""A tile of wider heads does not fit a multiprocessor."""
PROGRAMS_PER_SM = 2
"""Decode programs that share a multiprocessor: one loads while the other computes."""
MANY_WAVES = 4
"""Once decodes alone fill the chip so often, one of many keys can end among the others."""
FEW_POSITIONS = 2048
"""Keys of the longest row up to which decodes that fill the chip are not split at all."""
MAX_SHARED_SPLITS = 8
"""Splits of a shared prefix at most: each row's program unrolls its merge over so many."""
MIN_MEMBERS = 4
"""Rows that share a prefix from which on it is read once; also of captured steps: their launch of
`shared_kernel` is frozen, and costs some 2 us a layer where nothing is shared."""
MIN_SAVED_POSITIONS = 4096
"""Positions that sharing must save: with 8 KV heads of 128, 16 MB or 4 us, twice the launch."""
COMBINED_SPLITS = 32
"""Splits that are merged at a time."""


class Tiling(NamedTuple):
    """Shape of a kernel's tiles, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Splits(NamedTuple):
    """How decodes are split.

    Args:
        spare: Items beside one for each row, among which the keys are divided.
        spans: The first item of each row and how many it has, which the first kernel finds,
            `[num_rows, 2]`.
    """

    spare: int
    spans: Tensor


class SharedPrefix(NamedTuple):
    """Rows that share a prefix.

    Args:
        header: How many they are, and how many positions they share.
        members: These rows, padded, `[num_rows]`.
        begins: Where each row's own positions begin, `[num_rows]`.
        tiling: Of the kernel that attends to the prefix.
        num_splits: Programs that the prefix is divided among.
    """

    header: Tensor
    members: Tensor
    begins: Tensor
    tiling: Tiling
    num_splits: int


class PrefillTiles(NamedTuple):
    """Tiles (slot, first token, its position, queries), `[num_tiles, 4]`, and their shape."""

    tiles: Tensor
    tiling: Tiling


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """The launches of a step.

    Args:
        batch: The step's rows.
        num_decodes: The rows for `decode_kernel`, which come first.
        splits: How their keys are divided; None if each is one program's.
        shared: The prefix that decodes share.
        prefill: The tiles of the other rows.
    """

    batch: AttentionBatch
    num_decodes: int
    splits: Splits | None
    shared: SharedPrefix | None
    prefill: PrefillTiles | None


class TritonAttention(PagedCache):
    """See `AttentionBackend`.

    The keys of decodes are divided evenly among the programs that fill the chip (Flash-Decoding,
    Dao et al. 2023; Stream-K, Osama et al. 2023); a prefix that many of them share is read once, by
    tiles of their heads (Hydragen, Juravsky et al. 2024). What is launched hangs on shapes alone,
    and who takes what is found on the device, so that it may be captured. Under `deterministic` all
    rows take the prefill kernel, in tiles of one shape that walk the keys in one order.

    Args:
        config: The layers.
        num_sms: Multiprocessors to fill; None asks the device, and takes 132 where there is none.
    """

    def __init__(self, config: AttentionConfig, num_sms: int | None = None) -> None:
        super().__init__(config)
        if config.head_dim > MAX_HEAD_DIM:
            raise InvalidRequestError(
                f"attention_backend='triton' takes heads of up to {MAX_HEAD_DIM}, this model's "
                f"have {config.head_dim}: choose 'sdpa'",
                "attention_backend",
            )
        self._num_sms = count_sms() if num_sms is None else num_sms
        self._group = config.num_heads // config.num_kv_heads
        self._block_d = max(16, triton.next_power_of_2(config.head_dim))

    @property
    def capturable(self) -> bool:
        return True

    def write(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        config = self._config
        return write_kv(qkv, norms, rotary, cache, slots, config.num_heads, config.num_kv_heads)

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> TritonPlan:
        num_rows = len(batch.lengths)
        decodes = 0
        if not self._config.deterministic:
            longer = np.flatnonzero(batch.lengths != 1)
            decodes = int(longer[0]) if len(longer) else num_rows
        splits = shared = prefill = None
        if decodes:
            splits = self._plan_splits(batch, decodes, buffers)
            if self._config.cascade:
                shared = self._plan_shared(batch, decodes, buffers)
        if decodes < num_rows:
            prefill = self._plan_prefill(batch, decodes, buffers)
        return TritonPlan(batch, decodes, splits, shared, prefill)

    def run(self, q: Tensor, cache: Tensor, metadata: TritonPlan, window: int | None) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        if metadata.num_decodes:
            self._run_decodes(q, cache, out, metadata, window)
        if metadata.prefill is not None:
            tiles, tiling = metadata.prefill
            prefill_kernel[(len(tiles), self._config.num_kv_heads)](
                q,
                *self._memory(cache, metadata),
                tiles,
                out,
                **self._constants(tiling),
                WINDOW=window or 0,
                UNIFORM=self._config.deterministic,
            )
        return out

    def _run_decodes(
        self, q: Tensor, cache: Tensor, out: Tensor, plan: TritonPlan, window: int | None
    ) -> None:
        config, batch, splits = self._config, plan.batch, plan.splits
        # A window ends what rows share long before it is worth a launch.
        shared = plan.shared if window is None else None
        memory = self._memory(cache, plan)
        from_shared: tuple[Tensor | None, ...] = (None,) * 4
        if shared is not None:
            left = self._scratch(q, plan.num_decodes, config.num_heads, shared.num_splits)
            from_shared = (shared.begins, *left)
            members = shared.tiling.block_m // self._group
            grid = (triton.cdiv(plan.num_decodes, members), config.num_kv_heads, shared.num_splits)
            shared_kernel[grid](
                q,
                *memory,
                batch.device_slots,
                shared.header,
                shared.members,
                *left,
                **self._constants(shared.tiling),
            )
        spare = 0 if splits is None else splits.spare
        to_combine: tuple[Tensor | None, ...] = (None,) * 4
        if splits is not None:
            left = self._scratch(q, plan.num_decodes + spare, config.num_heads)
            to_combine = (*left, splits.spans)
        decode_kernel[(plan.num_decodes + spare, config.num_kv_heads)](
            q,
            *memory,
            batch.device_slots,
            batch.device_ends,
            plan.num_decodes,
            spare,
            out,
            *to_combine,
            *from_shared,
            **self._constants(self._decode_tiling(self._group)),
            WINDOW=window or 0,
            SPLIT=splits is not None,
            SHARED_SPLITS=0 if shared is None else shared.num_splits,
            BLOCK_R=max(128, triton.next_power_of_2(plan.num_decodes)) if splits else 1,
        )
        if splits is not None:
            combine_kernel[(plan.num_decodes, config.num_heads)](
                *to_combine,
                out,
                NUM_HEADS=config.num_heads,
                HEAD_DIM=config.head_dim,
                BLOCK_S=COMBINED_SPLITS,
                BLOCK_D=self._block_d,
                num_warps=4,
                num_stages=2,
            )

    def _scratch(self, q: Tensor, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for sums of values `[*shape, head_dim]`, for highest scores and sums of weights.

        Made anew in each layer: a graph's pool then holds it once, not once for each size.
        """
        sums = q.new_empty(*shape, self._config.head_dim, dtype=torch.float32)
        peaks, totals = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        return sums, peaks, totals

    def _memory(self, cache: Tensor, plan: TritonPlan) -> tuple[Tensor, int, Tensor, int]:
        tables = plan.batch.tables.device
        return cache, cache.stride(0), tables, tables.stride(0)

    def _constants(self, tiling: Tiling) -> dict[str, int | float]:
        config = self._config
        return {
            "NUM_HEADS": config.num_heads,
            "NUM_KV_HEADS": config.num_kv_heads,
            "HEAD_DIM": config.head_dim,
            "BLOCK_SIZE": config.block_size,
            "SCALE": config.head_dim**-0.5 * math.log2(math.e),
            "BLOCK_M": tiling.block_m,
            "BLOCK_N": tiling.block_n,
            "BLOCK_D": self._block_d,
            "num_warps": tiling.num_warps,
            "num_stages": tiling.num_stages,
        }

    def _plan_prefill(
        self, batch: AttentionBatch, first_row: int, buffers: PlanBuffers | None
    ) -> PrefillTiles:
        starts, lengths = batch.starts[first_row:], batch.lengths[first_row:]
        tiling = self._prefill_tiling(int(lengths.sum()))
        queries = tiling.block_m // self._group
        counts = -(-lengths // queries)
        row = np.repeat(np.arange(len(lengths)), counts)
        index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = index * queries
        tokens = first_row + np.cumsum(lengths) - lengths
        tiles = np.stack(
            [
                batch.slots[first_row:][row],
                tokens[row] + first,
                starts[row] + first,
                np.minimum(lengths[row] - first, queries),
            ],
            axis=1,
        )
        # Those with the most keys first: a long one must not start when the others are done.
        tiles = tiles[np.argsort(-tiles[:, 2], kind="stable")].astype(np.int32)
        return PrefillTiles(self._place("tiles", tiles, batch, buffers), tiling)

    def _plan_splits(
        self, batch: AttentionBatch, num_rows: int, buffers: PlanBuffers | None
    ) -> Splits | None:
        tiles = triton.cdiv(self._max_positions(batch), self._decode_tiling(1).block_n)
        fill = triton.cdiv(PROGRAMS_PER_SM * self._num_sms, self._config.num_kv_heads)
        spare = min(fill, num_rows * (tiles - 1))
        few = self._max_positions(batch) <= FEW_POSITIONS
        if spare < 1 or num_rows >= MANY_WAVES * fill or (few and num_rows >= fill):
            return None

        def make() -> Tensor:
            return torch.empty(num_rows, 2, dtype=torch.int32, device=batch.tables.device.device)

        return Splits(spare, make() if buffers is None else buffers.keep("spans", make))

    def _plan_shared(
        self, batch: AttentionBatch, num_rows: int, buffers: PlanBuffers | None
    ) -> SharedPrefix | None:
        if num_rows < MIN_MEMBERS:
            return None
        members, length = find_shared_prefix(
            batch.tables, batch.slots[:num_rows], batch.starts[:num_rows], self._config.block_size
        )
        if not len(members) and buffers is None:
            return None
        # Rows of 16 bytes: kernels are compiled anew for pointers that are aligned otherwise.
        data = np.zeros((3, -(-num_rows // 4) * 4), dtype=np.int32)
        data[0, :2] = len(members), length
        data[1, : len(members)] = members
        data[2, members] = length
        placed = self._place("shared", data, batch, buffers)
        most = 16 if self._config.dtype == torch.float32 else 64
        tiling = self._decode_tiling(max(self._group, min(num_rows * self._group, most)))
        tiles = triton.cdiv(num_rows, tiling.block_m // self._group)
        wanted = PROGRAMS_PER_SM * self._num_sms // (tiles * self._config.num_kv_heads)
        # Each number of splits is compiled for itself.
        splits = 1 << (max(1, min(wanted, MAX_SHARED_SPLITS)).bit_length() - 1)
        return SharedPrefix(placed[0], placed[1], placed[2], tiling, splits)

    def _place(
        self, name: str, array: npt.NDArray[Any], batch: AttentionBatch, buffers: PlanBuffers | None
    ) -> Tensor:
        device = batch.tables.device.device
        return to_device(array, device) if buffers is None else buffers.put(name, array, device)

    def _max_positions(self, batch: AttentionBatch) -> int:
        return int(batch.tables.host.shape[1]) * self._config.block_size

    def _decode_tiling(self, heads: int) -> Tiling:
        block_m = max(16, triton.next_power_of_2(heads))
        if self._config.dtype == torch.float32:
            return Tiling(block_m, self._exact_block(), 4, 2)
        block_n = 64 if self._block_d <= 128 else 32
        # A load that waits for a block's id takes two stages; so 5 are two tiles on their way.
        return Tiling(block_m, block_n, 4 if block_m < 128 else 8, 5 if block_m < 64 else 3)

    def _prefill_tiling(self, num_tokens: int) -> Tiling:
        config = self._config
        heads = triton.next_power_of_2(self._group)
        if config.dtype == torch.float32:
            block = self._exact_block()
            return Tiling(max(block, heads), block, 4, 2)
        if self._block_d > 128:
            return Tiling(max(64, heads), 32, 8, 2)
        # Large tiles read less, if they are enough to fill the chip.
        if num_tokens * config.num_heads < 128 * self._num_sms or config.deterministic:
            return Tiling(max(64, heads), 64, 4, 3)
        return Tiling(max(128, heads), 64, 8, 3)

    def _exact_block(self) -> int:
        """Exact products are left to the ordinary cores, and all they multiply to registers."""
        return 32 if self._block_d <= 64 else 16


def find_shared_prefix(
    tables: BlockTables, slots: IntArray, starts: IntArray, block_size: int
) -> tuple[IntArray, int]:
    """Find the decodes whose shared leading blocks save the most.

    Args:
        tables: Blocks of the sequences.
        slots: Which of the tables is each row's, `[num_rows]`.
        starts: Position of each row's query, which is never shared, `[num_rows]`.
        block_size: Positions in a block.

    Returns:
        The rows, ascending, and how many positions they share: none where that saves too little.
    """
    nothing = np.empty(0, dtype=np.int64), 0
    # Of those that agree in the first block, most rows.
    able = np.flatnonzero(starts >= block_size)
    _, group, counts = np.unique(
        tables.host[slots[able], 0], return_inverse=True, return_counts=True
    )
    if counts.max(initial=0) < MIN_MEMBERS:
        return nothing
    rows = able[group == counts.argmax()]
    if len(rows) * int(starts[rows].max()) < MIN_SAVED_POSITIONS:
        return nothing
    # How many blocks each has in common with the longest of them.
    full = starts[rows] // block_size
    longest = int(full.argmax())
    blocks = tables.host[slots[rows], : int(full[longest])]
    differs = blocks != blocks[longest]
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), differs.shape[1])
    common = np.minimum(common, full)
    # The k rows that share most share what the k-th of them does.
    best_first = np.argsort(-common, kind="stable")
    saved = common[best_first] * np.arange(len(rows)) * block_size
    saved[: MIN_MEMBERS - 1] = 0
    count = int(saved.argmax()) + 1
    if saved[count - 1] < MIN_SAVED_POSITIONS:
        return nothing
    return np.sort(rows[best_first[:count]]), int(common[best_first[count - 1]]) * block_size


def count_sms() -> int:
    """Multiprocessors of the current GPU; those of an H100 or H200 where there is none."""
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
