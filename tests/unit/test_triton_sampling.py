"""The sampler's kernel against its twin in torch, and against the definition in float64."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.kernels.kernels import Choice, Draws
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton import sampling
from tests.triton_device import DEVICE

TWIN = TorchKernels(DEVICE, torch.float32)
LAST_UNIFORM = 1 - 2**-24
KINDS = ("normal", "few", "equal", "masked", "peaked", "bfloat16", "huge", "one")


def random_logits(kind: str, num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Logits with ties, with forbidden tokens, or of models."""
    shape = (num_rows, vocab_size)
    normal = torch.randn(shape, generator=generator) * 3
    few = torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "few":
        return few
    if kind == "equal":
        return torch.full(shape, -0.25)
    if kind == "masked":
        return few.masked_fill(normal > 1, -torch.inf)
    if kind == "peaked":
        return normal + 12 * (normal > 7)
    if kind == "bfloat16":
        return normal.bfloat16().float()
    if kind == "huge":
        return few * 1e19 + normal
    if kind == "one":
        return normal.masked_fill(torch.arange(vocab_size) != vocab_size // 2, -torch.inf)
    return normal


@dataclass
class Row:
    """How one row is to be drawn; see `Draws`."""

    temperature: float = 1.0
    uniform: float = 0.5
    top_k: int = 10**6
    top_p: float = 1.0
    min_p: float = 0.0


def draws_of(rows: list[Row], vocab_size: int, without: tuple[str, ...] = ()) -> Draws:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], device=DEVICE)

    cuts = {
        "top_k": column("top_k").long().clamp(max=vocab_size),
        "top_p": column("top_p").float(),
        "min_p": column("min_p").float(),
    }
    return Draws(
        temperature=column("temperature").float(),
        uniforms=column("uniform").float(),
        any_sampled=any(row.temperature > 0 for row in rows),
        **{name: None if name in without else value for name, value in cuts.items()},
    )


def draw_exactly(logits: Tensor, draws: Draws, row: int) -> tuple[int, bool]:
    """The token by definition, in float64, and whether rounding may well lead to another one."""
    x = logits[row].double()
    temperature = float(draws.temperature[row])
    if temperature == 0 or not x.max().isfinite():
        return int(x.argmax()), False
    top_k = len(x) if draws.top_k is None else int(draws.top_k[row])
    top_p = 1.0 if draws.top_p is None else float(draws.top_p[row])
    min_p = 0.0 if draws.min_p is None else float(draws.min_p[row])
    # The twin divides first, which costs that much of what is left of the logits' differences.
    near = (x < x.max()) & (x > x.max() - 20 * temperature)
    slack = 1e-5 + 4e-7 * float(x[near].abs().amax() if near.any() else 0) / temperature
    weights = ((x - x.max()) / temperature).exp()
    close = bool(((weights - min_p).abs() < slack * min_p).logical_and(weights < 1).any())
    weights[weights < min_p] = 0
    order = x.argsort(descending=True, stable=True)
    weights[order[top_k:]] = 0
    if top_p < 1:
        before = weights[order].cumsum(0) - weights[order]
        wanted = top_p * weights.sum()
        close |= bool(((before - wanted).abs() < slack * weights.sum())[1:].any())
        dropped = before >= wanted
        dropped[0] = False
        weights[order[dropped]] = 0
    cumulative = weights.cumsum(0)
    target = float(draws.uniforms[row]) * cumulative[-1]
    kept = weights > 0
    close |= bool(((cumulative - target).abs() < slack * cumulative[-1])[kept].any())
    return int((kept & (cumulative > target)).int().argmax()), close


def check(logits: Tensor, draws: Draws) -> int:
    """Compare all rows with the definition and the twin; returns how many were no near-ties."""
    before = logits.clone()
    ours, twin = sampling.choose(logits, draws), TWIN.choose(logits.clone(), draws)
    assert torch.equal(logits, before) or not ours.valid.all()
    assert torch.equal(ours.valid, twin.valid)
    assert ((ours.token_ids >= 0) & (ours.token_ids < logits.shape[1])).all()
    decided = 0
    for row in range(len(logits)):
        if not ours.valid[row]:
            continue
        expected, close = draw_exactly(logits.cpu(), draws, row)
        if not close:
            decided += 1
            assert (int(ours.token_ids[row]), int(twin.token_ids[row])) == (expected, expected)
    return decided


@contextlib.contextmanager
def sizes(block: int, max_listed: int) -> Iterator[None]:
    """Read rows in small blocks, and list few tokens, so that short rows go all ways."""
    with patch.multiple(sampling, BLOCK=block, MAX_LISTED=max_listed):
        yield


