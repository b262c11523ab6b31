"""Linear layers; several projections of one input are packed into one."""

from typing import Any

from torch import Tensor, nn

from nanovllm.kernels.kernels import Kernels, WeightSpec
from nanovllm.layers.context import ForwardContext


class Linear(nn.Module):
    """`y = x W^T + b`, with `W` of shape `[out_features, in_features]` as in the checkpoints.

    Attributes:
        spec: Shape of `W`.
        has_bias: Whether there is a `b`.
        weight: `W` and `b` in the form of the kernels' own, once they are loaded.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, gated: bool = False
    ) -> None:
        super().__init__()
        self.spec = WeightSpec(out_features, in_features, gated)
        self.has_bias = bias
        self.weight: Any = None

    def parts(self, path: str) -> dict[str, int]:
        """Names in the checkpoint of this module's parts, by its own path, and their outputs."""
        return {path: self.spec.rows}

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        return ctx.kernels.linear(x, self.weight)


class PackedLinear(Linear):
    """Several projections of one input, stacked along the output.

    Args:
        in_features: Width of the input.
        parts: Output width of each projection, by its name in the checkpoint, in order.
        bias: Whether each projection has one.
        gated: Whether the two parts are a gate and what it gates: then the output is
            `SiLU(gate) * up`, of the width of one.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], bias: bool = False, gated: bool = False
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias, gated)
        self._parts = parts

    def parts(self, path: str) -> dict[str, int]:
        parent = path.rpartition(".")[0]
        return {f"{parent}.{part}": width for part, width in self._parts.items()}


class Embedding(Linear):
    """Looks tokens up, and as an output head scores them."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__(hidden_size, vocab_size)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Map ids `[num_tokens]` to `[num_tokens, hidden_size]`."""
        return ctx.kernels.embed(token_ids, self.weight)

    def logits(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        """Score every token: `[num_rows, hidden_size]` to float32 `[num_rows, vocab_size]`."""
        return kernels.logits(hidden, self.weight)
