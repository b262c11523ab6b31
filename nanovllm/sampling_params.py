"""What a user may ask of a generation. Fields, names and defaults are vLLM's."""

from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.validation import conform

GREEDY_EPSILON = 1e-5
MAX_LOGPROBS = 20
MAX_LOGPROB_IDS = 1024
"""Most token ids that `logprob_token_ids` may have."""
MAX_SEED = 2**64


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output must have; exactly one field is set.

    Args:
        json: A JSON schema, as a mapping or as its JSON text.
        regex: A regular expression that matches the whole output.
        choice: Texts, of which the output is one.
        grammar: A context-free grammar: Lark with the rule `start`, or GBNF with the rule `root`.
        json_object: True for any JSON object.
        structural_tag: Free text with tags in it whose inside has a form:
            `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, or its JSON text.

    Raises:
        InvalidRequestError: Not exactly one field is set, or it is of another type.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        conform(self)
        self.json_object = self.json_object or None
        names = [each.name for each in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs takes exactly one of {', '.join(names)}, got "
                f"{' and '.join(given) or 'none'}",
                "structured_outputs",
            )
        if self.choice == []:
            raise InvalidRequestError("choice must have at least one text", "choice")

    @property
    def kind(self) -> str:
        """The field that is set."""
        return next(each.name for each in fields(self) if getattr(self, each.name) is not None)


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How to sample the outputs of one request.

    Args:
        n: Completions of the same prompt.
        presence_penalty: Subtracted from the logit of every token generated so far, in [-2, 2].
        frequency_penalty: Subtracted once for each time a token was generated, in [-2, 2].
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt
            or the output (Keskar et al. 2019, section 4.1), above 0; 1 is off.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keeps the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: Keeps this many tokens; 0 or -1 keeps all.
        min_p: Keeps tokens with at least this share of the top probability, in [0, 1].
        seed: Makes the draw reproducible; without one, or with -1, each request gets its own.
        stop: Strings that end the text where they begin.
        stop_token_ids: Token ids that end the text, besides the model's end-of-text ids.
        ignore_eos: Whether to go on after the model's end-of-text ids.
        max_tokens: Tokens to generate at most; None is what is left of the context.
        min_tokens: Tokens to generate before anything may end the text.
        logprobs: Alternatives whose log probability is returned with each token; 0 is only the
            token's own. At most 20.
        prompt_logprobs: The same for each token of the prompt.
        logprob_token_ids: Return the log probabilities of these tokens, no two the same and at most
            1024, instead of the likeliest ones.
        detokenize: Whether to produce text.
        skip_special_tokens: Whether special tokens are left out of the text.
        spaces_between_special_tokens: Whether special tokens in the text are set apart by spaces.
        include_stop_str_in_output: Whether the text keeps the stop string that ended it.
        truncate_prompt_tokens: Keep only this many last tokens of the prompt; -1 is as many as
            leave room for the output.
        bad_words: Words that are never generated.
        logit_bias: Added to the logits of these token ids.
        allowed_token_ids: The only ids that may be generated.
        structured_outputs: The form that the output must have. Where `bad_words`, `logit_bias`,
            `allowed_token_ids`, `min_tokens` or `ignore_eos` leave no token that goes with it, the
            form has its way.

    Raises:
        InvalidRequestError: A field is outside its range; the message says which and what is right.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    bad_words: str | list[str] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    stop_strings: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        conform(self)
        self.seed = None if self.seed == -1 else self.seed
        if isinstance(self.bad_words, str):
            self.bad_words = [self.bad_words]
        self.stop_strings = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self._check_numbers()
        self._check_lists()
        if self.min_tokens > (self.max_tokens or self.min_tokens):
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}",
                "min_tokens",
            )
        if self.stop_strings and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True", "stop")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def num_logprobs(self) -> int | None:
        """Tokens whose log probability is returned beside each token's own; None is no others."""
        return self.logprobs if self.logprob_token_ids is None else len(self.logprob_token_ids)

    def _check_numbers(self) -> None:
        self._check("n", self.n >= 1, "at least 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -2 <= getattr(self, name) <= 2, "in [-2, 2]")
        rate = self.repetition_penalty
        self._check("repetition_penalty", isfinite(rate) and rate > 0, "above 0")
        warmth = self.temperature
        self._check("temperature", isfinite(warmth) and warmth >= 0, "non-negative and finite")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._check("top_k", self.top_k >= -1, "0 or -1 (all), or at least 1")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("min_tokens", self.min_tokens >= 0, "at least 0")
        self._check("seed", self.seed is None or abs(self.seed) < MAX_SEED, "a 64-bit integer")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        kept = self.truncate_prompt_tokens
        self._check("truncate_prompt_tokens", kept is None or kept == -1 or kept >= 1, "-1 or >= 1")

    def _check_lists(self) -> None:
        self._check("stop", all(self.stop_strings), "non-empty strings")
        self._check("bad_words", all(self.bad_words or []), "non-empty strings")
        allowed = self.allowed_token_ids
        self._check("allowed_token_ids", allowed is None or len(allowed) > 0, "None or not empty")
        scored = self.logprob_token_ids
        if scored is not None:
            valid = 0 < len(scored) == len(set(scored)) <= MAX_LOGPROB_IDS
            self._check("logprob_token_ids", valid, f"1 to {MAX_LOGPROB_IDS} different ids")
            if self.logprobs not in (None, len(scored)):
                raise InvalidRequestError(
                    f"logprobs must be left out with logprob_token_ids, got {self.logprobs}",
                    "logprobs",
                )
        biases = (self.logit_bias or {}).values()
        self._check("logit_bias", all(isfinite(bias) for bias in biases), "finite numbers")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            given = f"{getattr(self, name)!s:.200}"
            raise InvalidRequestError(f"{name} must be {expected}, got {given}", name)
