"""Mixtures of experts on each device's kernels, against sums over all experts in float64.

The experts' hidden values are rounded to the activations' dtype once, and so is the result; sums
are float32. So the bound is of the sum of the magnitudes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.kernels import Kernels, QuantizedWeight, Routing, WeightSpec
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.kernels.triton.mixture import FEW_VISITS, LARGE_M
from nanovllm.models.quantization import SCHEMES, quantize
from tests.cpu_kernels import DTYPES, assert_within, each_isa, is_fast, kernels_for, random, threads
from tests.triton_device import DEVICE, DOT_DTYPES

UNITS = {torch.float32: 2.0**-18, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""What rounding costs; of float32 the sums of some hundred terms."""
ROWS = (0, 1, 2, 5, 17, 64)
SIZES = ((1, 1, 1), (37, 20, 33), (64, 96, 65), (200, 48, 64))
"""Depth, width of an expert, and outputs."""
ROUTINGS = ((1, Routing(1, True)), (4, Routing(4, False)), (9, Routing(3, True)))
"""How many experts there are, and how tokens are shared out among them."""

CPU = torch.device("cpu")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass
class Experts:
    """Packed weights, and what they stand for."""

    kernels: Kernels
    dtype: torch.dtype
    gate_up: Tensor  # [num_experts, 2 * inner, depth]
    down: Tensor  # [num_experts, width, inner]
    device: torch.device = CPU
    scheme: str | None = None
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        halves = [half for expert in self.gate_up for half in expert.chunk(2)]
        self.packed = (
            self._pack(self.gate_up, halves, self.activation),
            self._pack(self.down, self.down),
        )

    def _pack(
        self, stacked: Tensor, parts: Iterable[Any], activation: Activation | None = None
    ) -> Any:
        num_experts, rows, depth = stacked.shape
        spec = WeightSpec(rows, depth, activation)
        return self.kernels.pack_experts(spec, num_experts, map(self._stored, parts))

    def _stored(self, part: Tensor) -> Tensor | QuantizedWeight:
        return part if self.scheme is None else quantize(part, SCHEMES[self.scheme])

    def mix(self, x: Tensor, scores: Tensor, routing: Routing) -> Tensor:
        x, scores = x.to(self.device), scores.to(self.device)
        return self.kernels.mixture(x, scores, routing, *self.packed).cpu()

    def check(self, rows: int, routing: Routing) -> None:
        x = random(rows, self.gate_up.shape[2], seed=rows, dtype=self.dtype)
        scores = 2 * random(rows, len(self.gate_up), seed=rows + 1)
        actual = self.mix(x, scores, routing)
        assert actual.dtype == self.dtype
        expected, magnitude = expected_of(self, x, scores, routing)
        assert_within(actual, expected, 3 * UNITS[self.dtype] * magnitude + 1e-37, rows)


def experts(
    kernels: Kernels,
    dtype: torch.dtype,
    num_experts: int,
    sizes: tuple[int, int, int],
    device: torch.device = CPU,
    scheme: str | None = None,
    activation: Activation = "silu",
) -> Experts:
    depth, inner, width = sizes
    gate_up = random(num_experts, 2 * inner, depth, seed=1, dtype=dtype) * depth**-0.5
    down = random(num_experts, width, inner, seed=2, dtype=dtype) * inner**-0.5
    return Experts(kernels, dtype, gate_up, down, device, scheme, activation)


