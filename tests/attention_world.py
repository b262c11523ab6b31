"""Rows over a paged cache, for backends that have its layout in common with torch's attention."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import (
    AttentionBackend,
    AttentionBatch,
    AttentionConfig,
    BlockTables,
    PlanBuffers,
)
from nanovllm.kernels.flash import FlashAttention
from nanovllm.kernels.flashinfer import FlashInferAttention
from nanovllm.kernels.sdpa import SdpaBackend

CPU = torch.device("cpu")
BACKENDS = ("flash-attn 2", "flash-attn 3", "flashinfer")
PADDING = (-1, 1)
HEADS = ((1, 1), (4, 4), (4, 2), (7, 1))
# (start, length) of each row: a decode, a chunk of a prefill, or a whole prompt.
DECODES = [(0, 1), (15, 1), (16, 1), (40, 1)]
MIXTURE = [*DECODES, (0, 5), (30, 17), (0, 33), (12, 1)]


def config_for(name: str, heads: tuple[int, int] = (4, 2), block_size: int = 16) -> AttentionConfig:
    block_size = 256 if name == "flash-attn 2" else block_size
    return AttentionConfig(block_size, *heads, 64, torch.float16)


def make(name: str, config: AttentionConfig, device: torch.device = CPU) -> AttentionBackend:
    """A backend by one of the names in `BACKENDS`."""
    if name == "flashinfer":
        return FlashInferAttention(config, device)
    return FlashAttention(config, int(name[-1]))


@dataclass
class World:
    """A cache of random numbers, and tables of distinct blocks for some slots and a spare one."""

    config: AttentionConfig
    device: torch.device = CPU
    num_slots: int = 9

    def __post_init__(self) -> None:
        self.max_blocks = -(-96 // self.config.block_size)
        spec = SdpaBackend(self.config).cache_spec(self.num_slots * self.max_blocks)
        generator = torch.Generator().manual_seed(0)
        self.cache = torch.randn(spec.shape, generator=generator).to(self.device, spec.dtype)
        self.tables = BlockTables.zeros(self.num_slots + 1, self.max_blocks, self.device)
        blocks = np.random.default_rng(0).permutation(self.num_slots * self.max_blocks)
        rows = blocks.reshape(self.num_slots, self.max_blocks)
        self.tables.append([(slot, 0, row.tolist()) for slot, row in enumerate(rows)])

    def batch(self, rows: list[tuple[int, int]]) -> AttentionBatch:
        starts, lengths = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        slots = np.where(starts < 0, self.num_slots, self.num_slots - 1 - np.arange(len(rows)))
        return AttentionBatch.of(starts, lengths, slots, self.tables)

    def queries(self, batch: AttentionBatch) -> Tensor:
        shape = int(batch.lengths.sum()), self.config.num_heads, self.config.head_dim
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator).to(self.device, self.config.dtype)

    def check(
        self, backend: AttentionBackend, rows: list[tuple[int, int]], window: int | None
    ) -> None:
        batch = self.batch(rows)
        q, sdpa = self.queries(batch), SdpaBackend(self.config)
        out = backend.run(q, self.cache, backend.plan(batch), window)
        expected = sdpa.run(q, self.cache, sdpa.plan(batch), window)
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)

    def check_captured(self, backend: AttentionBackend, windows: tuple[int | None, ...]) -> None:
        """Run what was planned for a captured step after each of some plans for its replays."""
        size, buffers = 6, PlanBuffers()
        blank = self.batch([PADDING] * size)
        q, captured = self.queries(blank), backend.plan(blank, buffers)
        for window in windows:
            backend.run(q, self.cache, captured, window)
        sdpa = SdpaBackend(self.config)
        for rows in (DECODES, [(50, 1)], DECODES[::-1]):
            num_rows = len(rows)
            backend.plan(self.batch([*rows, *[PADDING] * (size - num_rows)]), buffers)
            plan = sdpa.plan(self.batch(rows))
            for window in windows:
                out = backend.run(q, self.cache, captured, window)
                expected = sdpa.run(q[:num_rows], self.cache, plan, window)
                torch.testing.assert_close(out[:num_rows], expected, rtol=2e-3, atol=2e-3)
                assert out.isfinite().all()
                if not isinstance(backend, FlashInferAttention):  # there it sees one position
                    assert not out[num_rows:].any()
