"""The decoder-only transformer that Llama's relatives share.

An architecture is a subclass of `CausalLM` that says how it differs. Module names are those of the
checkpoints, but for projections of one input, which are packed.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanovllm.kernels.kernels import Kernels, Routing
from nanovllm.layers.attention import Attention, LocalAttention
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.experts import Mixture
from nanovllm.layers.linear import Embedding, Linear, PackedLinear
from nanovllm.layers.norm import RMSNorm, head_norms
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.rotary import Rotary, RotaryEmbedding
from nanovllm.models.model_config import MixtureConfig, ModelConfig
from nanovllm.models.sharding import Sharding

Rotaries = tuple[Rotary, ...]
"""Cosines and sines of a step's positions, see `Layers.run`."""

Part = tuple[Tensor, ...]
"""What goes into a part of the layers, or comes out of it."""

Keep = Callable[[Tensor], Tensor]
"""Picks the tokens that are wanted behind the last layer: `[num_tokens, ...]` to those of fewer."""


class Traits:
    """How architectures differ.

    Attributes:
        qk_norm: Whether queries and keys are normed by head.
        qkv_bias: Whether the query, key and value projections always have biases.
        output_norms: Whether what attention and MLP add to the residual stream is normed, too.
        norm_offset: Added to the weights of norms.
    """

    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False
    output_norms: ClassVar[bool] = False
    norm_offset: ClassVar[float] = 0.0


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, and where asked for normed heads.

    Args:
        config: Hyper-parameters.
        attention: What its heads see.
        traits: The architecture's.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: Attention | LocalAttention,
        traits: type[Traits] = Traits,
    ) -> None:
        super().__init__()
        if traits.qk_norm and isinstance(attention, LocalAttention):
            raise ValueError("the kernels of local attention norm no heads")
        head_dim = config.head_dim
        q_width, kv_width = (n * head_dim for n in (config.num_heads, config.num_kv_heads))
        self.qkv_proj = PackedLinear(
            config.hidden_size,
            {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width},
            bias=traits.qkv_bias or config.attention_bias,
        )
        self.o_proj = Linear(q_width, config.hidden_size, bias=config.attention_bias, reduces=True)
        self.q_norm = self.k_norm = None
        if traits.qk_norm:
            norm = functools.partial(RMSNorm, head_dim, config.rms_norm_eps, traits.norm_offset)
            # Attention divides by the root of the head's width.
            self.q_norm = norm(
                scale=math.sqrt(head_dim / (config.query_pre_attn_scalar or head_dim))
            )
            self.k_norm = norm()
        self.attention = attention

    def forward(self, x: Tensor, rotary: Rotary | None, ctx: ForwardContext) -> Tensor:
        """Attend; what comes out is for `o_proj`."""
        qkv = self.qkv_proj(x, ctx)
        norms = head_norms(self.q_norm, self.k_norm)
        return self.attention(qkv, norms, rotary, ctx)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated MLP (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = PackedLinear(
            config.hidden_size,
            {"gate_proj": width, "up_proj": width},
            bias=config.mlp_bias,
            activation=config.activation,
        )
        self.down_proj = Linear(width, config.hidden_size, bias=config.mlp_bias, reduces=True)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, ctx), ctx)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, on a residual stream that is carried beside.

    Args:
        config: Hyper-parameters.
        attention: What its heads see.
        traits: The architecture's.
        mixture: What it has in place of an MLP.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: Attention | LocalAttention,
        traits: type[Traits] = Traits,
        mixture: MixtureConfig | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, attention, traits)
        self.mlp = MLP(config) if mixture is None else _mixture_of(config, mixture)
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.rms_norm_eps, traits.norm_offset
        )
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if traits.output_norms else None
        self.post_feedforward_layernorm = norm() if traits.output_norms else None
        self._scale = config.residual_scale
        windowed = isinstance(attention, Attention) and attention.window is not None
        self._rotary_index = int(windowed and config.window_rope is not None)

    def attend(
        self, x: Tensor | None, residual: Tensor, rotaries: Rotaries, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """The first half, but for the projection of what attention yields.

        Args:
            x: What the layer before adds to the residual stream; None is the first layer.
            residual: The residual stream before it, `[num_tokens, hidden_size]`.
            rotaries: See `Layers.run`.
            ctx: The step.

        Returns:
            What attention yields, and the residual stream that it has seen.
        """
        if x is None:
            x = self.input_layernorm(residual, ctx)
        else:
            x, residual = self.input_layernorm.add(x, residual, ctx)
        rotary = rotaries[self._rotary_index] if rotaries else None
        return self.self_attn(x, rotary, ctx), residual

    def finish(self, x: Tensor, residual: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """The rest of the layer: takes what `attend` returned, returns what it takes."""
        x = self._scaled(self.self_attn.o_proj(x, ctx))
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x, residual = self.post_attention_layernorm.add(x, residual, ctx)
            return self._scaled(self.mlp(x, ctx)), residual
        x = self.post_attention_layernorm(x, ctx)
        x, residual = self.pre_feedforward_layernorm.add(x, residual, ctx)
        return self.post_feedforward_layernorm(self._scaled(self.mlp(x, ctx)), ctx), residual

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._scale == 1.0 else x * self._scale


def _mixture_of(config: ModelConfig, mixture: MixtureConfig) -> Mixture:
    size, routing = mixture.expert_size, Routing(mixture.top_k, mixture.norm_topk_prob)
    return Mixture(config.hidden_size, size, mixture.num_experts, config.activation, routing)


class Layers(nn.Module):
    """Layers and the final norm.

    Args:
        config: Hyper-parameters.
        attentions: What each layer's heads see.
        traits: The architecture's.
    """

    def __init__(
        self,
        config: ModelConfig,
        attentions: Iterable[Attention | LocalAttention],
        traits: type[Traits] = Traits,
    ) -> None:
        super().__init__()
        mixed = config.mixture.layers if config.mixture else ()
        stack = [
            DecoderLayer(config, attention, traits, config.mixture if index in mixed else None)
            for index, attention in enumerate(attentions)
        ]
        self.layers = nn.ModuleList(stack)
        self._has_cache = any(isinstance(layer.self_attn.attention, Attention) for layer in stack)
        # What the kernels know this network by: the network itself they would keep alive.
        self._key = object()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, traits.norm_offset)

    def run(
        self,
        residual: Tensor,
        rotaries: Rotaries,
        ctx: ForwardContext,
        keep: Keep | None = None,
    ) -> Tensor:
        """Compute hidden states.

        Args:
            residual: Embeddings `[num_tokens, hidden_size]`; overwritten by some kernels.
            rotaries: Cosines and sines of the tokens' positions, a second time for layers with a
                window if theirs are others; empty is no positions.
            ctx: The step.
            keep: Which tokens are wanted; all of them if it is None. The others go no further than
                to the last layer's attention.

        Returns:
            `[num_kept_tokens, hidden_size]`, after the final norm.
        """
        if keep is None:
            return self._replay(self._compute, (residual,), rotaries, ctx)[0]
        x, residual = self._replay(self._attend, (residual,), rotaries, ctx)
        if ctx.lora is not None:
            ctx = ctx.of_rows(keep(torch.arange(len(x), device=x.device)))
        x, residual = keep(x), keep(residual)
        return self._replay(self._finish, (x, residual), (), ctx)[0] if len(x) else residual

    @property
    def _stack(self) -> list[DecoderLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _compute(self, inputs: Part, rotaries: Rotaries, ctx: ForwardContext) -> Part:
        return self._finish(self._attend(inputs, rotaries, ctx), (), ctx)

    def _attend(self, inputs: Part, rotaries: Rotaries, ctx: ForwardContext) -> Part:
        """All up to what the last layer's attention yields."""
        x, (residual,) = None, inputs
        *before, last = self._stack
        for layer in before:
            x, residual = layer.finish(*layer.attend(x, residual, rotaries, ctx), ctx)
        return last.attend(x, residual, rotaries, ctx)

    def _finish(
        self,
        inputs: Part,
        rotaries: Rotaries,  # noqa: ARG002  # as for the other parts
        ctx: ForwardContext,
    ) -> Part:
        """The rest."""
        x, residual = inputs
        x, residual = self._stack[-1].finish(x, residual, ctx)
        return (self.norm.add(x, residual, ctx)[0],)

    def _replay(
        self,
        part: Callable[[Part, Rotaries, ForwardContext], Part],
        inputs: Part,
        rotaries: Rotaries,
        ctx: ForwardContext,
    ) -> Part:
        """Compute a part of `run`, by `Kernels.replay` unless more than the inputs changes."""
        if ctx.lora is not None or ctx.parallel is not None:
            return part(inputs, rotaries, ctx)
        num_inputs, has_cache = len(inputs), self._has_cache and part != self._finish

        def compute(*tensors: Tensor) -> Part:
            inputs, others = tensors[:num_inputs], tensors[num_inputs:]
            step = replace(ctx, cache_slots=others[-1]) if has_cache else ctx
            of_rotaries = iter(others[: 2 * len(rotaries)])
            return part(inputs, tuple(zip(of_rotaries, of_rotaries, strict=True)), step)

        slots = (ctx.cache_slots,) if has_cache else ()
        tensors = *inputs, *itertools.chain.from_iterable(rotaries), *slots
        return ctx.kernels.replay((self._key, part.__name__), compute, tensors)


class CausalLayers(Layers):
    """Layers that see what came before through the KV cache.

    Args:
        config: Hyper-parameters.
        traits: The architecture's.
        first_cache: Which of the context's caches is that of the first layer.
    """

    def __init__(
        self, config: ModelConfig, traits: type[Traits] = Traits, first_cache: int = 0
    ) -> None:
        attentions = (
            Attention(first_cache + index, window) for index, window in enumerate(config.windows)
        )
        super().__init__(config, attentions, traits)
        ropes = () if config.no_rope else (config.rope, config.window_rope)
        self._rotaries = [RotaryEmbedding(rope) for rope in ropes if rope is not None]

    def forward(
        self,
        residual: Tensor,
        positions: Tensor,
        ctx: ForwardContext,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states `[num_wanted, hidden_size]` of embeddings, which are spent.

        Args:
            residual: The embeddings `[num_tokens, hidden_size]`.
            positions: `[num_tokens]`.
            ctx: The step.
            wanted: Which tokens' hidden states are, `[num_wanted]`; None is all.
        """
        rotaries = tuple(rotary(positions) for rotary in self._rotaries)
        return self.run(residual, rotaries, ctx, None if wanted is None else lambda x: x[wanted])


class Decoder(CausalLayers):
    """Embedding, layers and final norm.

    Args:
        config: Hyper-parameters.
        traits: The architecture's.
        vocab: See `Embedding.part`.
    """

    def __init__(
        self, config: ModelConfig, traits: type[Traits] = Traits, vocab: range | None = None
    ) -> None:
        super().__init__(config, traits)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, vocab)
        self._embedding_scale = config.embedding_scale

    def embed(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Look ids `[num_tokens]` up: `[num_tokens, hidden_size]`."""
        embeddings: Tensor = self.embed_tokens(token_ids, ctx)
        if self._embedding_scale == 1.0:
            return embeddings
        return embeddings * _rounded(self._embedding_scale, embeddings.dtype)


@functools.lru_cache(maxsize=8)
def _rounded(scale: float, dtype: torch.dtype) -> float:
    """A factor as a number of the model's dtype, which it is in training."""
    return torch.tensor(scale, dtype=dtype, device="cpu").item()


class CausalLM(Traits, nn.Module):
    """A decoder with an output head; its subclasses are the architectures.

    Args:
        config: Hyper-parameters.
        sharding: The part of it that is here; None is all.

    Attributes:
        config: Hyper-parameters of what is here.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding | None = None) -> None:
        super().__init__()
        self.config = config if sharding is None else sharding.local
        self.sharding = sharding
        vocab = None if sharding is None else sharding.vocab
        self.model = Decoder(self.config, type(self), vocab)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, vocab)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        ctx: ForwardContext,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states.

        Args:
            token_ids: `[num_tokens]`.
            positions: `[num_tokens]`.
            ctx: The step.
            wanted: Which tokens' hidden states are, `[num_wanted]`; None is all.

        Returns:
            `[num_wanted, hidden_size]`, after the final norm.
        """
        embeddings = self.model.embed(token_ids, ctx)
        return self.model(embeddings, positions, ctx, wanted)  # type: ignore[no-any-return]

    def compute_logits(
        self, hidden: Tensor, kernels: Kernels, parallel: TensorParallel | None = None
    ) -> Tensor:
        """Score the vocabulary: `[num_rows, hidden_size]` to float32 `[num_rows, vocab_size]`."""
        return (self.lm_head or self.model.embed_tokens).logits(hidden, kernels, parallel)
