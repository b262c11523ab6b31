"""Log probabilities in the shapes of completions and, as vLLM has them, prompts."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from nanovllm.outputs import TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.chat.logprobs import LOWEST, TokenNames
from nanovllm.server.openai.responses import (
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from nanovllm.text.tokenizer import Detokenizer, Tokenizer

AT_ONCE = 500
"""Positions of a prompt that are written down before others get their turn: some milliseconds."""


class OutputOffsets:
    """Where the tokens of a completion begin in its text, each asked for in turn.

    A token begins where what those before it have decoded to ends, so the parts of a character all
    begin where it does.

    Args:
        tokenizer: The model's; without one there is no text.
        prompt_token_ids: What the completion goes on from.
        params: Which tokens are left out of its text.
        start: Characters before the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        start: int,
    ) -> None:
        self._end = start
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(
                tokenizer,
                prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
        )

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._end
        if self._detokenizer is not None:
            self._end += len(self._detokenizer.push(token_id))
        return offset


def prompt_offsets(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], text: str
) -> Iterator[int]:
    """Where the tokens of a prompt begin in its text.

    Args:
        tokenizer: The model's.
        token_ids: All of the prompt.
        text: What it reads as; the special tokens that the tokenizer has added are not in it.
    """
    if tokenizer is None:
        yield from [0] * len(token_ids)
        return
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    end = 0
    for token_id in token_ids:
        yield end
        is_special = token_id in tokenizer.special_ids
        if is_special and not text.startswith(tokenizer.added_tokens[token_id].content, end):
            continue
        end = min(end + len(detokenizer.push(token_id)), len(text))


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs | None],
    offsets: Iterable[int],
    names: TokenNames,
) -> CompletionLogprobs:
    """The shape of `/v1/completions`.

    Args:
        token_ids: The tokens of a text.
        positions: Their log probabilities; the first token of a prompt has none.
        offsets: Where they begin in it.
        names: What tokens are called.
    """
    result: CompletionLogprobs = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": list(offsets),
    }
    for token_id, position in zip(token_ids, positions, strict=True):
        result["tokens"].append(names.name(token_id))
        if position is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        result["token_logprobs"].append(max(position[token_id].logprob, LOWEST))
        top: dict[str, float] = {}
        for other_id, other in position.items():
            # Tokens that are parts of characters may read alike; the likeliest one counts.
            name = names.name(other_id)
            top[name] = max(other.logprob, LOWEST, top.get(name, LOWEST))
        result["top_logprobs"].append(top)
    return result


async def echoed_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs | None],
    offsets: Iterable[int],
    names: TokenNames,
) -> CompletionLogprobs:
    """The same of a prompt, which may be long; see `completion_logprobs`."""
    rest, parts = iter(offsets), []
    for start in range(0, len(token_ids), AT_ONCE):
        there, here = slice(start, start + AT_ONCE), islice(rest, AT_ONCE)
        parts.append(completion_logprobs(token_ids[there], positions[there], here, names))
        await asyncio.sleep(0)
    return joined(parts)


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Those of texts that follow one another."""
    return {
        "tokens": [token for part in parts for token in part["tokens"]],
        "token_logprobs": [value for part in parts for value in part["token_logprobs"]],
        "top_logprobs": [top for part in parts for top in part["top_logprobs"]],
        "text_offset": [offset for part in parts for offset in part["text_offset"]],
    }


async def prompt_logprobs(
    positions: Sequence[TokenLogprobs | None] | None,
) -> PromptLogprobs | None:
    """Log probabilities of a prompt, in vLLM's shape."""
    if positions is None:
        return None
    told: PromptLogprobs = []
    for start in range(0, len(positions), AT_ONCE):
        told += map(_alternatives, positions[start : start + AT_ONCE])
        await asyncio.sleep(0)
    return told


def _alternatives(position: TokenLogprobs | None) -> dict[int, PromptLogprob] | None:
    if position is None:
        return None
    return {
        token_id: {
            "logprob": max(logprob.logprob, LOWEST),
            "rank": logprob.rank,
            "decoded_token": logprob.decoded_token,
        }
        for token_id, logprob in position.items()
    }
