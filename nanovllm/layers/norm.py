"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.attention_backend import HeadNorms
from nanovllm.layers.context import ForwardContext


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension (Zhang & Sennrich 2019), by a float32 weight.

    Args:
        size: Width of a row.
        eps: Added to the mean of the squares.
        offset: Added to the weight of the checkpoint.
        scale: Multiplies that sum.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self._offset, self._scale = offset, scale

    def load(self, weight: Tensor, device: torch.device) -> None:
        """Take a weight over as it is in the checkpoint."""
        weight = (weight.to(device, torch.float32, copy=True) + self._offset) * self._scale
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Normalise `[num_tokens, size]`."""
        return ctx.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Add to the residual stream and normalise it.

        Returns:
            The normalised sum, and the sum, which may take the place of `residual`.
        """
        return ctx.kernels.add_rms_norm(x, residual, self.weight, self.eps)


def head_norms(q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> HeadNorms | None:
    """The norms of queries and keys by head, as attention backends take them."""
    if q_norm is None or k_norm is None:
        return None
    return HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps)
