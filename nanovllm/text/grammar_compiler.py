"""Forms made sure of and made ready: llguidance's matchers, for one model's vocabulary.

The library is imported with the first form: a machine that has none does without it.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LIMITS: dict[str, Any] = {
    "max_items_in_row": 20_000,  # an object of 5000 optional properties
    "max_lexer_states": 100_000,  # 1 to 2 kB each
    "verbose_errors": False,
}
"""What a grammar may take; the others are at their defaults."""
MAX_COMPILED = 64
"""Matchers kept; most take less than a megabyte."""
MAX_COMPILED_CHARS = 2 * 2**20
"""Characters of their grammars, each of which takes some 70 bytes."""
TRIED_AT_ONCE = 64
"""Tokens."""
MAX_CHECKED_CHARS = 16 * 2**20
"""Characters of the grammars that are known to be sound."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A model's tokens, as llguidance needs them.

    Args:
        tokens: All of them; a special one is none of its characters, and named by its id alone.
        special_tokens: Ids of the special tokens by their text.
        vocab_size: How many of the tokens, the first ones, have a row in the model's embedding.
    """

    tokens: "LLTokenizer"
    special_tokens: Mapping[str, int]
    vocab_size: int

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> "Vocabulary":
        """Take a tokenizer apart; takes a second where it has 150,000 tokens.

        Args:
            tokenizer: The model's.
            vocab_size: Rows of the model's embedding.
            eos_token_ids: Ids that end a text, each of which ends a form too.

        Raises:
            InvalidRequestError: The tokenizer is of a kind whose tokens have no bytes.
        """
        from llguidance import LLTokenizer

        special_tokens = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens.items()
            if token.special and token_id < vocab_size
        }
        own_ids = tokenizer.backend.get_vocab(with_added_tokens=False).values()
        num_tokens = max(vocab_size, max(own_ids, default=0) + 1)
        try:
            ends = list(eos_token_ids)
            if not ends:  # by their names it may know one
                by_name = LLTokenizer(_json_of(tokenizer, {}, vocab_size), n_vocab=num_tokens)
                ends = [by_name.eos_token]
            tokens = LLTokenizer(
                _json_of(tokenizer, special_tokens, vocab_size), n_vocab=num_tokens, eos_token=ends
            )
        except ValueError as e:
            raise InvalidRequestError(
                f"structured outputs do not go with this model's tokenizer: {e}",
                "structured_outputs",
            ) from e
        return cls(tokens, special_tokens, vocab_size)


def _json_of(tokenizer: Tokenizer, special_tokens: Mapping[str, int], vocab_size: int) -> str:
    """A tokenizer's JSON with the tokens its model has, in which no text is a special one.

    By their own names, llguidance would take special tokens for what a form has in its texts.
    """
    # Unicode has promised that these characters will never be any.
    names = {text: f"\ufdd0{token_id}\ufdd1" for text, token_id in special_tokens.items()}
    parts = json.loads(tokenizer.backend.to_str())
    parts["added_tokens"] = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in parts["added_tokens"]
        if token["id"] < vocab_size
    ]
    model = parts["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(parts)


class GrammarCompiler:
    """Checks and compiles forms; any thread may call it.

    Args:
        make_vocabulary: Called once, when the first form comes.
    """

    def __init__(self, make_vocabulary: Callable[[], Vocabulary]) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._checked: OrderedDict[str, int] = OrderedDict()
        self._num_checked_chars = 0

    @property
    def vocabulary(self) -> Vocabulary:
        with self._making:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary

    def check(self, params: StructuredOutputsParams, max_tokens: int) -> str:
        """See that outputs can have a form.

        Args:
            params: The form.
            max_tokens: Length that an output has at most.

        Returns:
            The form as a grammar for `compile`.

        Raises:
            InvalidRequestError: It is not well-formed, cannot be enforced, is too complex, or no
                output could have it; `param` is the field to blame.
        """
        from nanovllm.text.grammars import lark

        kind = params.kind
        grammar = lark(params, self.vocabulary.special_tokens)
        with self._lock:
            num_forced = self._checked.get(grammar)
        if num_forced is None:
            try:
                num_forced = _try_out(self.compile(grammar))
            except ValueError as e:
                raise InvalidRequestError(f"{kind} cannot be enforced: {e}", kind) from e
            self._remember(grammar, num_forced)
        if num_forced >= max_tokens:
            raise InvalidRequestError(
                f"{kind} begins with {num_forced} tokens that are always the same, and an output "
                f"of this model has at most {max_tokens}: it would never end",
                kind,
            )
        return grammar

    def compile(self, grammar: str) -> "LLMatcher":
        """Make the matcher of a grammar, at its start; use a `deep_copy` of it.

        Raises:
            ValueError: It cannot be compiled; the message says why.
        """
        from llguidance import LLMatcher, LLParserLimits

        matcher = self.compiled(grammar)
        if matcher is not None:
            return matcher
        matcher = LLMatcher(
            self.vocabulary.tokens,
            LLMatcher.grammar_from_lark(grammar),
            log_level=0,
            limits=LLParserLimits(**LIMITS),
        )
        if matcher.is_error():
            raise ValueError(_reason(matcher.get_error()))
        with self._lock:
            self._compiled[grammar] = matcher
            while (
                len(self._compiled) > MAX_COMPILED
                or sum(map(len, self._compiled)) > MAX_COMPILED_CHARS
            ):
                self._compiled.popitem(last=False)
        return matcher

    def compiled(self, grammar: str) -> "LLMatcher | None":
        """What `compile` has made of a grammar, if it is still there."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
            return matcher

    def _remember(self, grammar: str, num_forced: int) -> None:
        """Keep what is known of a grammar, in place of what has not been asked for the longest."""
        with self._lock:
            if grammar not in self._checked:
                self._num_checked_chars += len(grammar)
            self._checked[grammar] = num_forced
            while self._num_checked_chars > MAX_CHECKED_CHARS:
                self._num_checked_chars -= len(self._checked.popitem(last=False)[0])


def _try_out(matcher: "LLMatcher") -> int:
    """Begin with a matcher; returns how many tokens are certain.

    A grammar may compile and have no text at all, or reach a limit with the first token.

    Raises:
        ValueError: One of these is so.
    """
    matcher = matcher.deep_copy()
    allowed = matcher.compute_bitmask()
    forced = matcher.compute_ff_tokens()
    if not matcher.is_error() and any(allowed):
        # The interpreter's lock is let go only between calls, and 30,000 tokens take 2.5 s.
        for begin in range(0, len(forced), TRIED_AT_ONCE):
            matcher.consume_tokens(forced[begin : begin + TRIED_AT_ONCE])
    if matcher.is_error():
        error = matcher.get_error()
        never = error.startswith("NoExtension")
        raise ValueError("there is no text that it allows" if never else _reason(error))
    return len(forced)


def _reason(error: str) -> str:
    """What an error of llguidance says, without the excerpt of the grammar that goes with it."""
    lines = error.splitlines()
    first = re.sub(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?", "", lines[0])
    more = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return " ".join([first.rstrip(": "), *more])[:500]
