"""Linear layers; several projections of one input are packed into one."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nanovllm.kernels.kernels import Kernels, WeightSpec
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.lora import LoRATable


class Linear(nn.Module):
    """`y = x W^T + b`, with `W` of shape `[out_features, in_features]` as in the checkpoints.

    Attributes:
        spec: Shape of `W`.
        has_bias: Whether there is a `b`.
        weight: `W` and `b` in the form of the kernels' own, once they are loaded.
        exact: Whether `W` stays as it is when weights are quantized.
        lora: Its adapters, if it may have some.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        gated: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.spec = WeightSpec(out_features, in_features, gated)
        self.has_bias, self.exact = bias, exact
        self.weight: Any = None
        self.lora: LoRATable | None = None

    def parts(self, path: str) -> dict[str, int]:
        """Names in the checkpoint of this module's parts, by its own path, and their outputs."""
        return {path: self.spec.rows}

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        y = ctx.kernels.linear(x, self.weight)
        if self.lora is None or ctx.lora is None:
            return y
        return self.lora.add(y, x, ctx.lora)


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
        self._gated = gated

    def parts(self, path: str) -> dict[str, int]:
        parent = path.rpartition(".")[0]
        return {f"{parent}.{part}": width for part, width in self._parts.items()}

    def unfuse(self) -> None:
        """Compute gate and up before `SiLU(gate) * up`: adapters come in between.

        Called before the weight is packed.
        """
        self.spec = replace(self.spec, gated=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, in_features]` to the outputs of all parts, or gate them."""
        y = super().forward(x, ctx)
        return ctx.kernels.silu_mul(y) if self._gated and not self.spec.gated else y


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