def expected_of(
    given: Experts, x: Tensor, scores: Tensor, routing: Routing
) -> tuple[Tensor, Tensor]:
    """What comes out, and the sum of the magnitudes of what it is made of; both float64."""
    shares = scores.double().softmax(-1)
    chosen = torch.zeros_like(shares).scatter_(1, shares.topk(routing.top_k).indices, 1.0)
    shares = shares * chosen
    if routing.normalized:
        shares /= shares.sum(-1, keepdim=True)
    expected = magnitude = torch.zeros(len(x), given.down.shape[1], dtype=torch.float64)
    for share, gate_up, down in zip(shares.T, given.gate_up, given.down, strict=True):
        gate, up = F.linear(x.double(), gate_up.double()).chunk(2, -1)
        is_silu = given.activation == "silu"
        hidden = (F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")) * up
        expected = expected + share[:, None] * F.linear(hidden, down.double())
        scale = F.linear(x.abs().double(), gate_up.abs().double()).amax(-1, keepdim=True)
        made = F.linear(hidden.abs(), down.abs().double()) + scale * 1e-3
        magnitude = magnitude + share[:, None] * made
    return expected, magnitude


@each_isa
@each_dtype
@pytest.mark.parametrize(("num_experts", "routing"), ROUTINGS)
def test_cpu_kernels(isa: str, dtype: torch.dtype, num_experts: int, routing: Routing) -> None:
    kernels = kernels_for(isa, dtype)
    for sizes in SIZES if is_fast(isa) else SIZES[:2]:
        mixture = experts(kernels, dtype, num_experts, sizes)
        for num_threads in (1, 2) if is_fast(isa) else (2,):
            with threads(kernels._library, num_threads):
                for rows in ROWS:
                    mixture.check(rows, routing)


@pytest.mark.parametrize(("num_experts", "routing"), ROUTINGS)
@pytest.mark.parametrize("sizes", SIZES)
def test_torch_kernels(sizes: tuple[int, int, int], num_experts: int, routing: Routing) -> None:
    kernels = TorchKernels(torch.device("cpu"), torch.float32)
    for rows in ROWS:
        experts(kernels, torch.float32, num_experts, sizes).check(rows, routing)


@pytest.mark.parametrize(
    ("dtype", "deterministic"),
    [*((dtype, False) for dtype in DOT_DTYPES), (DOT_DTYPES[-1], True)],
    ids=str,
)
@pytest.mark.parametrize(("num_experts", "routing"), ROUTINGS)
def test_triton_kernels(
    dtype: torch.dtype, deterministic: bool, num_experts: int, routing: Routing
) -> None:
    kernels = TritonKernels(DEVICE, dtype, deterministic)
    for sizes in SIZES[1:]:
        mixture = experts(kernels, dtype, num_experts, sizes, DEVICE)
        for rows in (0, 1, 5, FEW_VISITS * num_experts + 3):
            mixture.check(rows, routing)


@pytest.mark.parametrize("kind", ["torch", "triton", "cpu"])
def test_experts_gated_by_gelu(kind: str) -> None:
    dtype = torch.float32
    kernels: dict[str, tuple[Kernels, torch.device]] = {
        "torch": (TorchKernels(CPU, dtype), CPU),
        "triton": (TritonKernels(DEVICE, dtype), DEVICE),
        "cpu": (kernels_for("portable", dtype), CPU),
    }
    chosen, device = kernels[kind]
    mixture = experts(chosen, dtype, 4, (16, 8, 24), device, activation="gelu_tanh")
    for rows in (1, 5):
        mixture.check(rows, Routing(2, True))


def test_more_visits_than_a_tile() -> None:
    kernels = TritonKernels(DEVICE, torch.float32)
    experts(kernels, torch.float32, 2, (16, 8, 24), DEVICE).check(LARGE_M + 3, Routing(2, True))


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_quantized_experts_are_what_they_are_one_by_one(scheme: str) -> None:
    """As the linear kernels, which are held to products in float64, have it."""
    kernels = kernels_for("auto", torch.bfloat16)
    mixture = experts(kernels, torch.bfloat16, 4, (96, 64, 40), scheme=scheme)
    x, scores = random(9, 96, seed=5, dtype=torch.bfloat16), random(9, 4, seed=6)
    expected = torch.zeros(9, 40)
    shares, chosen = scores.softmax(-1).topk(2)
    for index in range(4):
        halves = [mixture._stored(half) for half in mixture.gate_up[index].chunk(2)]
        gate_up = kernels.pack(WeightSpec(128, 96, "silu"), halves, None)
        down = kernels.pack(WeightSpec(40, 64), [mixture._stored(mixture.down[index])], None)
        share = (shares * (chosen == index)).sum(-1, keepdim=True)
        expected += share * kernels.logits(kernels.linear(x, gate_up), down)
    actual = mixture.mix(x, scores, Routing(2, False))
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=2**-7, atol=1e-6)


def of_cpu() -> tuple[Kernels, torch.device]:
    return kernels_for("auto", torch.float32, deterministic=True), torch.device("cpu")


def of_triton() -> tuple[Kernels, torch.device]:
    return TritonKernels(DEVICE, torch.float32, deterministic=True), DEVICE


@pytest.mark.parametrize("make", [of_cpu, of_triton])
def test_a_row_does_not_depend_on_the_others(
    make: Callable[[], tuple[Kernels, torch.device]],
) -> None:
    kernels, device = make()
    mixture = experts(kernels, torch.float32, 5, (40, 24, 33), device)
    x, scores = random(80, 40), random(80, 5, seed=7)
    routing = Routing(2, True)
    together = mixture.mix(x, scores, routing)
    for row in (0, 41, 79):
        alone = mixture.mix(x[row : row + 1], scores[row : row + 1], routing)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_harm_no_other_row(value: float, normalized: bool) -> None:
    mixture = experts(kernels_for("auto", torch.float32), torch.float32, 6, (24, 16, 24))
    x, scores = random(5, 24), random(5, 6, seed=7)
    routing = Routing(2, normalized)
    expected = mixture.mix(x, scores, routing)
    scores[1, :] = scores[3, 4] = value
    actual = mixture.mix(x, scores, routing)
    assert actual[[1, 3]].isnan().all()
    assert torch.equal(actual[[0, 2, 4]], expected[[0, 2, 4]])


def test_equal_scores_choose_the_first() -> None:
    mixture = experts(kernels_for("auto", torch.float32), torch.float32, 6, (24, 16, 24))
    x, scores = random(3, 24), torch.zeros(3, 6)
    first = scores.clone()
    first[:, :2] = 1e-9
    routing = Routing(2, True)
    actual, expected = mixture.mix(x, scores, routing), mixture.mix(x, first, routing)
    torch.testing.assert_close(actual, expected)


def test_a_replay_routes_anew() -> None:
    kernels = kernels_for("auto", torch.float32)
    mixture = experts(kernels, torch.float32, 6, (24, 16, 24))
    router = kernels.pack(WeightSpec(6, 24), [random(6, 24, seed=9)], None)
    routing = Routing(2, True)

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        return (kernels.mixture(x, kernels.logits(x, router), routing, *mixture.packed),)

    for seed in range(4):
        x = random(3, 24, seed=seed)
        (replayed,) = kernels.replay("here", compute, (x.clone(),))
        assert torch.equal(replayed, compute(x)[0])
