"""The decoder-only transformer that Llama's relatives share.

An architecture is a subclass of `CausalLM` that says how it differs. Module names are those of the
checkpoints, but for projections of one input, which are packed.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from nanovllm.kernels.kernels import Kernels
from nanovllm.layers.attention import Attention
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.linear import Embedding, Linear, PackedLinear
from nanovllm.layers.norm import RMSNorm, head_norms
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.model_config import ModelConfig


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, and where asked for normed heads."""

    def __init__(self, config: ModelConfig, layer_index: int, traits: type["CausalLM"]) -> None:
        super().__init__()
        head_dim = config.head_dim
        q_width, kv_width = (n * head_dim for n in (config.num_heads, config.num_kv_heads))
        self.qkv_proj = PackedLinear(
            config.hidden_size,
            {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width},
            bias=traits.qkv_bias or config.attention_bias,
        )
        self.o_proj = Linear(q_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if traits.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if traits.qk_norm else None
        self.attention = Attention(layer_index, config.windows[layer_index])

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        qkv = self.qkv_proj(x, ctx)
        norms = head_norms(self.q_norm, self.k_norm)
        return self.o_proj(self.attention(qkv, norms, rotary, ctx), ctx)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated MLP with SiLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = PackedLinear(
            config.hidden_size,
            {"gate_proj": width, "up_proj": width},
            bias=config.mlp_bias,
            gated=True,
        )
        self.down_proj = Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, ctx), ctx)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, on a residual stream that is carried beside."""

    def __init__(self, config: ModelConfig, layer_index: int, traits: type["CausalLM"]) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer_index, traits)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, residual: Tensor, rotary: tuple[Tensor, Tensor], ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual, ctx)
        x = self.self_attn(x, rotary, ctx)
        x, residual = self.post_attention_layernorm.add(x, residual, ctx)
        return self.mlp(x, ctx), residual


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, traits: type["CausalLM"]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, traits) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope)

    def forward(self, token_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        residual = self.embed_tokens(token_ids, ctx)
        x = torch.zeros_like(residual)
        rotary = self.rotary(positions)
        for layer in self.layers:
            x, residual = layer(x, residual, rotary, ctx)
        return self.norm.add(x, residual, ctx)[0]


class CausalLM(nn.Module):
    """A decoder with an output head.

    Subclasses are the architectures; they differ in these:

    Attributes:
        qk_norm: Whether queries and keys are normed by head.
        qkv_bias: Whether the query, key and value projections always have biases.
    """

    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, type(self))
        self.lm_head = (
            None if config.tie_word_embeddings else Embedding(config.vocab_size, config.hidden_size)
        )

    def forward(self, token_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """Compute hidden states.

        Args:
            token_ids: `[num_tokens]`.
            positions: `[num_tokens]`.
            ctx: The step.

        Returns:
            `[num_tokens, hidden_size]`, after the final norm.
        """
        return self.model(token_ids, positions, ctx)  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        """Score the vocabulary: `[num_rows, hidden_size]` to float32 `[num_rows, vocab_size]`."""
        return (self.lm_head or self.model.embed_tokens).logits(hidden, kernels)
