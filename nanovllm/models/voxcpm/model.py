"""VoxCPM (Zhou et al. 2025): from text and patches of speech to the next patch.

A position is a token or a patch. The base model's hidden states, rounded at patches to a grid, say
what is spoken; the residual model adds how; and LocDiT makes a patch of both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.context import ForwardContext
from nanovllm.layers.linear import Linear
from nanovllm.models.decoder import CausalLayers, Decoder
from nanovllm.models.voxcpm.cfm import CFM, Guidance
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.local import LocEnc
from nanovllm.models.voxcpm.vae import AudioVAE


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023): a bottleneck of rounded values."""

    def __init__(self, hidden_size: int, dim: int, scale: int) -> None:
        super().__init__()
        self.in_proj = Linear(hidden_size, dim, bias=True, exact=True)
        self.out_proj = Linear(dim, hidden_size, bias=True, exact=True)
        self._scale = scale

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Quantize `[num_tokens, hidden_size]`."""
        rounded = torch.round(torch.tanh(self.in_proj(x, ctx)) * self._scale) / self._scale
        return self.out_proj(rounded, ctx)  # type: ignore[no-any-return]


class VoxCPM(nn.Module):
    """The networks of a checkpoint; modules are named as there.

    Attributes:
        config: Hyper-parameters.
        vae: The autoencoder, which comes from a file of its own.
    """

    vae: AudioVAE

    def __init__(self, config: VoxCPMConfig) -> None:
        super().__init__()
        self.config = config
        width, dit_width = config.base.hidden_size, config.dit.hidden_size
        self.base_lm = Decoder(config.base)
        self.residual_lm = CausalLayers(config.residual, first_cache=config.base.num_layers)
        self.feat_encoder = LocEnc(config)
        self.feat_decoder = CFM(config)
        self.fsq_layer = FSQ(width, config.fsq_dim, config.fsq_scale)
        self.enc_to_lm_proj = Linear(config.encoder.hidden_size, width, bias=True, exact=True)
        self.lm_to_dit_proj = Linear(width, dit_width, bias=True, exact=True)
        self.res_to_dit_proj = Linear(width, dit_width, bias=True, exact=True)
        self.fusion_concat_proj = (
            Linear(2 * width, width, bias=True, exact=True) if config.is_v2 else None
        )
        self.stop_proj = Linear(width, width, bias=True, exact=True)
        self.stop_head = Linear(width, 2, exact=True)

    def forward(
        self,
        token_ids: Tensor,
        is_audio: Tensor,
        patches: Tensor,
        positions: Tensor,
        ctx: ForwardContext,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute hidden states.

        Args:
            token_ids: `[num_tokens]`; any id at patches.
            is_audio: True at patches, `[num_tokens]`.
            patches: The patches in the order of their positions, `[num_patches, P, D]`.
            positions: `[num_tokens]`.
            ctx: The step.
            wanted: Which tokens' hidden states are, `[num_wanted]`; None is all.

        Returns:
            Hidden states of the base model, quantized at patches, and of the residual model, each
            `[num_wanted, hidden_size]`.
        """
        speech = self._embed_patches(patches, is_audio, ctx)
        if speech is None:
            lm = self.base_lm(self.base_lm.embed(token_ids, ctx), positions, ctx)
            speech = torch.zeros_like(lm)
        else:
            here = is_audio[:, None]
            if len(patches) == len(token_ids):
                embeddings = speech.clone()
            else:
                embeddings = torch.where(here, speech, self.base_lm.embed(token_ids, ctx))
            hidden = self.base_lm(embeddings, positions, ctx)
            # Tokens are quantized for nothing: cheaper than to wait for where the patches are.
            lm = torch.where(here, self.fsq_layer(hidden, ctx), hidden)
        residual = self.residual_lm(self._fuse(lm, speech, ctx), positions, ctx, wanted)
        return lm if wanted is None else lm[wanted], residual

    def _embed_patches(
        self, patches: Tensor, is_audio: Tensor, ctx: ForwardContext
    ) -> Tensor | None:
        """Embeddings of the patches where they stand, zero at tokens; None without patches."""
        if not len(patches):
            return None
        encoded = self.feat_encoder(patches.to(self.dtype).contiguous(), ctx)
        if len(patches) == len(is_audio):
            return self.enc_to_lm_proj(encoded, ctx)  # type: ignore[no-any-return]
        if ctx.lora is None:
            embeddings = self.enc_to_lm_proj(encoded, ctx)
        else:
            # Of a size known here: to count the patches would be to wait for the device.
            rows = torch.nonzero_static(is_audio, size=len(patches))[:, 0]
            embeddings = self.enc_to_lm_proj(encoded, ctx.of_rows(rows))
        index = (is_audio.cumsum(0) - 1).clamp(min=0)
        # Not a product: a patch that is NaN must not become that of every token.
        return torch.where(is_audio[:, None], embeddings[index], 0)

    def _fuse(self, lm: Tensor, speech: Tensor, ctx: ForwardContext) -> Tensor:
        """What the residual model reads."""
        if self.fusion_concat_proj is None:
            return lm + speech
        fused: Tensor = self.fusion_concat_proj(torch.cat((lm, speech), dim=1), ctx)
        return fused

    def sample(
        self,
        lm: Tensor,
        residual: Tensor,
        cond: Tensor,
        noise: Tensor,
        guidance: Guidance,
        num_timesteps: int,
        ctx: ForwardContext,
    ) -> Tensor:
        """Generate a patch in each row.

        Args:
            lm: Hidden states of the base model as `forward` returns them, `[num_rows, width]`.
            residual: The same of the residual model.
            cond: The previous patches, zeros behind a token, `[num_rows, P, D]`.
            noise: Normal values times the temperature, `[num_rows, P, D]`.
            guidance: Which rows are guided, and how much.
            num_timesteps: Steps of the sampler.
            ctx: The step, its adapters by row.

        Returns:
            float32 `[num_rows, P, D]`.
        """
        conditions = self.lm_to_dit_proj(lm, ctx), self.res_to_dit_proj(residual, ctx)
        mu = torch.stack(conditions, dim=1)  # [num_rows, 2, dit width]
        if not self.config.is_v2:
            mu = mu.sum(dim=1, keepdim=True)
        patches: Tensor = self.feat_decoder(
            noise, mu, cond.to(self.dtype).contiguous(), guidance, num_timesteps, ctx
        )
        return patches

    def stop_logits(self, lm: Tensor, ctx: ForwardContext) -> Tensor:
        """Score going on and stopping after the patch that `lm` `[num_rows, hidden_size]` yields.

        Returns:
            float32 `[num_rows, 2]`.
        """
        logits: Tensor = self.stop_head(F.silu(self.stop_proj(lm, ctx)), ctx)
        return logits.float()

    @property
    def dtype(self) -> torch.dtype:
        return self.feat_encoder.special_token.dtype
