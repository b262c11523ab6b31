"""The sampler against plain definitions, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as oracle

from nanovllm.batch import SlotStart, TextRequest
from nanovllm.kernels.kernels import Choice, Draws
from nanovllm.kernels.torch_kernels import TorchKernels, keep_top
from nanovllm.layers import sampler
from nanovllm.layers.sampler import Sampled, SamplingBatch, score_tokens
from nanovllm.runners.random_draws import uniforms
from nanovllm.runners.sampling_table import SamplingTable
from nanovllm.sampling_params import SamplingParams

VOCAB = 50
PROMPT = [3, 4, 4, 5]
OUTPUT = [7, 7, 8]
EOS = 1


CPU = torch.device("cpu")
KERNELS = TorchKernels(CPU, torch.float32)


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    return sampler.sample(logits, batch, KERNELS)


def choose(logits: Tensor, **settings: Tensor | None) -> Choice:
    """Draw a token in every row."""
    names = ("top_k", "top_p", "min_p")
    draws = Draws(any_sampled=True, **{**dict.fromkeys(names), **settings})  # type: ignore[arg-type]
    return KERNELS.choose(logits, draws)


def processed_logits(
    logits: Tensor, rows: list[SamplingParams], bad_words: tuple[tuple[int, ...], ...] = ()
) -> Tensor:
    """Run the sampler over rows with these settings and return the logits it chose from."""
    batch, logits = batch_for(rows, bad_words), logits.clone()
    sample(logits, batch)
    return logits


def batch_for(
    rows: list[SamplingParams], bad_words: tuple[tuple[int, ...], ...] = ()
) -> SamplingBatch:
    table = SamplingTable(len(rows), VOCAB, CPU)
    keys = PROMPT + OUTPUT
    for slot, params in enumerate(rows):
        start = SlotStart(slot, list(keys), len(PROMPT), params, 0, params.seed or 0)
        table.start(start, TextRequest(frozenset([EOS]), bad_words))
    token_ids = torch.zeros(len(rows), 32, dtype=torch.int32)
    token_ids[:, : len(keys)] = torch.tensor(keys)
    slots = np.arange(len(rows))
    return table.batch(slots, np.full(len(rows), len(keys)), token_ids)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def test_greedy_rows_take_the_best_token_beside_sampled_ones(logits: Tensor) -> None:
    rows = [SamplingParams(temperature=t, seed=5) for t in (0, 1, 0, 2, 0, 0.5)]
    token_ids = sample(logits.clone(), batch_for(rows)).choice.token_ids
    assert token_ids[[0, 2, 4]].tolist() == logits.argmax(-1)[[0, 2, 4]].tolist()


def test_repetition_penalty_is_transformers_per_row(logits: Tensor) -> None:
    factors = [1.0, 1.3, 0.7, 2.0, 1.0, 5.0]
    rows = [SamplingParams(temperature=0, repetition_penalty=f) for f in factors]
    ours = processed_logits(logits, rows)
    for row, factor in enumerate(factors):
        ids = torch.tensor([PROMPT + OUTPUT])
        theirs = oracle.RepetitionPenaltyLogitsProcessor(factor)(ids, logits[row : row + 1].clone())
        torch.testing.assert_close(ours[row : row + 1], theirs)


def test_presence_and_frequency_count_the_output_alone(logits: Tensor) -> None:
    rows = [SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)] * 6
    expected = logits.clone()
    expected[:, 7] -= 0.5 + 2 * 0.25
    expected[:, 8] -= 0.5 + 0.25
    torch.testing.assert_close(processed_logits(logits, rows), expected)


def test_rows_without_a_penalty_stay_as_they_are(logits: Tensor) -> None:
    rows = [SamplingParams(temperature=0), SamplingParams(temperature=0, presence_penalty=1.0)] * 3
    assert torch.equal(processed_logits(logits, rows)[::2], logits[::2])


@pytest.mark.parametrize("top_k", [1, 3, VOCAB, 0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_k_and_top_p_keep_what_transformers_keeps(
    logits: Tensor, top_k: int, top_p: float
) -> None:
    theirs = logits.clone()
    ids = torch.tensor([[0]] * 6)
    if top_k:
        theirs = oracle.TopKLogitsWarper(top_k)(ids, theirs)
    if top_p < 1:
        theirs = oracle.TopPLogitsWarper(top_p)(ids, theirs)
    ours = keep_top(logits, torch.full((6,), top_k or VOCAB), torch.full((6,), top_p))
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_top_p_counts_the_token_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.96, 4)):
        out = keep_top(logits, torch.tensor([4]), torch.tensor([top_p]))
        assert int(out.isfinite().sum()) == kept, top_p


def test_min_p_draws_only_from_likely_enough_tokens(logits: Tensor) -> None:
    min_p = 0.2
    probs = logits.softmax(-1)
    likely = probs >= min_p * probs.max(-1, keepdim=True).values
    for seed in range(50):
        rows = [SamplingParams(min_p=min_p, seed=seed)] * 6
        token_ids = sample(logits.clone(), batch_for(rows)).choice.token_ids
        assert likely.gather(1, token_ids[:, None]).all()


def test_draws_follow_the_distribution() -> None:
    """A chi-squared test of 20,000 draws at temperature 0.7 with top-k 5; 99.9 % quantile."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 0.9, 1.1]])
    count, temperature = 20_000, 0.7
    draws = uniforms(
        *(
            np.arange(count, dtype=np.uint64) if i == 0 else np.zeros(count, np.uint64)
            for i in range(3)
        )
    )
    token_ids, _ = choose(
        logits.repeat(count, 1),
        temperature=torch.full((count,), temperature),
        uniforms=torch.from_numpy(draws),
        top_k=torch.full((count,), 5),
        top_p=torch.ones(count),
    )
    observed = torch.bincount(token_ids, minlength=8).double()
    kept = (logits[0] / temperature).masked_fill(logits[0] < 0.5, -torch.inf)
    expected = kept.softmax(-1).double() * count
    assert not observed[expected == 0].any()
    chi_squared = ((observed - expected) ** 2 / expected)[expected > 0].sum().item()
    assert chi_squared < 18.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": torch.tensor([2])}, 1),
        ({"top_p": torch.tensor([0.25])}, 1),
        ({"top_k": torch.tensor([8]), "top_p": torch.tensor([0.25])}, 1),
        ({}, 7),
    ],
    ids=["top_k", "top_p", "both", "neither"],
)
def test_each_setting_counts_by_itself(settings: dict[str, Tensor], expected: int) -> None:
    token_ids, _ = choose(
        torch.zeros(1, 8), temperature=torch.ones(1), uniforms=torch.tensor([0.95]), **settings
    )
    assert token_ids.tolist() == [expected]


