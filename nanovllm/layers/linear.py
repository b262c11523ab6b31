"""Linear layers; several projections of one input are packed into one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.kernels import Kernels, WeightSpec
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.lora import LoRATable
from nanovllm.layers.parallel import TensorParallel


class Linear(nn.Module):
    """`y = x W^T + b`, with `W` of shape `[out_features, in_features]` as in the checkpoints.

    Attributes:
        spec: Shape of `W`.
        has_bias: Whether there is a `b`.
        weight: `W` and `b` in the form of the kernels' own, once they are loaded.
        exact: Whether `W` stays as it is when weights are quantized.
        reduces: Whether ranks, if there are some, have a part of the inputs each.
        lora: Its adapters, if it may have some.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation: Activation | None = None,
        exact: bool = False,
        reduces: bool = False,
    ) -> None:
        super().__init__()
        self.spec = WeightSpec(out_features, in_features, activation)
        self.has_bias, self.exact, self.reduces = bias, exact, reduces
        self.weight: Any = None
        self.lora: LoRATable | None = None

    def parts(self, path: str) -> dict[str, int]:
        """Names in the checkpoint of this module's parts, by its own path, and their outputs."""
        return {path: self.spec.rows}

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        y = ctx.kernels.linear(x, self.weight)
        if self.lora is not None and ctx.lora is not None:
            y = self.lora.add(y, x, ctx.lora)
        return ctx.parallel.all_reduce(y) if self.reduces and ctx.parallel is not None else y


class PackedLinear(Linear):
    """Several projections of one input, stacked along the output.

    Args:
        in_features: Width of the input.
        parts: Output width of each projection, by its name in the checkpoint, in order.
        bias: Whether each projection has one.
        activation: If there is one, the two parts are a gate and what it gates: then the output is
            `activation(gate) * up`, of the width of one.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool = False,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias, activation)
        self._parts = parts
        self._unfused: Activation | None = None

    def parts(self, path: str) -> dict[str, int]:
        parent = path.rpartition(".")[0]
        return {f"{parent}.{part}": width for part, width in self._parts.items()}

    def unfuse(self) -> None:
        """Compute gate and up before one gates the other: adapters come in between.

        Called before the weight is packed.
        """
        self._unfused = self.spec.activation
        self.spec = replace(self.spec, activation=None)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, in_features]` to the outputs of all parts, or gate them."""
        y = super().forward(x, ctx)
        return y if self._unfused is None else ctx.kernels.act_and_mul(y, self._unfused)


class Embedding(Linear):
    """Looks tokens up, and as an output head scores them.

    Args:
        vocab_size: How many there are.
        hidden_size: Width of an embedding.
        part: The ids whose embeddings are here, if ranks have a part of them each; None is all.
    """

    def __init__(self, vocab_size: int, hidden_size: int, part: range | None = None) -> None:
        part = range(vocab_size) if part is None else part
        super().__init__(hidden_size, len(part))
        self._vocab_size, self._first = vocab_size, part.start

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Map ids `[num_tokens]` to `[num_tokens, hidden_size]`."""
        if ctx.parallel is None:
            return ctx.kernels.embed(token_ids, self.weight)
        rows = token_ids - self._first
        here = (rows >= 0) & (rows < self.spec.rows)
        embeddings = ctx.kernels.embed(torch.where(here, rows, 0), self.weight)
        return ctx.parallel.all_reduce(torch.where(here[:, None], embeddings, 0.0))

    def logits(
        self, hidden: Tensor, kernels: Kernels, parallel: TensorParallel | None = None
    ) -> Tensor:
        """Score every token: `[num_rows, hidden_size]` to float32 `[num_rows, vocab_size]`."""
        logits = kernels.logits(hidden, self.weight)
        return logits if parallel is None else parallel.all_gather_columns(logits, self._vocab_size)
