"""Mixtures of experts: many MLPs, of which each token goes through a few (Shazeer et al. 2017)."""

from torch import Tensor, nn

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.kernels import Routing
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.linear import Linear


class ExpertLinear(Linear):
    """One linear layer of every expert, for `Kernels.mixture`.

    Args:
        in_features: Width of the input.
        parts: Output width of each projection, by its name in the checkpoint, in order.
        num_experts: How many experts there are.
        activation: See `PackedLinear`.

    Attributes:
        spec: Shape of one expert's weight.
        weight: Those of all, in the form of the kernels' own.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        num_experts: int,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(in_features, sum(parts.values()), activation=activation)
        self.num_experts = num_experts
        self._parts = parts

    def parts(self, path: str) -> dict[str, int]:
        parent = path.rpartition(".")[0]
        return {
            f"{parent}.{expert}.{part}": width
            for expert in range(self.num_experts)
            for part, width in self._parts.items()
        }


class Experts(nn.Module):
    """The MLPs.

    Args:
        hidden_size: Width of their inputs and outputs.
        expert_size: Their own width.
        num_experts: How many there are.
        activation: Of their gates.
    """

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, activation: Activation
    ) -> None:
        super().__init__()
        width = {"gate_proj": expert_size, "up_proj": expert_size}
        self.gate_up_proj = ExpertLinear(hidden_size, width, num_experts, activation)
        self.down_proj = ExpertLinear(expert_size, {"down_proj": hidden_size}, num_experts)

    def forward(self, x: Tensor, scores: Tensor, routing: Routing, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, hidden_size]`, by float32 scores `[num_tokens, num_experts]`."""
        weights = self.gate_up_proj.weight, self.down_proj.weight
        y = ctx.kernels.mixture(x, scores, routing, *weights)
        return y if ctx.parallel is None else ctx.parallel.all_reduce(y)


class Mixture(nn.Module):
    """Experts, and what scores them for a token.

    Args:
        hidden_size: Width of inputs and outputs.
        expert_size: Width of an expert.
        num_experts: How many there are.
        activation: Of their gates.
        routing: How tokens are shared out among them.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        activation: Activation,
        routing: Routing,
    ) -> None:
        super().__init__()
        # Never quantized: a score that is off sends the token to another expert.
        self.gate = Linear(hidden_size, num_experts, exact=True)
        self.experts = Experts(hidden_size, expert_size, num_experts, activation)
        self._routing = routing

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Map `[num_tokens, hidden_size]` to as much."""
        scores = ctx.kernels.logits(x, self.gate.weight)
        return self.experts(x, scores, self._routing, ctx)  # type: ignore[no-any-return]