SIZES = [
    (2048, 8192, (1, 2, 17, 300, 2048, 5000)),
    (64, 256, (1, 17, 64, 300)),
    (64, 16, (64, 130, 300)),
    (128, 1, (17, 300)),
]
"""Of a block and of a list, and vocabularies that make few blocks of those."""
rows_of_any_kind = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.0, 2.5, 1e3, 1e10]),
    uniform=st.floats(0, LAST_UNIFORM, width=32),
    top_k=st.sampled_from([1, 2, 5, 40, 700, 10**6]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.4, 1.0]),
)


@pytest.mark.parametrize(("block", "max_listed", "vocab_sizes"), SIZES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_rows_draw_what_the_twin_draws(
    block: int, max_listed: int, vocab_sizes: tuple[int, ...], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(rows_of_any_kind, max_size=5))
    vocab_size = data.draw(st.sampled_from(vocab_sizes))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = random_logits(data.draw(st.sampled_from(KINDS)), len(rows), vocab_size, generator)
    with sizes(block, max_listed):
        check(logits.to(DEVICE), draws_of(rows, vocab_size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "top_p"), [(3, 0.83), (50, 1.0), (10**6, 0.613)])
def test_most_draws_are_decided(kind: str, top_k: int, top_p: float) -> None:
    """So that the comparisons are about something."""
    generator = torch.Generator().manual_seed(top_k)
    uniforms = torch.rand(4, generator=generator).tolist()
    rows = [Row(0.8, uniform, top_k, top_p, 0.003) for uniform in uniforms]
    logits = random_logits(kind, len(rows), 150, generator).to(DEVICE)
    with sizes(64, 32):
        assert check(logits, draws_of(rows, 150)) >= 3


@pytest.mark.parametrize(
    "without", [(), ("min_p",), ("top_k", "top_p"), ("top_k", "top_p", "min_p")]
)
def test_settings_that_no_row_uses_may_be_left_out(without: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [Row(t, u, 20, 0.9, 0.05) for t in (0.0, 0.7) for u in (0.1, 0.77)]
    logits = random_logits("normal", len(rows), 500, generator).to(DEVICE)
    draws = draws_of(rows, 500, without)
    assert check(logits, draws) >= 3
    off = Row(top_k=500)
    neutral = {
        name: torch.full_like(value, getattr(off, name))
        for name, value in draws_of(rows, 500)._asdict().items()
        if name in without
    }
    with_neutral = sampling.choose(logits, draws._replace(**neutral))  # type: ignore[arg-type]
    assert torch.equal(sampling.choose(logits, draws).token_ids, with_neutral.token_ids)


@pytest.mark.parametrize("name", ["top_k", "top_p"])
def test_one_cut_does_not_need_the_other(name: str) -> None:
    """The twin wants both."""
    rows = [Row(1.0, u, 7, 0.6) for u in (0.01, 0.3, 0.6, 0.99)]
    logits = random_logits("bfloat16", len(rows), 500, torch.Generator().manual_seed(2)).to(DEVICE)
    draws = draws_of(rows, 500, (name,))
    for row, token_id in enumerate(sampling.choose(logits, draws).token_ids.tolist()):
        assert token_id == draw_exactly(logits.cpu(), draws, row)[0]


def drawn_counts(logits: list[float], row: Row, count: int = 12) -> list[int]:
    """How often each token is drawn by `count` evenly spaced uniforms."""
    rows = [Row(**vars(row) | {"uniform": (i + 0.5) / count}) for i in range(count)]
    draws = draws_of(rows, len(logits))
    token_ids = sampling.choose(torch.tensor([logits] * count, device=DEVICE), draws).token_ids
    return torch.bincount(token_ids, minlength=len(logits)).tolist()


@pytest.mark.parametrize(
    ("row", "shares"),
    [
        (Row(), (0.1, 0.2, 0.3, 0.4)),
        (Row(top_k=1), (0, 0, 0, 1)),
        (Row(top_k=2), (0, 0, 3 / 7, 4 / 7)),
        (Row(top_p=0.55), (0, 0, 3 / 7, 4 / 7)),
        (Row(top_p=0.71), (0, 2 / 9, 3 / 9, 4 / 9)),
        (Row(top_k=2, top_p=0.5), (0, 0, 0, 1)),
        (Row(top_k=3, top_p=0.5), (0, 0, 3 / 7, 4 / 7)),
        (Row(min_p=0.6), (0, 0, 3 / 7, 4 / 7)),
        (Row(min_p=1.0), (0, 0, 0, 1)),
        (Row(min_p=0.4, top_k=3, top_p=0.9), (0, 2 / 9, 3 / 9, 4 / 9)),
        (Row(temperature=0.5), (1 / 30, 4 / 30, 9 / 30, 16 / 30)),
        (Row(temperature=0), (0, 0, 0, 1)),
    ],
)
def test_draws_follow_the_distribution(row: Row, shares: tuple[float, ...]) -> None:
    counts = drawn_counts(torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist(), row)
    assert all(abs(n - 12 * share) <= 1 for n, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Row(), (1, 2, 4, 5, 6)),
        (Row(top_k=1), (1,)),
        (Row(top_k=3), (1, 2, 4)),
        (Row(top_p=0.5), (1, 2, 4)),
        (Row(top_p=1e-6), (1,)),
        (Row(top_k=3, top_p=0.6), (1, 2)),
        (Row(top_k=3, top_p=0.999), (1, 2, 4)),
        (Row(min_p=1.0), (1, 2, 4, 5, 6)),
        (Row(temperature=0), (1,)),
        (Row(temperature=1e10, min_p=0.5), (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_of_equal_tokens_the_first_are_kept(row: Row, kept: tuple[int, ...]) -> None:
    counts = drawn_counts([-200.0, 5, 5, -200, 5, 5, 5, -200], row)
    assert tuple(i for i, n in enumerate(counts) if n) == kept


def test_zeros_of_both_signs_are_equal() -> None:
    assert drawn_counts([-9.0, -0.0, 0.0, -0.0], Row(top_k=2), 10) == [0, 5, 5, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 64, 299])
def test_unusable_rows_are_told_and_spare_the_others(value: float, place: int) -> None:
    rows = [Row(t, 0.4, k, p) for t in (0.0, 1.0) for k, p in ((10**6, 1.0), (5, 0.9))]
    logits = random_logits("normal", 4, 300, torch.Generator().manual_seed(3)).to(DEVICE)
    draws = draws_of(rows, 300)
    with sizes(64, 32):
        expected = sampling.choose(logits, draws).token_ids
        spoilt = logits.clone()
        spoilt[1::2, slice(None) if value == -torch.inf else place] = value
        choice = sampling.choose(spoilt, draws)
    assert choice.valid.tolist() == [True, False, True, False]
    assert torch.equal(choice.token_ids[::2], expected[::2])
    assert ((choice.token_ids >= 0) & (choice.token_ids < 300)).all()


def test_nothing_but_no_numbers_is_unusable() -> None:
    choice = sampling.choose(
        torch.full((2, 70), torch.nan, device=DEVICE), draws_of([Row()] * 2, 70)
    )
    assert not choice.valid.any()
    assert (choice.token_ids >= 0).all()
    assert (choice.token_ids < 70).all()


ENDS = [(10**6, 1.0, 0.0), (3, 0.9, 0.0), (10**6, 0.9, 0.1)]


@pytest.mark.parametrize("uniform", [0.0, 1e-38, LAST_UNIFORM])
@pytest.mark.parametrize("kind", ["normal", "masked", "peaked"])
def test_the_ends_of_the_distribution_have_probability(kind: str, uniform: float) -> None:
    rows = [Row(0.3, uniform, k, p, m) for k, p, m in ENDS]
    generator = torch.Generator().manual_seed(4)
    logits = random_logits(kind, len(rows), 300, generator)
    logits[:, :3] = logits[:, -70:] = -torch.inf
    with sizes(64, 32):
        choice = sampling.choose(logits.to(DEVICE), draws_of(rows, 300))
    chosen = logits.gather(1, choice.token_ids.cpu()[:, None])[:, 0]
    assert (((chosen - logits.max(1).values) / 0.3) > -104).all()


def test_rows_may_lie_apart_and_know_nothing_of_one_another() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [Row(0.9, 0.1 + i / 10, 30, 0.95, 0.01) for i in range(4)]
    logits = random_logits("normal", 4, 320, generator).to(DEVICE)[:, 3:303]
    together = sampling.choose(logits, draws_of(rows, 300)).token_ids
    for i, row in enumerate(rows):
        alone = sampling.choose(logits[i : i + 1].contiguous(), draws_of([row], 300))
        assert alone.token_ids[0] == together[i]
    columns = sampling.choose(logits.T.contiguous().T, draws_of(rows, 300))
    assert torch.equal(columns.token_ids, together)


def test_greedy_steps_need_no_settings() -> None:
    logits = random_logits("few", 5, 300, torch.Generator().manual_seed(6)).to(DEVICE)
    draws = draws_of([Row(temperature=0)] * 5, 300, ("top_k", "top_p", "min_p"))
    assert not draws.any_sampled
    choice: Choice = sampling.choose(logits, draws)
    assert torch.equal(choice.token_ids.cpu(), (logits.cpu() == 2).int().argmax(1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_of_a_large_model(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    uniforms = torch.rand(32, generator=generator).tolist()
    cuts = [(10**6, 1.0), (20, 0.95), (10**6, 0.9), (5000, 1.0)]
    rows = [Row(0.7, u, *cuts[i % 4]) for i, u in enumerate(uniforms)]
    logits = random_logits(kind, len(rows), 151_936, generator).to(DEVICE)
    assert check(logits, draws_of(rows, 151_936)) >= (8 if kind == "equal" else 20)