@given(seed=st.integers(0, 2**64 - 1), uniform=st.floats(0, 1, exclude_max=True, width=32))
@settings(max_examples=200, deadline=None)
def test_a_drawn_token_always_has_probability(seed: int, uniform: float) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(seed % 2**63)) * 20
    logits[:, ::3] = -torch.inf
    temperature, uniforms = torch.full((4,), 0.3), torch.full((4,), uniform)
    token_ids, _ = choose(logits.clone(), temperature=temperature, uniforms=uniforms)
    assert (logits.div(0.3).softmax(-1).gather(1, token_ids[:, None]) > 0).all()


def test_a_draw_depends_on_seed_sample_and_position_alone() -> None:
    one = np.ones(1, np.uint64)
    base = uniforms(one, one, one)
    assert base == uniforms(np.ones(5, np.uint64), np.ones(5, np.uint64), np.ones(5, np.uint64))[3]
    two = one + one
    others = [uniforms(two, one, one), uniforms(one, two, one), uniforms(one, one, two)]
    assert len({float(x[0]) for x in (base, *others)}) == 4


def test_logit_bias_allowed_ids_and_min_tokens(logits: Tensor) -> None:
    rows = [
        SamplingParams(temperature=0, logit_bias={9: 100.0, 10: -5.0}),
        SamplingParams(temperature=0, allowed_token_ids=[11, 12]),
        SamplingParams(temperature=0, min_tokens=len(OUTPUT) + 1, stop_token_ids=[13]),
        SamplingParams(temperature=0, min_tokens=len(OUTPUT), stop_token_ids=[13]),
    ]
    out = processed_logits(logits[:4], rows)
    assert out[0, 9] == logits[0, 9] + 100
    assert out[0, 10] == logits[0, 10] - 5
    assert out[1].isfinite().nonzero().flatten().tolist() == [11, 12]
    assert (~out[2].isfinite()).nonzero().flatten().tolist() == [EOS, 13]
    assert torch.equal(out[3], logits[3])


