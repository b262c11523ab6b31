"""Outputs that follow a grammar: one matcher a sequence, and the tokens that each allows next."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache, lru_cache
from itertools import takewhile
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from nanovllm.batch import SlotStart
from nanovllm.kernels.attention_backend import to_device
from nanovllm.kernels.cpu.threads import num_usable_cores
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.grammar_compiler import GrammarCompiler, Vocabulary

logger = logging.getLogger(__name__)

MAX_DIGITS = 40
"""Digits of a JSON number without a bound: as many as 2**128 has, and twice those of a double."""

TIME_A_TOKEN = 0.02
"""Seconds of a core, for all sequences that follow a grammar together; most take a thousandth of
that. llguidance's own limits count items, and in an ambiguous grammar a token within them may take
a second."""
LEAST_TIME_A_TOKEN = 0.001
"""What is left of that to each sequence, however many there are."""
MAX_TIME_OVER = 2.0
"""Seconds that the sequences of a grammar may take beyond that before they end."""
FORGIVEN_SHARE = 0.05
"""Of each second that passes, what is taken off these: after a minute a grammar may try again."""
NUM_ACCOUNTS = 64
"""Grammars whose time is kept, also from one sequence to the next."""

PARALLEL_ROWS = 16
"""Rows from which threads share the masks: one takes 2 to 100 us, waking the threads 300."""
PARALLEL_CORES = 4
"""Cores from which there is one to spare for that."""

Bits = npt.NDArray[np.int32]
"""One for each token that is allowed, the first in the lowest bit."""


class Digits:
    """The tokens that are digits, to end numbers in which a model has lost itself.

    JSON bounds no number, and a model that sees nothing but its digits may go on with them to the
    end of its context.

    Args:
        vocabulary: The model's tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = vocabulary.tokens
        texts = (tokens.decode_bytes([token_id]) for token_id in range(tokens.vocab_size))
        self.lengths = {index: len(text) for index, text in enumerate(texts) if text.isdigit()}
        marks = np.zeros(-(-tokens.vocab_size // 32) * 32, dtype=np.uint8)
        marks[list(self.lengths)] = 1
        self._bits = np.packbits(marks, bitorder="little").view(np.int32)
        self._letter = tokens.greedy_tokenize("a")[0]

    def forbid(self, allowed: Bits) -> None:
        """Take digits away, in place, unless this is a text or there is nothing else."""
        in_text = allowed[self._letter // 32] >> (self._letter % 32) & 1
        others = allowed & ~self._bits[: len(allowed)]
        if not in_text and others.any():
            allowed[:] = others


class Account:
    """The time that a grammar takes from everyone's steps, in all its sequences.

    Args:
        is_limited: Whether there is a limit to it.
        clock: Tells the seconds that pass, by which a debt shrinks.
    """

    def __init__(
        self, is_limited: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_limited, self._clock = is_limited, clock
        self._debt, self._charged = 0.0, clock()

    @property
    def is_overdrawn(self) -> bool:
        return self._is_limited and self._time_over() > MAX_TIME_OVER

    def charge(self, seconds: float, allowance: float = 0.0) -> None:
        """Count time of this thread, but for what is allowed."""
        self._debt = max(0.0, self._time_over() + seconds - allowance)
        self._charged = self._clock()

    def _time_over(self) -> float:
        return max(0.0, self._debt - FORGIVEN_SHARE * (self._clock() - self._charged))


class SlotGrammar:
    """Where a running sequence is in its grammar.

    Args:
        matcher: At the start of the output; belongs to this object.
        vocabulary: The model's tokens.
        token_ids: The output so far, of a sequence that is resumed.
        forces: Whether tokens that are certain need not be sampled.
        digits: Ends numbers; None where the grammar has none of JSON.
        account: The grammar's; None is one of its own.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        token_ids: list[int],
        forces: bool,
        digits: Digits | None = None,
        account: Account | None = None,
    ) -> None:
        self.matcher = matcher
        self.vocabulary = vocabulary
        self.account = account or Account()
        self._forces = forces
        self._digits = digits
        self._num_digits = 0
        _followed.add(self)
        matcher.consume_tokens(token_ids)
        self._count_digits(token_ids)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self.matcher.is_stopped()

    def take(self, token_id: int) -> list[int] | None:
        """Go on by a token.

        Returns:
            The tokens that can only be the next ones, which it has gone on by, too; None if it is
            lost: the grammar has reached a limit.
        """
        begun = time.thread_time()
        forced = self._advance(token_id)
        allowance = max(TIME_A_TOKEN / len(_followed), LEAST_TIME_A_TOKEN)
        self.account.charge(time.thread_time() - begun, allowance)
        if forced is None:
            logger.warning("a sequence ends: %s", self.matcher.get_error().split("\n", 1)[0])
        elif self.account.is_overdrawn:
            logger.warning("a sequence ends: its grammar takes too much time")
            return None
        return forced

    def fill(self, bits: Bits, row: int) -> None:
        """Write into a row which tokens may come next."""
        begun = time.thread_time()
        fill_next_token_bitmask(self.matcher, bits, row)
        self.account.charge(time.thread_time() - begun)

    def restrict(self, allowed: Bits) -> None:
        """Take away, in place, what the grammar allows and would lead nowhere."""
        if self._digits is not None and self._num_digits >= MAX_DIGITS:
            self._digits.forbid(allowed)

    def _advance(self, token_id: int) -> list[int] | None:
        if not self.matcher.consume_token(token_id):
            return None
        certain = self.matcher.compute_ff_tokens() if self._forces and not self.ended else []
        # Some tokenizers have tokens that their model has not.
        forced = list(takewhile(self.vocabulary.vocab_size.__gt__, certain))
        self._count_digits([token_id, *forced])
        return forced if self.matcher.consume_tokens(forced) else None

    def _count_digits(self, token_ids: list[int]) -> None:
        """Keep the length of the number that the output ends in."""
        if self._digits is not None:
            for token_id in token_ids:
                length = self._digits.lengths.get(token_id)
                self._num_digits = 0 if length is None else self._num_digits + length


_followed: WeakSet[SlotGrammar] = WeakSet()
"""All that sequences follow now, of any grammar."""


def start_grammar(
    start: SlotStart,
    grammar: str,
    compiled: Future[LLMatcher] | None,
    compiler: GrammarCompiler,
    is_timed: bool = True,
) -> SlotGrammar:
    """Begin a grammar for a sequence that takes a slot.

    Args:
        start: The sequence.
        grammar: Its grammar.
        compiled: The same compiled; None if that is still to do.
        compiler: Does it.
        is_timed: Whether the sequence ends once its grammar has taken too much time.

    Raises:
        ValueError: It cannot be compiled; whoever added the sequence has made sure that it can.
    """
    matcher = compiler.compile(grammar) if compiled is None else compiled.result()
    generated = [key for key in start.keys[start.num_prompt_keys :] if isinstance(key, int)]
    digits = _digits(compiler.vocabulary) if "%json" in grammar else None
    return SlotGrammar(
        matcher.deep_copy(),
        compiler.vocabulary,
        generated,
        may_force(start.sampling_params),
        digits,
        _account(grammar) if is_timed else Account(is_limited=False),
    )


def may_force(params: SamplingParams) -> bool:
    """Whether tokens may be taken that were never sampled: nothing looks at each of them."""
    looks = (params.bad_words, params.logit_bias, params.allowed_token_ids, params.stop_token_ids)
    return params.num_logprobs is None and not any(looks)


def allowed_tokens(
    grammars: Sequence[SlotGrammar | None], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which tokens may come next.

    Args:
        grammars: Of each row of a step, at least one of which has one.
        vocab_size: Width of the logits.
        device: Where they are.

    Returns:
        The rows that have a grammar, `[n]`, and True for the ids each allows, `[n, vocab_size]`.
    """
    rows = [row for row, grammar in enumerate(grammars) if grammar is not None]
    followed = [grammar for grammar in grammars if grammar is not None]
    num_tokens = max(vocab_size, followed[0].vocabulary.tokens.vocab_size)
    bits = np.zeros((len(rows), -(-num_tokens // 32)), dtype=np.int32)
    if len(rows) >= PARALLEL_ROWS and num_usable_cores() >= PARALLEL_CORES:
        begun = time.monotonic()
        fill_next_token_bitmask_par(
            _executor(), [(grammar.matcher, row) for row, grammar in enumerate(followed)], bits
        )
        share = (time.monotonic() - begun) / len(followed)
        for grammar in followed:
            grammar.account.charge(share)
    else:
        for row, grammar in enumerate(followed):
            grammar.fill(bits, row)
    for mask, grammar in zip(bits, followed, strict=True):
        grammar.restrict(mask)
    # A byte stands for the eight ids that it has the bits of, the lowest first.
    allowed = _bits_of_bytes(device)[to_device(bits.view(np.uint8), device).long()]
    return to_device(np.array(rows), device), allowed.flatten(1)[:, :vocab_size]


@lru_cache(maxsize=1)
def _digits(vocabulary: Vocabulary) -> Digits:
    return Digits(vocabulary)


@lru_cache(maxsize=NUM_ACCOUNTS)
def _account(grammar: str) -> Account:  # noqa: ARG001, it is what the account is found by
    return Account()


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """The bits of every byte, `[256, 8]`."""
    values = np.arange(256, dtype=np.uint8)[:, None]
    return to_device(np.unpackbits(values, axis=1, bitorder="little").astype(np.bool_), device)
