"""The penalties' kernel against its twin in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.kernels.kernels import Draws, Penalties
from nanovllm.kernels.torch_kernels import TorchKernels, apply_penalties
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.kernels.triton.penalties import BLOCK, PenaltyKernel
from nanovllm.layers.sampler import SamplingBatch, sample
from tests.triton_device import DEVICE

VOCAB = 37
KERNEL = PenaltyKernel(DEVICE)


def random_penalties(
    lengths: list[int], vocab_size: int, seed: int, prompt_share: float = 0.5, num_ids: int = 6
) -> Penalties:
    """Histories of a few ids, the first and the last one of the vocabulary among them."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(low: float, high: float) -> Tensor:
        return torch.rand(len(lengths), generator=generator).mul(high - low).add(low).to(DEVICE)

    ids = torch.randint(vocab_size, (num_ids,), generator=generator)
    ids[0], ids[-1] = 0, vocab_size - 1
    chosen = torch.randint(num_ids, (len(lengths), max(lengths)), generator=generator)
    counts = torch.tensor(lengths)
    return Penalties(
        rows=torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)].to(DEVICE),
        history=ids[chosen].int().to(DEVICE),
        lengths=counts.to(DEVICE),
        prompt_lengths=(counts * prompt_share).long().to(DEVICE),
        repetition=numbers(0.5, 2.0),
        presence=numbers(-2, 2),
        frequency=numbers(-2, 2),
    )


def random_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return logits.mul(5).to(DEVICE)


def check(logits: Tensor, penalties: Penalties, kernel: PenaltyKernel = KERNEL) -> None:
    """Compare with the twin, and leave the table as it was."""
    expected = logits.clone()
    apply_penalties(expected, penalties)
    kernel.apply(logits, penalties)
    # A GPU multiplies and subtracts in one, the twin rounds between.
    atol = 2e-7 * (10 + 2 * int(penalties.lengths.max()))
    torch.testing.assert_close(logits, expected, rtol=2e-6, atol=atol)
    assert not kernel._counts.any()


@pytest.mark.parametrize("prompt_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "lengths",
    [[1], [0], [5, 0, 1], [40, 3], [BLOCK - 1], [BLOCK, BLOCK + 1, 2], [3 * BLOCK + 7]],
    ids=str,
)
def test_penalties_are_those_of_the_twin(lengths: list[int], prompt_share: float) -> None:
    penalties = random_penalties(lengths, VOCAB, 1, prompt_share)
    check(random_logits(len(lengths) + 2, VOCAB, 2), penalties)


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    vocab_size=st.sampled_from([1, 2, 300, 5000]),
    num_ids=st.integers(1, 80),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_penalties_of_any_rows(
    lengths: list[int], vocab_size: int, num_ids: int, seed: int
) -> None:
    penalties = random_penalties(lengths, vocab_size, seed, num_ids=num_ids)
    check(random_logits(len(lengths) + 2, vocab_size, seed), penalties)


def test_rows_may_lie_apart() -> None:
    """As those of logits without padding, and histories cut to the longest one, do."""
    penalties = random_penalties([9, 4], VOCAB, 3)
    wide = torch.zeros(2, 50, dtype=torch.int64, device=DEVICE)
    wide[:, :9] = penalties.history
    wide[:, 9:] = -1
    settings = {name: getattr(penalties, name) for name in Penalties.__slots__}
    check(
        random_logits(4, VOCAB + 11, 4)[:, :VOCAB],
        Penalties(**settings | {"history": wide[:, :9]}),
    )


def test_forbidden_tokens_stay_so() -> None:
    penalties = random_penalties([30], 3, 5)
    logits = torch.full((3, 3), -torch.inf, device=DEVICE)
    KERNEL.apply(logits, penalties)
    assert torch.equal(logits, torch.full_like(logits, -torch.inf))


def test_other_rows_and_tokens_stay_as_they_are() -> None:
    penalties = random_penalties([30, 20], VOCAB, 6)
    logits = random_logits(4, VOCAB, 7)
    before = logits.clone()
    KERNEL.apply(logits, penalties)
    same = logits == before
    for row, history, length in zip(
        penalties.rows, penalties.history, penalties.lengths, strict=True
    ):
        same[row, history[:length].long()] = True
    assert same.all()


def test_a_table_grows_and_fits_another_vocabulary() -> None:
    kernel = PenaltyKernel(DEVICE)
    for num_rows, vocab_size in ((1, VOCAB), (5, VOCAB), (2, VOCAB), (3, VOCAB + 1)):
        penalties = random_penalties([8] * num_rows, vocab_size, num_rows)
        check(random_logits(num_rows + 2, vocab_size, num_rows), penalties, kernel)


def test_no_rows_and_no_history_are_nothing_to_do() -> None:
    logits = random_logits(4, VOCAB, 8)
    before = logits.clone()
    KERNEL.apply(logits, random_penalties([0, 0], VOCAB, 9))
    assert torch.equal(logits, before)


def test_the_sampler_penalises_and_then_draws() -> None:
    uniforms = torch.tensor([0.1, 0.4, 0.6, 0.9], device=DEVICE)
    temperature = torch.tensor([0.0, 1.0, 0.0, 2.0], device=DEVICE)
    batch = SamplingBatch(
        Draws(temperature, uniforms, True, None, None, None),
        penalties=random_penalties([30, 20], VOCAB, 12),
    )
    logits = random_logits(4, VOCAB, 13)
    ours = sample(logits.clone(), batch, TritonKernels(DEVICE, torch.float32))
    twin = sample(logits.clone(), batch, TorchKernels(DEVICE, torch.float32))
    assert torch.equal(ours.choice.token_ids, twin.choice.token_ids)
    assert ours.choice.valid.all()


@pytest.mark.gpu
def test_a_hot_token_is_counted_by_all_threads() -> None:
    penalties = random_penalties([100_000] * 32, 151_936, 10, num_ids=3)
    check(random_logits(34, 151_936, 11), penalties)
