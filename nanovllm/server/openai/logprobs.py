"""Log probabilities in OpenAI's two shapes, and vLLM's for prompts."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from nanovllm.outputs import TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.openai.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TopLogprob,
)
from nanovllm.text.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's choice."""


class TokenNames:
    """What tokens are called in answers.

    Args:
        tokenizer: The model's; without one, tokens are called by their ids.
        as_ids: Whether they are called "token_id:123" anyway.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def name(self, token_id: int) -> str:
        """The token's text in the middle of a text."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def utf8(self, token_id: int) -> list[int]:
        """The bytes that the token adds, which may be part of a character."""
        if self._tokenizer is None:
            return []
        text = self._tokenizer.token_text(token_id)
        if REPLACEMENT in text:
            return _bytes_of_piece(self._tokenizer.backend.id_to_token(token_id), text)
        return list(text.encode("utf-8"))


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


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[TokenLogprobs], num_top: int, names: TokenNames
) -> ChatLogprobs:
    """The shape of `/v1/chat/completions`, with the `num_top` likeliest tokens of each position."""

    def describe(token_id: int, position: TokenLogprobs) -> TopLogprob:
        return {
            "token": names.name(token_id),
            "logprob": max(position[token_id].logprob, LOWEST),
            "bytes": names.utf8(token_id),
        }

    def likeliest(position: TokenLogprobs) -> list[int]:
        ranked = sorted((p.rank or 0, token_id) for token_id, p in position.items())
        return [token_id for _, token_id in ranked[:num_top]]

    return {
        "content": [
            {
                **describe(token_id, position),
                "top_logprobs": [describe(other, position) for other in likeliest(position)],
            }
            for token_id, position in zip(token_ids, positions, strict=True)
        ],
        "refusal": None,
    }


def prompt_logprobs(positions: Sequence[TokenLogprobs | None] | None) -> PromptLogprobs | None:
    """VLLM's shape for prompts."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            token_id: {
                "logprob": max(logprob.logprob, LOWEST),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in position.items()
        }
        for position in positions
    ]


def _bytes_of_piece(piece: str | None, text: str) -> list[int]:
    """The bytes of a vocabulary entry that is not whole characters.

    It is spelled either as "<0xE2>" or, byte by byte, in the printable characters of GPT-2's
    `bytes_to_unicode`.
    """
    if piece is not None and len(piece) == 6 and piece.startswith("<0x"):
        return [int(piece[3:5], 16)]
    alphabet = _byte_alphabet()
    if piece is None or not all(character in alphabet for character in piece):
        return list(text.encode("utf-8"))
    return [alphabet[character] for character in piece]


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 is itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
