"""Linear layers; several projections of one input are packed into one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """`y = x W^T + b`, with `W` of shape `[out_features, in_features]` as in the checkpoints."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear(Linear):
    """Several projections of one input, stacked along the output.

    Args:
        in_features: Width of the input.
        parts: Output width of each projection, by its name in the checkpoint, in order.
        bias: Whether each projection has one.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = parts

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Project `x` and split `[num_tokens, out_features]` into the parts."""
        return self(x).split(list(self.parts.values()), dim=-1)  # type: ignore[no-any-return]

    def rows_of(self, part: str) -> slice:
        """The rows of the weight that hold a part."""
        start = 0
        for name, width in self.parts.items():
            if name == part:
                return slice(start, start + width)
            start += width
        raise KeyError(part)
