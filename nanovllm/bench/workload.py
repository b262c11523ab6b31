"""The requests of a load test: drawn at random, or read from a file."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.errors import InvalidRequestError

WORDS = (
    *("the", "old", "king", "had", "three", "sons", "and", "one", "day", "he", "said", "to"),
    *("them", "go", "out", "into", "world", "see", "who", "of", "you", "can", "find", "a"),
    *("thing", "that", "no", "man", "ever", "saw", "before", "so", "they", "went", "over"),
)
"""Each is one token, or little more, to most tokenizers of English."""


class Range(NamedTuple):
    """Bounds of an evenly distributed length, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, name: str, least: int = 1) -> "Range":
        """Read `128` or `100:1024`.

        Raises:
            InvalidRequestError: It is neither, or out of order; the message names `name`.
        """
        low, _, high = text.partition(":")
        try:
            bounds = cls(int(low), int(high or low))
        except ValueError as e:
            raise InvalidRequestError(f"{name} must be N or LOW:HIGH, got {text!r}", name) from e
        if not least <= bounds.low <= bounds.high:
            raise InvalidRequestError(f"{name} must be at least {least} and rise: {text!r}", name)
        return bounds


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request asks for.

    Args:
        content: Token ids or text, or the messages of a conversation.
        max_tokens: Tokens to generate at most; None leaves it to the server.
    """

    content: str | list[int] | list[dict[str, Any]]
    max_tokens: int | None

    def body(self, is_chat: bool) -> dict[str, Any]:
        """The fields of the request that say this."""
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        if not is_chat:
            return {"prompt": self.content, **limit}
        is_text = isinstance(self.content, str)
        messages = [{"role": "user", "content": self.content}] if is_text else self.content
        return {"messages": messages, **limit}


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Draws prompts of random token ids or, for a chat, of as many random words.

    Args:
        input_len: Tokens of a prompt, besides the prefix.
        output_len: Tokens to generate.
        prefix_len: Tokens that a prompt begins with and shares with others.
        num_prefixes: How many such beginnings there are; each prompt has one at random.
        vocab_size: Ids are below this.
        is_text: Whether to draw words.
    """

    input_len: Range
    output_len: Range
    prefix_len: int
    num_prefixes: int
    vocab_size: int
    is_text: bool

    def draw(self, seed: str) -> Iterator[Prompt]:
        """Prompts without end, the same ones for the same seed."""
        rng = random.Random(seed)
        prefixes = [self._tokens(rng, self.prefix_len) for _ in range(self.num_prefixes)]
        while True:
            tokens = rng.choice(prefixes) + self._tokens(rng, rng.randint(*self.input_len))
            content = " ".join(WORDS[i] for i in tokens) if self.is_text else tokens
            yield Prompt(content, rng.randint(*self.output_len))

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        size = len(WORDS) if self.is_text else self.vocab_size
        return [rng.randrange(size) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class ListedPrompts:
    """Prompts of a file in random order, over and over if there are too few."""

    prompts: Sequence[Prompt]

    def draw(self, seed: str) -> Iterator[Prompt]:
        """Prompts without end, the same ones for the same seed."""
        return cycle(random.Random(seed).sample(self.prompts, len(self.prompts)))


def read_prompts(path: Path, is_chat: bool, output_len: Range | None) -> ListedPrompts:
    """Read JSON lines with a `prompt` (text or token ids) or, for a chat, `messages`.

    Args:
        path: The file.
        is_chat: Whether the prompts are for the chat endpoint.
        output_len: Tokens to generate where a line has no `max_tokens`; None leaves it open.

    Raises:
        InvalidRequestError: A line is not such an object; the message has its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InvalidRequestError(f"{path} is not UTF-8 text: {e}", "prompts") from e
    rng = random.Random(0)
    names = ("messages", "prompt") if is_chat else ("prompt",)
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as e:
            raise InvalidRequestError(f"{path}, line {number} is not JSON: {e}", "prompts") from e
        given = fields if isinstance(fields, dict) else {}
        content = next((given[name] for name in names if given.get(name)), None)
        if content is None:
            expected = " or ".join(repr(name) for name in names)
            raise InvalidRequestError(f"{path}, line {number} has no {expected}", "prompts")
        limit = given.get("max_tokens", given.get("output_tokens"))
        if limit is None and output_len is not None:
            limit = rng.randint(*output_len)
        prompts.append(Prompt(content, limit))
    if not prompts:
        raise InvalidRequestError(f"{path} has no prompts", "prompts")
    return ListedPrompts(prompts)


def first(prompts: RandomPrompts | ListedPrompts, count: int, seed: str) -> list[Prompt]:
    """The first `count` prompts of a seed."""
    return list(islice(prompts.draw(seed), count))
