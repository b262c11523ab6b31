"""Decisions: how likely each of some answers to a question is, without any text being generated.

Each answer has a label that is one token, the model is asked for the label alone, and what it makes
of the labels as the first token of its reply is the decision.
"""

import itertools
import math
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import TokenLogprobs
from nanovllm.text.tokenizer import Tokenizer

MAX_OPTIONS = 255
"""Of a choice."""
MAX_LEVELS = 10
"""Of a score, as each has a digit."""
TAIL = 64
"""Characters at the end of a prompt that may change how what follows is cut into tokens."""
LETTERS = string.ascii_uppercase


class Option(NamedTuple):
    """One of the answers to a question: what it is called, and what speaks for it."""

    name: str
    description: str | None = None


class Labelling(NamedTuple):
    """A way to call the answers to a question.

    Args:
        labels: In this order; those are taken that are one token.
        request: How the model is asked for one.
    """

    labels: tuple[str, ...]
    request: str


BY_LETTER = Labelling(
    (*LETTERS, *("".join(pair) for pair in itertools.product(LETTERS, repeat=2))),
    "Reply with the label of the answer that fits best, and with nothing else.",
)
BY_DIGIT = Labelling(
    tuple(string.digits[:MAX_LEVELS]),
    "Reply with the number of the level that fits best, and with nothing else.",
)
YES_OR_NO = Labelling(("yes", "no"), "Reply with yes or no, and with nothing else.")


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the answers that it may have.

    Args:
        instructions: What is asked.
        options: The answers.
        labelling: What they are called, if the tokenizer has a token for each: else letters.
        param: The field of a client's request that has it, for errors.
    """

    instructions: str
    options: Sequence[Option]
    labelling: Labelling = BY_LETTER
    param: str = "questions"

    @classmethod
    def whether(
        cls, instructions: str, param: str, yes: str | None = None, no: str | None = None
    ) -> "Question":
        """One to be answered by yes or no, and what speaks for either."""
        return cls(instructions, [Option("yes", yes), Option("no", no)], YES_OR_NO, param)

    def text(self, labelling: Labelling, labels: Sequence[str]) -> str:
        """The question as the model reads it, by the labels of its options."""
        lines = [
            ": ".join(filter(None, [label, _described(option, label)]))
            for label, option in zip(labels, self.options, strict=True)
        ]
        return "\n".join(filter(None, [self.instructions, *lines, labelling.request]))


def _described(option: Option, label: str) -> str:
    name = "" if option.name == label else option.name
    return " - ".join(filter(None, [name, option.description]))


def _by_name(question: Question) -> list[Labelling]:
    """Answers such as A and B, or 1 to 5, are their own labels: others would contradict them."""
    names = tuple(option.name for option in question.options)
    are_labels = all(len(name) == 1 for name in names) and len(set(names)) == len(names)
    return [Labelling(names, BY_LETTER.request)] if are_labels else []


class Labelled(NamedTuple):
    """A question as the model reads it, and for each of its options the tokens of the label."""

    text: str
    token_ids: list[list[int]]


class Labels:
    """The tokens that labels are where a reply begins, with a space before them or without.

    Args:
        tokenizer: The model's.
        prompt: Ends as every prompt does that is replied to.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._tokenizer, self._tail = tokenizer, prompt[-TAIL:]
        self._tail_ids = tokenizer.encode(self._tail, False)
        self._found: dict[Labelling, dict[str, list[int]]] = {}

    def of(self, question: Question) -> Labelled:
        """Label the options of a question.

        Raises:
            InvalidRequestError: There are not so many labels.
        """
        num_options = len(question.options)
        for labelling in (*_by_name(question), question.labelling, BY_LETTER):
            if labelling not in self._found:
                self._found[labelling] = dict(self._tokens(labelling.labels))
            found = self._found[labelling]
            if len(found) >= num_options:
                labels = list(found)[:num_options]
                return Labelled(question.text(labelling, labels), [found[x] for x in labels])
        raise InvalidRequestError(
            f"the question has {num_options} answers, and this model's tokenizer has single tokens "
            f"for {len(found)} labels: ask with fewer",
            question.param,
        )

    def _tokens(self, labels: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
        seen: set[int] = set()
        for label in labels:
            spellings = (self._token(label), self._token(f" {label}"))
            token_ids = {i for i in spellings if i is not None} - seen
            if token_ids:
                seen |= token_ids
                yield label, sorted(token_ids)

    def _token(self, label: str) -> int | None:
        *before, last = self._tokenizer.encode(self._tail + label, False)
        return last if before == self._tail_ids else None


class Decision(NamedTuple):
    """What a model makes of a question.

    Args:
        probabilities: Of each option among all of them.
        label_mass: Of all options' labels among all tokens: little if the model would rather have
            said something else.
        argmax_is_label: Whether the likeliest token of all is one of them.
    """

    probabilities: list[float]
    label_mass: float
    argmax_is_label: bool

    @classmethod
    def of(
        cls, logprobs: TokenLogprobs, labels: Sequence[Sequence[int]], likeliest: int
    ) -> "Decision":
        """Decide by the log probabilities of the labels' tokens, and the likeliest of all."""
        shares = [sum(math.exp(logprobs[i].logprob) for i in token_ids) for token_ids in labels]
        mass = math.fsum(shares)
        # Of labels so unlikely that their shares are zero none is likelier than the others.
        probabilities = [share / mass if mass else 1 / len(shares) for share in shares]
        is_label = any(likeliest in token_ids for token_ids in labels)
        return cls(probabilities, min(mass, 1.0), is_label)

    @property
    def best(self) -> int:
        """The likeliest option's index."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def confidence(self) -> float:
        """The probability of its label among all tokens."""
        return self.probabilities[self.best] * self.label_mass

    @property
    def score(self) -> float:
        """The level that is to be expected, counted from 0."""
        return math.fsum(level * share for level, share in enumerate(self.probabilities))
