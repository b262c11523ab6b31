"""The sampler: from noise to a patch along the flow that LocDiT has learned.

Conditional flow matching (Lipman et al. 2023) with Euler steps, guided as CFG-Zero* has it
(Fan et al. 2025): the unconditional velocity is scaled to fit, and the first step is skipped.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.layers.context import ForwardContext
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.local import LocDiT

SWAY = 1.0
"""Sway sampling (Chen et al. 2024, F5-TTS, section 3.3): how much denser the grid is near noise."""

SKIPPED = 0.04
"""Share of the steps that CFG-Zero* skips; the first one always."""


class Grid(NamedTuple):
    """The steps that LocDiT is evaluated at, each `[num_evaluations]` in the model's dtype."""

    times: Tensor
    deltas: Tensor


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


@functools.lru_cache(maxsize=128)
def time_grid(num_timesteps: int, dtype: torch.dtype) -> Grid:
    """The times of the steps, from 1 (noise) to 0, but for those that are skipped.

    They are accumulated in the model's dtype, as in training.
    """
    grid = torch.linspace(1, 0, num_timesteps + 1, dtype=dtype, device="cpu")
    grid = grid + SWAY * (torch.cos(torch.pi / 2 * grid) - 1 + grid)
    num_skipped = max(1, int((num_timesteps + 1) * SKIPPED))
    times, deltas = [], []
    time, delta = grid[0], grid[0] - grid[1]
    for step in range(1, num_timesteps + 1):
        if step > num_skipped:
            times.append(time)
            deltas.append(delta)
        time = time - delta
        if step < num_timesteps:
            delta = time - grid[step + 1]
    return Grid(torch.stack(times), torch.stack(deltas)) if times else Grid(grid[:0], grid[:0])


class CFM(nn.Module):
    """Makes patches of noise; `estimator` is its name in the checkpoints."""

    def __init__(self, config: VoxCPMConfig) -> None:
        super().__init__()
        self.estimator = LocDiT(config)
        self._mean_mode = config.mean_mode
        # What a step knows of its time depends on nothing else: two MLPs less an evaluation.
        self._embedded_times: dict[int, Tensor] = {}

    def forward(
        self,
        noise: Tensor,
        mu: Tensor,
        cond: Tensor,
        cfg_value: Tensor,
        num_timesteps: int,
        ctx: ForwardContext,
    ) -> Tensor:
        """Sample patches.

        Args:
            noise: `[num_patches, P, D]`.
            mu: From the language models, `[num_patches, 1 or 2, hidden_size]`.
            cond: The previous patches, `[num_patches, P, D]`.
            cfg_value: Guidance of each, float32 `[num_patches]`; if it lies on the host, those with
                exactly 1.0 cost half as much.
            num_timesteps: Steps, of which at least one is skipped.
            ctx: The step, its adapters by patch.

        Returns:
            float32 `[num_patches, P, D]`.
        """
        guidance = guide(cfg_value, noise.device)
        if guidance.copies is not None:
            unconditional = mu.new_zeros(len(guidance.scale), *mu.shape[1:])
            mu = torch.cat((mu, unconditional))
            cond = cond[guidance.copies]
        prefix = self.estimator.condition(mu, cond, ctx)
        everywhere = torch.arange(len(noise)) if guidance.copies is None else guidance.copies
        by_position = ctx.of_rows(everywhere, self.estimator.length)
        deltas = time_grid(num_timesteps, mu.dtype).deltas.tolist()
        times = self.embedded_times(num_timesteps, mu, ctx)
        x = noise.float().contiguous()  # rounding what is left to go at every step would add up
        for time, delta in zip(times, deltas, strict=True):
            v = self.estimator(x.to(mu.dtype), prefix, time, guidance.copies, by_position).float()
            x = x - delta * guided_velocity(v, len(x), guidance)
        return x

    def embedded_times(self, num_timesteps: int, like: Tensor, ctx: ForwardContext) -> Tensor:
        """Embeddings of the grid's times, `[num_evaluations, hidden_size]`, made once."""
        embedded = self._embedded_times.get(num_timesteps)
        if embedded is None:
            grid = time_grid(num_timesteps, like.dtype)
            times = grid.times.to(like.device)
            deltas = grid.deltas.to(like.device) if self._mean_mode else torch.zeros_like(times)
            embedded = self.estimator.embed_times(times, deltas, ctx)
            self._embedded_times[num_timesteps] = embedded
        return embedded


def guide(cfg_value: Tensor, device: torch.device) -> Guidance:
    """Decide which rows to evaluate; see `CFM.forward`."""
    num_patches = len(cfg_value)
    scale = cfg_value.to(device, torch.float32)[:, None, None]
    # To look at a value on the device would be to wait for it.
    if cfg_value.device.type != "cpu" or bool((cfg_value != 1.0).all()):
        copies = torch.arange(num_patches, device=device).repeat(2)
        return Guidance(copies, None, scale)
    guided = (cfg_value != 1.0).nonzero()[:, 0]
    if not len(guided):
        return Guidance(None, guided, scale[:0])
    copies = torch.cat((torch.arange(num_patches), guided)).to(device)
    guided = guided.to(device)
    return Guidance(copies, guided, scale[guided])


def guided_velocity(velocity: Tensor, num_patches: int, guidance: Guidance) -> Tensor:
    """Combine conditional and unconditional velocities (CFG-Zero*, section 4).

    Args:
        velocity: float32 `[num_patches + num_guided, P, D]`, the conditional ones first.
        num_patches: Patches.
        guidance: See `guide`.

    Returns:
        `[num_patches, P, D]`.
    """
    conditional, unconditional = velocity[:num_patches], velocity[num_patches:]
    if guidance.copies is None:
        return conditional
    positive = conditional if guidance.guided is None else conditional[guidance.guided]
    # The share of the conditional velocity that lies along the unconditional one, by patch.
    product = (positive * unconditional).sum(dim=(1, 2), keepdim=True)
    norm = unconditional.square().sum(dim=(1, 2), keepdim=True)
    baseline = product / (norm + 1e-8) * unconditional
    combined = baseline + guidance.scale * (positive - baseline)
    if guidance.guided is None:
        return combined
    return conditional.index_copy(0, guidance.guided, combined)
