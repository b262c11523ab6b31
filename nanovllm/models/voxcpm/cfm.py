"""The sampler: from noise to a patch along the flow that LocDiT has learned.

Conditional flow matching (Lipman et al. 2023) with Euler steps, guided as CFG-Zero* has it
(Fan et al. 2025): the unconditional velocity is scaled to fit, and the first step is skipped.
"""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nanovllm.kernels.attention_backend import to_device
from nanovllm.kernels.compiled import compile_rows
from nanovllm.layers.context import ForwardContext
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.local import LocDiT

SWAY = 1.0
"""Sway sampling (Chen et al. 2024, F5-TTS, section 3.3): how much denser the grid is near noise."""

SKIPPED = 0.04
"""Share of the steps that CFG-Zero* skips; the first one always."""


class Grid(NamedTuple):
    """The steps that LocDiT is evaluated at: when, `[num_evaluations]`, and how far they go.

    Both are values of the model's dtype.
    """

    times: Tensor
    deltas: list[float]


class Guidance(NamedTuple):
    """Which patches of a batch are guided, and so have a row without a condition, too.

    Args:
        copies: The patch of each row, int64 `[num_patches + num_guided]`; None if none is guided.
        guided: The patches that are, int64 `[num_guided]`; None if all are.
        scale: How much each, float32 `[num_guided, 1, 1]`.
    """

    copies: Tensor | None
    guided: Tensor | None
    scale: Tensor

    @classmethod
    def of(cls, cfg_value: npt.NDArray[np.float32], device: torch.device) -> "Guidance":
        """Guide patches by values on the host `[num_patches]`: one of 1.0 costs half as much."""
        num_patches, is_guided = len(cfg_value), cfg_value != 1.0
        scale = to_device(cfg_value, device)[:, None, None]
        if is_guided.all():
            return cls.of_all(scale)
        (rows,) = is_guided.nonzero()
        guided = to_device(rows, device)
        if not len(rows):
            return cls(None, guided, scale[:0])
        copies = to_device(np.concatenate((np.arange(num_patches), rows)), device)
        return cls(copies, guided, scale[guided])

    @classmethod
    def of_all(cls, scale: Tensor) -> "Guidance":
        """Guide all patches, by values at which nobody looks; `[num_patches, 1, 1]`."""
        return cls(torch.arange(len(scale), device=scale.device).repeat(2), None, scale)


@functools.lru_cache(maxsize=128)
def time_grid(num_timesteps: int, dtype: torch.dtype) -> Grid:
    """The times of the steps, from 1 (noise) to 0, but for those that are skipped.

    They are accumulated in the model's dtype, as in training.
    """
    grid = torch.linspace(1, 0, num_timesteps + 1, dtype=dtype, device="cpu")
    grid = grid + SWAY * (torch.cos(torch.pi / 2 * grid) - 1 + grid)
    num_skipped = max(1, int((num_timesteps + 1) * SKIPPED))
    times: list[Tensor] = []
    deltas: list[float] = []
    time, delta = grid[0], grid[0] - grid[1]
    for step in range(1, num_timesteps + 1):
        if step > num_skipped:
            times.append(time)
            deltas.append(float(delta))
        time = time - delta
        if step < num_timesteps:
            delta = time - grid[step + 1]
    return Grid(torch.stack(times) if times else grid[:0], deltas)


class CFM(nn.Module):
    """Makes patches of noise; `estimator` is its name in the checkpoints."""

    def __init__(self, config: VoxCPMConfig) -> None:
        super().__init__()
        self.estimator = LocDiT(config)
        self._mean_mode = config.mean_mode
        # What a step knows of its time depends on nothing else: two MLPs less an evaluation.
        self._embedded_times: dict[int, Tensor] = {}
        self._combine = combine

    def compile_guidance(self) -> None:
        """Have `torch.compile` fuse `combine`, when it runs first."""
        self._combine = compile_rows(combine)

    def forward(
        self,
        noise: Tensor,
        mu: Tensor,
        cond: Tensor,
        guidance: Guidance,
        num_timesteps: int,
        ctx: ForwardContext,
    ) -> Tensor:
        """Sample patches.

        Args:
            noise: `[num_patches, P, D]`.
            mu: From the language models, `[num_patches, 1 or 2, hidden_size]`.
            cond: The previous patches, `[num_patches, P, D]`.
            guidance: Which of them are guided, and how much.
            num_timesteps: Steps, of which at least one is skipped.
            ctx: The step, its adapters by patch.

        Returns:
            float32 `[num_patches, P, D]`.
        """
        if guidance.copies is not None:
            unconditional = mu.new_zeros(len(guidance.scale), *mu.shape[1:])
            mu = torch.cat((mu, unconditional))
            cond = cond[guidance.copies]
        prefix = self.estimator.condition(mu, cond, ctx)
        everywhere = guidance.copies
        if everywhere is None:
            everywhere = torch.arange(len(noise), device=noise.device)
        by_position = ctx.of_rows(everywhere, self.estimator.length)
        deltas = time_grid(num_timesteps, mu.dtype).deltas
        times = self.embedded_times(num_timesteps, mu, ctx)
        x = noise.float().contiguous()  # rounding what is left to go at every step would add up
        for time, delta in zip(times, deltas, strict=True):
            v = self.estimator(x.to(mu.dtype), prefix, time, guidance.copies, by_position).float()
            x = x - delta * self._guided_velocity(v, guidance)
        return x

    def _guided_velocity(self, velocity: Tensor, guidance: Guidance) -> Tensor:
        """Combine velocities `[num_patches + num_guided, P, D]`, the conditional ones first."""
        num_patches = len(velocity) - len(guidance.scale)
        conditional, unconditional = velocity[:num_patches], velocity[num_patches:]
        if guidance.copies is None:
            return conditional
        if guidance.guided is None:
            return self._combine(conditional, unconditional, guidance.scale)
        positive = conditional[guidance.guided]
        combined = self._combine(positive, unconditional, guidance.scale)
        return conditional.index_copy(0, guidance.guided, combined)

    def embedded_times(self, num_timesteps: int, like: Tensor, ctx: ForwardContext) -> Tensor:
        """Embeddings of the grid's times, `[num_evaluations, hidden_size]`, made once."""
        embedded = self._embedded_times.get(num_timesteps)
        if embedded is None:
            grid = time_grid(num_timesteps, like.dtype)
            times = grid.times.to(like.device)
            deltas = torch.zeros_like(times)
            if self._mean_mode:
                deltas = torch.tensor(grid.deltas, dtype=like.dtype, device=like.device)
            embedded = self.estimator.embed_times(times, deltas, ctx)
            self._embedded_times[num_timesteps] = embedded
        return embedded


def combine(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Guide velocities (CFG-Zero*, section 4).

    Args:
        conditional: float32 `[num_guided, P, D]`.
        unconditional: The same without a condition.
        scale: How much, float32 `[num_guided, 1, 1]`.

    Returns:
        `[num_guided, P, D]`.
    """
    # The share of the conditional velocity that lies along the unconditional one, by patch.
    product = (conditional * unconditional).sum(dim=(1, 2), keepdim=True)
    norm = unconditional.square().sum(dim=(1, 2), keepdim=True)
    baseline = product / (norm + 1e-8) * unconditional
    return baseline + scale * (conditional - baseline)
