"""Attention over the paged KV cache, and within short sequences that have none."""

from torch import Tensor, nn

from nanovllm.kernels.attention_backend import HeadNorms
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.rotary import Rotary


class Attention(nn.Module):
    """Writes the step's keys and values to the cache and attends to all of it.

    Args:
        layer_index: Which of the context's caches is this layer's.
        window: Positions a query sees, itself included; None is all before it.
    """

    def __init__(self, layer_index: int, window: int | None = None) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.window = window

    def forward(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        ctx: ForwardContext,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: Projections `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`.
            norms: Norms of queries and keys by head, if the model has them.
            rotary: Cosines and sines of the tokens' positions; None is no positions.
            ctx: The step.

        Returns:
            `[num_tokens, num_heads * head_dim]`.
        """
        cache = ctx.kv_caches[self.layer_index]
        q = ctx.backend.write(qkv, norms, rotary, cache, ctx.cache_slots)
        return ctx.backend.run(q, cache, ctx.attention, self.window).view(len(q), -1)


class LocalAttention(nn.Module):
    """Attends within short sequences of equal length, in both directions and without a cache.

    Args:
        length: Positions of a sequence.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
    """

    def __init__(self, length: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.length = length
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

    def forward(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,  # noqa: ARG002  # `Attention` has them
        rotary: Rotary | None,
        ctx: ForwardContext,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: Projections, one sequence after the other,
                `[num_seqs * length, (num_heads + 2 * num_kv_heads) * head_dim]`.
            norms: None: `SelfAttention` sees to it.
            rotary: Cosines and sines of the positions of one sequence; None is no positions.
            ctx: The step.

        Returns:
            `[num_seqs * length, num_heads * head_dim]`.
        """
        heads = self.num_heads, self.num_kv_heads
        return ctx.kernels.local_attention(qkv, rotary, self.length, *heads)
