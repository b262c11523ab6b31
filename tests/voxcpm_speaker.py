"""A VoxCPM with a KV cache, and no engine around it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.kernels.attention_backend import AttentionBatch, AttentionConfig, BlockTables
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.layers.context import ForwardContext
from nanovllm.models.voxcpm.cfm import Guidance
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.loading import load_speech_model

CPU = torch.device("cpu")
AUDIO_START, REFERENCE_START, REFERENCE_END = 101, 103, 104

Position = int | Tensor
"""A token, or a patch `[P, D]`."""


class Speaker:
    """A model and the KV cache of a few sequences, without an engine around them."""

    block_size, num_blocks = 16, 8
    """Of each sequence."""

    def __init__(
        self,
        directory: Path,
        kernels: Kernels | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.kernels = kernels or TorchKernels(CPU, dtype)
        config = EngineConfig(model=str(directory), **options).resolved_for("cpu")
        shape = VoxCPMConfig.from_directory(directory)
        self.model = load_speech_model(config, shape, directory, self.kernels, dtype, CPU)
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.backend = self.kernels.attention(AttentionConfig(self.block_size, *heads, dtype))
        spec = self.backend.cache_spec(4 * self.num_blocks)
        self.caches = [torch.zeros(spec.shape, dtype=spec.dtype) for _ in range(shape.num_layers)]

    @torch.inference_mode()
    def run(self, rows: Sequence[tuple[int, int, Sequence[Position]]]) -> tuple[Tensor, Tensor]:
        """Compute rows of (sequence, first position, inputs), those of one position first.

        Returns:
            The last hidden states of each row, of the base and of the residual model.
        """
        inputs = list(itertools.chain.from_iterable(row for _, _, row in rows))
        starts, lengths = [start for _, start, _ in rows], [len(row) for _, _, row in rows]
        tables = BlockTables.zeros(len(rows), self.num_blocks, torch.device("cpu"))
        tables.append(
            [
                (row, 0, range(seq * self.num_blocks, (seq + 1) * self.num_blocks))
                for row, (seq, _, _) in enumerate(rows)
            ]
        )
        batch = AttentionBatch.of(np.array(starts), np.array(lengths), np.arange(len(rows)), tables)
        positions = torch.cat(
            [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        )
        first = torch.tensor([seq for seq, _, row in rows for _ in row]) * self.num_blocks
        ctx = self.context(
            first * self.block_size + positions,
            self.backend.plan(batch),
        )
        shape = self.model.config
        patches = [x for x in inputs if isinstance(x, Tensor)]
        hidden = self.model(
            torch.tensor([0 if isinstance(x, Tensor) else x for x in inputs]),
            torch.tensor([isinstance(x, Tensor) for x in inputs]),
            torch.stack(patches) if patches else torch.empty(0, shape.patch_size, shape.feat_dim),
            positions,
            ctx,
        )
        last = torch.tensor(lengths).cumsum(0) - 1
        return hidden[0][last], hidden[1][last]

    def context(self, slots: Tensor | None = None, plan: Any = None) -> ForwardContext:
        slots = torch.empty(0, dtype=torch.int64) if slots is None else slots
        return ForwardContext(self.kernels, self.backend, self.caches, slots, plan)

    @torch.inference_mode()
    def sample(
        self,
        hidden: tuple[Tensor, Tensor],
        cond: Tensor,
        noise: Tensor,
        cfg: Sequence[float] = (2.0,),
        timesteps: int = 10,
    ) -> Tensor:
        guidance = Guidance.of(np.array(cfg, np.float32), cond.device)
        return self.model.sample(*hidden, cond, noise, guidance, timesteps, self.context())

    def stop_logits(self, hidden: tuple[Tensor, Tensor]) -> Tensor:
        with torch.inference_mode():
            return self.model.stop_logits(hidden[0], self.context())


def first_patch(speaker: Speaker) -> Tensor:
    shape = speaker.model.config
    generator = torch.Generator().manual_seed(7)
    patches = torch.randn(3, shape.patch_size, shape.feat_dim, generator=generator)
    hidden = speaker.run([(0, 0, [40, 50, 60, AUDIO_START])])
    return speaker.sample(hidden, patches[:1] * 0, patches[1:2])


def assert_close(actual: Tensor, expected: Tensor, what: object, bound: float = 2e-5) -> None:
    assert actual.shape == expected.shape, what
    error = (actual - expected).norm() / expected.norm()
    assert error < bound, f"{what}: off by {error:.1e}"


def edit_config(directory: Path, changes: dict[str, Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
