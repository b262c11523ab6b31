"""Rotary position embedding of heads, in plain torch."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]`, the halves of a head being the pairs."""
    first, second = x.float().chunk(2, dim=-1)  # [num_tokens, num_heads, head_dim / 2]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
