"""Log probabilities of the tokens of a message, as the dialects of conversations have them."""

from collections.abc import Sequence
from functools import lru_cache

from typing_extensions import TypedDict

from nanovllm.outputs import TokenLogprobs
from nanovllm.text.tokenizer import REPLACEMENT, Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's choice."""


class TopLogprob(TypedDict):
    """A token that was likely at a position; `bytes` are what it adds to the UTF-8 text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The token that was taken, and the likeliest ones there."""

    top_logprobs: list[TopLogprob]


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


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs],
    num_top: int | None,
    names: TokenNames,
) -> list[ChatTokenLogprob]:
    """Tell of each position the token that was taken and others.

    Args:
        token_ids: The tokens of a message.
        positions: Their log probabilities.
        num_top: How many of the likeliest tokens there to tell of; None is all that were looked at.
        names: What tokens are called.
    """

    def describe(token_id: int, position: TokenLogprobs) -> TopLogprob:
        return {
            "token": names.name(token_id),
            "logprob": max(position[token_id].logprob, LOWEST),
            "bytes": names.utf8(token_id),
        }

    def others(position: TokenLogprobs) -> list[int]:
        if num_top is None:
            return list(position)
        ranked = sorted((p.rank or 0, token_id) for token_id, p in position.items())
        return [token_id for _, token_id in ranked[:num_top]]

    return [
        {
            **describe(token_id, position),
            "top_logprobs": [describe(other, position) for other in others(position)],
        }
        for token_id, position in zip(token_ids, positions, strict=True)
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
