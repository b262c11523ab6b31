"""From logits to token ids: every row of a step with its own settings, in a few tensor ops."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.kernels import Choice, Draws, Kernels, Penalties

FORBIDDEN = -1e30
"""A logit that loses against every other, and is still one; far from overflowing when divided by a
temperature."""


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences that must not be completed.

    Args:
        rows: The row each word is forbidden in, `[num_words]`.
        last_ids: The last token of each word, `[num_words]`.
        prefixes: The tokens before it, right-aligned, -1 where there is none, `[num_words, width]`.
        tails: The last tokens of each row's output, -2 before its start, `[num_words, width]`.
    """

    rows: Tensor
    last_ids: Tensor
    prefixes: Tensor
    tails: Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The settings of a step's rows; None where no row uses one.

    Args:
        draws: How to choose from the logits, in the end.
        penalties: Rows with penalties.
        bad_words: Forbidden sequences.
        allowed: Rows `[n]` and True for the ids each may generate, `[n, vocab_size]`.
        biases: Rows, ids and what is added to their logits (-inf forbids), each `[n]`.
        grammar: Rows that follow one `[n]`, True for the ids it allows each `[n, vocab_size]`.
        num_scores: Most likely tokens to score beside the sampled one; None is no scores at all.
        scored: Rows `[n]` and the ids to score there instead, `[n, any number]`.
    """

    draws: Draws
    penalties: Penalties | None = None
    bad_words: BadWords | None = None
    allowed: tuple[Tensor, Tensor] | None = None
    biases: tuple[Tensor, Tensor, Tensor] | None = None
    grammar: tuple[Tensor, Tensor] | None = None
    num_scores: int | None = None
    scored: tuple[Tensor, Tensor] | None = None


class Scores(NamedTuple):
    """Log probabilities of the actual token and of the most likely ones, or of those asked for.

    `token_ids` and `logprobs` are `[num_rows, 1 + k]`, the actual token first; `ranks` is
    `[num_rows]`, counted from 1.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor


class Sampled(NamedTuple):
    """What was chosen in each row, and the scores asked for."""

    choice: Choice
    scores: Scores | None


def sample(logits: Tensor, batch: SamplingBatch, kernels: Kernels) -> Sampled:
    """Sample one token per row.

    The order is vLLM's: scores come from the raw logits; then what is forbidden or biased, the
    penalties, the grammar, the temperature, min-p, and top-k and top-p. Of the tokens that a
    grammar allows one is chosen in any case, forbidden or not.

    Args:
        logits: float32 `[num_rows, vocab_size]`; changed in place.
        batch: Settings of the rows.
        kernels: Apply the penalties, and choose in the end.
    """
    log_probs = logits.log_softmax(-1) if batch.num_scores is not None else None
    if batch.allowed is not None:
        rows, allowed = batch.allowed
        logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
    if batch.bad_words is not None:
        forbid_bad_words(logits, batch.bad_words)
    if batch.biases is not None:
        rows, ids, values = batch.biases
        logits.index_put_((rows, ids), values, accumulate=True)
    if batch.penalties is not None:
        kernels.apply_penalties(logits, batch.penalties)
    if batch.grammar is not None:
        rows, allowed = batch.grammar
        logits[rows] = logits[rows].clamp(min=FORBIDDEN).masked_fill(~allowed, -torch.inf)
    choice = kernels.choose(logits, batch.draws)
    scores = None
    if log_probs is not None:
        scores = score_tokens(log_probs, choice.token_ids, batch.num_scores or 0, batch.scored)
    return Sampled(choice, scores)


def score_tokens(
    log_probs: Tensor,
    token_ids: Tensor,
    num_top: int,
    scored: tuple[Tensor, Tensor] | None = None,
) -> Scores:
    """Look up the given token `[num_rows]` and the `num_top` most likely ones of each row.

    In rows that are `scored` their ids come in place of the likely ones; see `SamplingBatch`.
    """
    actual = log_probs.gather(1, token_ids[:, None])
    top, top_ids = log_probs.topk(min(num_top, log_probs.shape[-1]), dim=-1)
    if scored is not None:
        rows, ids = scored
        wider = (0, max(ids.shape[1] - top.shape[1], 0))
        top, top_ids = F.pad(top, wider), F.pad(top_ids, wider)
        top[rows, : ids.shape[1]] = log_probs[rows[:, None], ids]
        top_ids[rows, : ids.shape[1]] = ids
    return Scores(
        torch.cat((token_ids[:, None], top_ids), dim=1),
        torch.cat((actual, top), dim=1),
        (log_probs > actual).sum(-1) + 1,
    )


def forbid_bad_words(logits: Tensor, words: BadWords) -> None:
    """Forbid the last token of each word whose other tokens end the output, in place."""
    complete = ((words.prefixes < 0) | (words.prefixes == words.tails)).all(1)
    ban = torch.zeros_like(words.last_ids, dtype=logits.dtype).masked_fill(complete, -torch.inf)
    logits.index_put_((words.rows, words.last_ids), ban, accumulate=True)
