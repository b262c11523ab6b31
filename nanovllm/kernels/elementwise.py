"""What layers do to each row or head by itself, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension by a float32 weight, rounded once."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]`, the halves of a head being the pairs."""
    first, second = x.float().chunk(2, dim=-1)  # [num_tokens, num_heads, head_dim / 2]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