@pytest.mark.parametrize(
    ("word", "forbidden"),
    [((9,), True), ((8, 9), True), ((7, 8, 9), True), ((8, 8, 9), False), ((5, 7, 7, 8, 9), False)],
)
def test_bad_words_are_never_completed(
    logits: Tensor, word: tuple[int, ...], forbidden: bool
) -> None:
    """The output so far is 7, 7, 8; what the prompt holds does not count."""
    rows = [SamplingParams(temperature=0)]
    out = processed_logits(logits[:1], rows, bad_words=(word,))
    assert bool(out[0, 9].isfinite()) is not forbidden
    others = torch.arange(VOCAB) != 9
    assert torch.equal(out[0, others], logits[0, others])


def test_scores_are_of_the_raw_logits(logits: Tensor) -> None:
    rows = [SamplingParams(temperature=0.5, top_k=2, presence_penalty=1.0, logprobs=4)] * 6
    sampled = sample(logits.clone(), batch_for(rows))
    assert sampled.scores is not None
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(
        sampled.scores.logprobs[:, 0], expected.gather(1, sampled.choice.token_ids[:, None])[:, 0]
    )
    torch.testing.assert_close(sampled.scores.logprobs[:, 1:], expected.topk(4).values)


def test_scores_of_chosen_ids_are_beside_those_of_likely_ones(logits: Tensor) -> None:
    wanted = [[3, 0, VOCAB - 1], None, [7], None, list(range(VOCAB)), None]
    rows = [
        SamplingParams(temperature=0, logprob_token_ids=ids, logprobs=2 if index == 3 else None)
        for index, ids in enumerate(wanted)
    ]
    scores = sample(logits.clone(), batch_for(rows)).scores
    assert scores is not None
    expected = logits.log_softmax(-1)
    for row, ids in enumerate(wanted):
        found = (scores.token_ids[row], scores.logprobs[row])
        best = expected[row].argmax()
        assert found[0][0] == best
        others = ids if ids is not None else expected[row].topk(2).indices.tolist()
        if ids is not None or row == 3:
            assert found[0][1 : 1 + len(others)].tolist() == others
            torch.testing.assert_close(found[1][1 : 1 + len(others)], expected[row, others])


def test_a_slot_forgets_which_ids_were_scored(logits: Tensor) -> None:
    table = SamplingTable(1, VOCAB, CPU)
    for params in (SamplingParams(logprob_token_ids=[3, 5]), SamplingParams(logprobs=2)):
        table.start(SlotStart(0, list(PROMPT), len(PROMPT), params, 0, 0), TextRequest())
    slots, ends = np.zeros(1, dtype=np.int64), np.full(1, len(PROMPT))
    batch = table.batch(slots, ends, torch.zeros(1, 32, dtype=torch.int32))
    scores = sample(logits[:1].clone(), batch).scores
    assert scores is not None
    assert scores.token_ids[0, 1:].tolist() == logits[0].topk(2).indices.tolist()


def test_rank_counts_from_one() -> None:
    scores = score_tokens(torch.tensor([[0.1, 0.7, 0.2]]).log(), torch.tensor([2]), 1)
    assert scores.ranks.tolist() == [2]
    assert scores.token_ids.tolist() == [[2, 1]]


def test_nan_and_forbidden_rows_are_invalid_and_spare_the_others(logits: Tensor) -> None:
    logits[1, 3] = torch.nan
    logits[4] = -torch.inf
    rows = [SamplingParams(seed=1)] * 6
    sampled = sample(logits.clone(), batch_for(rows))
    assert sampled.choice.valid.tolist() == [True, False, True, True, False, True]
    assert (sampled.choice.token_ids >= 0).all()
    assert (sampled.choice.token_ids < VOCAB).all()
