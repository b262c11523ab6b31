"""Norms, gates and the choice of tokens against definitions in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.kernels import Draws
from nanovllm.kernels.torch_kernels import TorchKernels
from tests.cpu_kernels import (
    DTYPES,
    UNIT,
    UNITS,
    assert_within,
    each_isa,
    is_fast,
    kernels_for,
    random,
    sum_error,
    threads,
)

ROWS = (0, 1, 2, 3, 5, 17, 255)
WIDTHS = (1, 7, 16, 37, 64, 321)
VOCAB = 151_936

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
each_activation = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


@each_isa
@each_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_norms(isa: str, dtype: torch.dtype, rows: int) -> None:
    kernels = kernels_for(isa, dtype)
    for width in WIDTHS:
        for scale in (1.0, 1e-4, 1e4):
            x = (random(rows, width, seed=1) * scale).to(dtype)
            residual = random(rows, width, seed=2, dtype=dtype)
            weight = random(width, seed=3)
            # The residual stream is rounded once, in float32 and exactly.
            total = (x.float() + residual.float()).to(dtype)
            out, stream = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
            assert torch.equal(stream, total)
            check_norm(out, total, weight, 1e-6)
            check_norm(kernels.rms_norm(x, weight, 1e-5), x, weight, 1e-5)


def check_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    x, weight, dtype = x.double(), weight.double(), x.dtype
    expected = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    rounding = UNITS[dtype] if dtype != torch.float32 else 0.0
    bound = expected.abs() * (sum_error(x.shape[-1]) + rounding) * 1.01 + 1e-37
    assert_within(out, expected, bound, tuple(x.shape))


@each_isa
@each_dtype
@each_activation
@pytest.mark.parametrize("rows", ROWS)
def test_gates(isa: str, dtype: torch.dtype, activation: Activation, rows: int) -> None:
    kernels = kernels_for(isa, dtype)
    for width in WIDTHS:
        gate_up = (random(rows, 2 * width, seed=rows) * 30).to(dtype)
        gate, up = gate_up.double().chunk(2, -1)
        is_silu = activation == "silu"
        steep = gate if is_silu else (8 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        expected = gate * steep.sigmoid() * up
        # The exponent is rounded before it is raised, which counts as often as it is large.
        rounding = UNITS[dtype] if dtype != torch.float32 else 0.0
        bound = expected.abs() * ((12 + 6 * steep.abs()) * UNIT + rounding) * 1.01 + 1e-33
        assert_within(kernels.act_and_mul(gate_up, activation), expected, bound, width)


@each_isa
@each_dtype
@each_activation
def test_gates_at_their_ends(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    inf, nan = torch.inf, torch.nan
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88, -88, -104, 1e30, -1e30, inf, nan])
    up = torch.ones_like(gate)
    gate_up = torch.cat([gate, up])[None].to(dtype)
    out = kernels_for(isa, dtype).act_and_mul(gate_up, activation)[0].float()
    assert out[:4].tolist() == pytest.approx([0, 0, 5e-31, -5e-31], rel=0.01)
    assert out[4].item() == 88
    assert out[5:7].abs().max() < 1e-30
    assert out[7] > 9e29
    assert abs(out[8]) < 1e-7
    assert out[9] == inf
    assert out[10].isnan()


@each_isa
@each_dtype
def test_a_row_is_the_same_alone_and_in_any_batch(isa: str, dtype: torch.dtype) -> None:
    kernels = kernels_for(isa, dtype, deterministic=True)
    x, residual = random(64, 321, dtype=dtype), random(64, 321, seed=1, dtype=dtype)
    weight, gate_up = random(321, seed=2), random(64, 642, seed=3, dtype=dtype)
    norm, stream = kernels.add_rms_norm(x, residual.clone(), weight, 1e-6)
    gated = kernels.act_and_mul(gate_up, "silu")
    for i in range(64):
        row = slice(i, i + 1)
        alone, total = kernels.add_rms_norm(x[row].clone(), residual[row].clone(), weight, 1e-6)
        assert torch.equal(alone, norm[row])
        assert torch.equal(total, stream[row])
        assert torch.equal(kernels.act_and_mul(gate_up[row].clone(), "silu"), gated[row])


@each_isa
@each_dtype
def test_rows_that_are_not_finite_spare_the_others(isa: str, dtype: torch.dtype) -> None:
    kernels = kernels_for(isa, dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x, weight = random(9, 37, dtype=dtype), torch.ones(37)
        healthy = kernels.rms_norm(x, weight, 1e-6)
        x[4, 36] = bad
        out = kernels.rms_norm(x, weight, 1e-6)
        assert out[4, 36].isnan()
        assert torch.equal(out[:4], healthy[:4])
        assert torch.equal(out[5:], healthy[5:])


# ---- the choice of tokens ---------------------------------------------------------------------


def draws_of(
    rows: int,
    temperature: float | Tensor = 1.0,
    uniforms: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocab_size: int = VOCAB,
) -> Draws:
    """Top-k and top-p come together, as from the sampling table."""
    cut = top_k is not None or top_p is not None
    return Draws(
        temperature=torch.as_tensor(temperature, dtype=torch.float32).expand(rows).contiguous(),
        uniforms=torch.full((rows,), 0.5) if uniforms is None else uniforms,
        any_sampled=True,
        top_k=torch.full((rows,), top_k or vocab_size) if cut else None,
        top_p=torch.full((rows,), 1.0 if top_p is None else top_p) if cut else None,
        min_p=None if min_p is None else torch.full((rows,), min_p),
    )


def check_choice(logits: Tensor, draws: Draws, row: int, token: int) -> None:
    """A token is right if the draw falls into its share, up to what rounding may move.

    Weights are float32, so that a token near a cut may stay or go, and tokens within rounding of
    the cut may change places: each shifts the shares by a weight at the cut.
    """
    scores = logits[row].double().numpy()
    temperature = float(draws.temperature[row])
    if temperature == 0:
        assert token == int(scores.argmax())
        return
    with np.errstate(invalid="ignore"):
        weights = np.exp((scores - scores.max()) / temperature)
    # The exponent is rounded in proportion to its size.
    reach = np.abs(scores[np.isfinite(scores)] - scores.max()).max() / temperature
    near = 8 * UNIT * (4 + min(reach, 90.0))
    weights[weights < 2.0**-126] = 0
    kept, slack, smallest = weights > 0, 0.0, 0.0
    if draws.min_p is not None:
        smallest = float(draws.min_p[row])
        slack += weights[np.abs(weights - smallest) <= near * weights].sum()
        kept &= weights >= smallest
    order = np.lexsort((np.arange(len(weights)), -scores))
    order = order[kept[order]]
    if draws.top_k is not None and int(draws.top_k[row]) < len(order):
        order = order[: int(draws.top_k[row])]
        smallest = weights[order[-1]]
    if draws.top_p is not None and float(draws.top_p[row]) < 1:
        total = weights[order].sum()
        before = np.cumsum(weights[order]) - weights[order]
        wanted = float(draws.top_p[row]) * total
        slack += near * total
        order = order[: max(1, int((before < wanted).sum()))]
        smallest = weights[order[-1]]
    if draws.top_k is not None:
        slack += 2 * smallest if len(order) > 1 else 0.0
    shares = np.zeros_like(weights)
    shares[order] = weights[order]
    cumulative = np.cumsum(shares)
    target = float(draws.uniforms[row]) * cumulative[-1]
    slack += near * cumulative[-1]
    assert weights[token] >= smallest * (1 - 2 * near), (token, weights[token], smallest)
    assert cumulative[token] - shares[token] - slack <= target <= cumulative[token] + slack, (
        f"token {token} has {cumulative[token] - shares[token]} to {cumulative[token]}, "
        f"the draw is {target}, slack {slack}"
    )


SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 1e-3},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40, "temperature": 0.7},
    {"top_p": 1e-6},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
    {"top_k": 1000, "top_p": 0.95, "temperature": 3.0},
)


@each_isa
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 50, 1023, 1025])
def test_choices_in_small_vocabularies(
    isa: str, settings: dict[str, float], vocab_size: int
) -> None:
    kernels = kernels_for(isa, torch.float32)
    rows = 64
    logits = random(rows, vocab_size, seed=vocab_size) * 3
    logits[::5, ::3] = -torch.inf
    logits[:, -1] = 0.0
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(7))
    uniforms[:3] = torch.tensor([0.0, 1 - 2.0**-24, 0.5])
    draws = draws_of(rows, uniforms=uniforms, vocab_size=vocab_size, **settings)  # type: ignore[arg-type]
    token_ids, valid = kernels.choose(logits.clone(), draws)
    assert valid.all()
    for row in range(rows):
        check_choice(logits, draws, row, int(token_ids[row]))
    plain = TorchKernels(torch.device("cpu"), torch.float32).choose(logits.clone(), draws)
    # Rounding may move a draw at the edge of a token's share.
    assert (plain.token_ids != token_ids).sum() <= 1


@each_isa
def test_choices_in_a_large_vocabulary(isa: str) -> None:
    kernels = kernels_for(isa, torch.float32)
    cases = SETTINGS if is_fast(isa) else SETTINGS[::3]
    for index, settings in enumerate(cases):
        logits = random(2, VOCAB, seed=index) * 3
        uniforms = torch.rand(2, generator=torch.Generator().manual_seed(index))
        draws = draws_of(2, uniforms=uniforms, **settings)  # type: ignore[arg-type]
        token_ids, valid = kernels.choose(logits.clone(), draws)
        assert valid.all()
        for row in range(2):
            check_choice(logits, draws, row, int(token_ids[row]))


@each_isa
def test_rows_of_random_settings_side_by_side(isa: str) -> None:
    kernels = kernels_for(isa, torch.float32)
    for seed in range(8):
        random_draw = np.random.default_rng(seed)
        rows, vocab_size = 40, int(random_draw.integers(1, 3000))
        logits = random(rows, vocab_size, seed=seed) * float(random_draw.choice([0.1, 1, 5, 30]))
        draws = Draws(
            temperature=torch.tensor(
                random_draw.choice([0, 1e-3, 0.3, 1, 2, 100], rows), dtype=torch.float32
            ),
            uniforms=torch.tensor(random_draw.random(rows), dtype=torch.float32),
            any_sampled=True,
            top_k=torch.tensor(random_draw.integers(1, vocab_size + 1, rows)),
            top_p=torch.tensor(
                random_draw.choice([1e-6, 0.1, 0.9, 1.0], rows), dtype=torch.float32
            ),
            min_p=torch.tensor(random_draw.choice([0, 0.02, 0.5], rows), dtype=torch.float32),
        )
        together, _ = kernels.choose(logits.clone(), draws)
        for row in range(rows):
            check_choice(logits, draws, row, int(together[row]))
        with threads(kernels._library, 3):
            again, _ = kernels.choose(logits.clone(), draws)
        assert torch.equal(again, together)


@each_isa
def test_ties_go_to_the_first(isa: str) -> None:
    kernels = kernels_for(isa, torch.float32)
    for vocab_size in (50, 1500):
        for ties in ([3, 4], [0, vocab_size - 1], [17, 33, 49], list(range(vocab_size))):
            logits = torch.full((1, vocab_size), -1.0)
            logits[0, ties] = 2.5
            for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
                uniforms = torch.tensor([0.999])
                draws = draws_of(1, uniforms=uniforms, vocab_size=vocab_size, **settings)
                token_ids, _ = kernels.choose(logits.clone(), draws)
                assert token_ids.tolist() == ties[:1], settings
            if len(ties) < vocab_size:
                draws = draws_of(1, uniforms=torch.tensor([0.999]), top_k=2, vocab_size=vocab_size)
                assert kernels.choose(logits.clone(), draws).token_ids.tolist() == [ties[1]]


@each_isa
@pytest.mark.parametrize("vocab_size", [1, 5, 16, 50, 1025])
def test_rows_without_a_usable_best_are_invalid(isa: str, vocab_size: int) -> None:
    kernels = kernels_for(isa, torch.float32)
    logits = random(6, vocab_size)
    logits[1, vocab_size - 1] = torch.nan
    logits[2] = -torch.inf
    logits[3, vocab_size // 2] = torch.inf
    logits[4] = torch.nan
    logits[5] = -torch.inf
    logits[5, vocab_size - 1] = -30.0
    for temperature in (0.0, 1.0):
        for top_k in (None, 2):
            draws = draws_of(6, temperature, top_k=top_k, vocab_size=vocab_size)
            token_ids, valid = kernels.choose(logits.clone(), draws)
            assert valid.tolist() == [True, False, False, False, False, True]
            assert ((token_ids >= 0) & (token_ids < vocab_size)).all()
            assert token_ids[5] == vocab_size - 1


@each_isa
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.5}], ids=str
)
def test_evenly_spaced_draws_give_each_token_its_share(
    isa: str, settings: dict[str, float]
) -> None:
    """Sharper than a chi-squared test of random draws: each count is right to one."""
    kernels = kernels_for(isa, torch.float32)
    count = 4096
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 0.9, 1.1, -9.0])
    uniforms = (torch.arange(count) + 0.5) / count
    draws = draws_of(count, uniforms=uniforms, vocab_size=9, **settings)  # type: ignore[arg-type]
    token_ids, _ = kernels.choose(scores.repeat(count, 1), draws)
    observed = torch.bincount(token_ids, minlength=9).double()
    weights = (scores.double() / settings.get("temperature", 1.0)).softmax(-1)
    if "min_p" in settings:
        weights[weights < settings["min_p"] * weights.max()] = 0
    ranked = weights.argsort(descending=True)
    if "top_k" in settings:
        weights[ranked[5:]] = 0
    if "top_p" in settings:
        ahead = weights[ranked].cumsum(0) - weights[ranked]
        weights[ranked[ahead >= settings["top_p"]]] = 0
    expected = weights / weights.sum() * count
    assert ((observed - expected).abs() <= 1.01).all()
    chi_squared = ((observed - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_squared < 1


@each_isa
def test_no_rows(isa: str) -> None:
    kernels: CpuKernels = kernels_for(isa, torch.float32)
    token_ids, valid = kernels.choose(torch.zeros(0, 50), draws_of(0, top_k=3, vocab_size=50))
    assert token_ids.shape == valid.shape == (0,)
