"""The transformers within a patch: LocEnc reads one, LocDiT denoises one.

Both are bidirectional, over the few positions of a patch and what conditions it, and have no cache:
no patch sees another one here.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.attention import LocalAttention
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.linear import Linear
from nanovllm.layers.rotary import Rotary, RotaryEmbedding
from nanovllm.models.decoder import Layers
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.voxcpm.config import VoxCPMConfig

TIME_SCALE = 1000.0


class LocalLayers(Layers):
    """Layers over sequences of one length.

    Args:
        config: Hyper-parameters.
        length: Positions of a sequence.
        kept: The positions whose hidden states are wanted.
    """

    def __init__(self, config: ModelConfig, length: int, kept: slice) -> None:
        heads = config.num_heads, config.num_kv_heads
        super().__init__(config, (LocalAttention(length, *heads) for _ in range(config.num_layers)))
        self._length, self._kept = length, kept
        self._rotary = None if config.no_rope else RotaryEmbedding(config.rope)
        self._tables: tuple[Rotary, ...] = ()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Compute hidden states.

        Args:
            x: Embeddings `[num_seqs, length, hidden_size]`.
            ctx: The step, its adapters by position of the sequences.

        Returns:
            `[num_seqs * num_kept, hidden_size]`.
        """
        if self._rotary and (not self._tables or self._tables[0][0].device != x.device):
            self._tables = (self._rotary(torch.arange(self._length, device=x.device)),)
        return self.run(x.flatten(0, 1), self._tables, ctx, self._keep)

    def _keep(self, x: Tensor) -> Tensor:
        kept = x.view(-1, self._length, *x.shape[1:])[:, self._kept]
        return kept.flatten(0, 1).contiguous()


class LocEnc(nn.Module):
    """Makes one vector of a patch: the hidden state of a learned token before its frames."""

    def __init__(self, config: VoxCPMConfig) -> None:
        super().__init__()
        width = config.encoder.hidden_size
        self.special_token = nn.Parameter(torch.empty(1, 1, 1, width), requires_grad=False)
        self.in_proj = Linear(config.feat_dim, width, bias=True, exact=True)
        self.encoder = LocalLayers(config.encoder, config.patch_size + 1, slice(0, 1))

    def forward(self, patches: Tensor, ctx: ForwardContext) -> Tensor:
        """Map patches `[num_patches, P, D]` to `[num_patches, hidden_size]`."""
        num_patches, patch_size, _ = patches.shape
        ctx = replace(ctx, lora=None)  # no adapter sits here, and its rows would be others
        frames = self.in_proj(patches.flatten(0, 1), ctx).view(num_patches, patch_size, -1)
        token = self.special_token[0].expand(num_patches, 1, -1)
        return self.encoder(torch.cat((token, frames), dim=1), ctx)  # type: ignore[no-any-return]


class TimeMLP(nn.Module):
    """Two linear layers on the embedding of a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, width, bias=True, exact=True)
        self.linear_2 = Linear(width, width, bias=True, exact=True)

    def forward(self, embeddings: Tensor, ctx: ForwardContext) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embeddings, ctx)), ctx)  # type: ignore[no-any-return]


class LocDiT(nn.Module):
    """Predicts the velocity of a noisy patch (Peebles & Xie 2023, but conditioned by tokens).

    Its sequence is the condition from the language models, the time, the previous patch and the
    noisy one. VoxCPM 1 adds the time to the one token of the condition; VoxCPM 2 has two tokens
    for the condition and a third for the time.

    Attributes:
        length: Positions of the sequence.
    """

    def __init__(self, config: VoxCPMConfig) -> None:
        super().__init__()
        width = config.dit.hidden_size
        self.in_proj = Linear(config.feat_dim, width, bias=True, exact=True)
        self.cond_proj = Linear(config.feat_dim, width, bias=True, exact=True)
        self.out_proj = Linear(width, config.feat_dim, bias=True, exact=True)
        self.time_mlp = TimeMLP(width)
        self.delta_time_mlp = TimeMLP(width)
        self._patch_size = config.patch_size
        self._time_index = 2 if config.is_v2 else 0
        self.length = self._time_index + 1 + 2 * config.patch_size
        self.decoder = LocalLayers(config.dit, self.length, slice(-config.patch_size, None))

    def embed_times(self, times: Tensor, deltas: Tensor, ctx: ForwardContext) -> Tensor:
        """Embed times and the lengths of the steps from them, each `[n]` in the model's dtype.

        Returns:
            `[n, hidden_size]`.
        """
        width = self.time_mlp.linear_1.spec.depth
        embedded: Tensor = self.time_mlp(sinusoids(times, width), ctx)
        embedded += self.delta_time_mlp(sinusoids(deltas, width), ctx)
        return embedded

    def condition(self, mu: Tensor, cond: Tensor, ctx: ForwardContext) -> Tensor:
        """Lay out what stays the same from one evaluation to the next.

        Args:
            mu: From the language models, `[num_rows, 1 or 2, hidden_size]`.
            cond: The previous patches `[num_rows, P, D]`.
            ctx: The step.

        Returns:
            `[num_rows, length - P, hidden_size]`, for `forward`.
        """
        previous = self.cond_proj(cond.flatten(0, 1), ctx).view(len(mu), self._patch_size, -1)
        time = mu.new_zeros(len(mu), self._time_index + 1 - mu.shape[1], mu.shape[2])
        return torch.cat((mu, time, previous), dim=1)

    def forward(
        self, x: Tensor, prefix: Tensor, time: Tensor, copies: Tensor | None, ctx: ForwardContext
    ) -> Tensor:
        """Predict velocities.

        Args:
            x: Noisy patches `[num_patches, P, D]`.
            prefix: What `condition` returned.
            time: A row of what `embed_times` returned, `[hidden_size]`.
            copies: The patch of each row, `[num_rows]`; None where each has one row.
            ctx: The step, its adapters by position of the sequences.

        Returns:
            `[num_rows, P, D]`.
        """
        frames = self.in_proj(x.flatten(0, 1), ctx).view(*x.shape[:2], -1)
        if copies is not None:
            frames = frames[copies]
        sequence = torch.cat((prefix, frames), dim=1)
        sequence[:, self._time_index] += time
        velocity: Tensor = self.out_proj(self.decoder(sequence, ctx), ctx)
        return velocity.view(len(prefix), *x.shape[1:])


def sinusoids(times: Tensor, width: int) -> Tensor:
    """Sines, then cosines of times `[n]`: `[n, width]`.

    All of it in the dtype of the times, as in training: in bfloat16 the fast ones are mere noise,
    but always the same.
    """
    half = width // 2
    steps = torch.arange(half, dtype=times.dtype, device=times.device)
    frequencies = torch.exp(steps * -(math.log(10000) / (half - 1)))
    angles = TIME_SCALE * times[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
