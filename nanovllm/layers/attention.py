"""Attention over the paged KV cache."""

from torch import Tensor, nn

from nanovllm.kernels.attention_backend import HeadNorms
from nanovllm.layers.context import ForwardContext


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
        rotary: tuple[Tensor, Tensor],
        ctx: ForwardContext,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: Projections `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`.
            norms: Norms of queries and keys by head, if the model has them.
            rotary: Cosines and sines of the tokens' positions.
            ctx: The step.

        Returns:
            `[num_tokens, num_heads * head_dim]`.
        """
        cache = ctx.kv_caches[self.layer_index]
        q = ctx.backend.write(qkv, norms, rotary, cache, ctx.cache_slots)
        return ctx.backend.run(q, cache, ctx.attention, self.window).view(len(q), -1)
