"""A prompt and what was asked of it, checked and turned into what the engine takes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

from nanovllm.batch import TextRequest
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.grammar_compiler import GrammarCompiler
from nanovllm.text.tokenizer import Tokenizer

NORMALIZATION_MARGIN = 4
"""How many times shorter a normalizer may make a text; those in use compose or strip characters."""

MAX_BAD_TOKENS = 8192
"""Spellings of bad words times the tokens of the longest."""

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`, either of which may
have a `cache_salt`, too."""


class TextInput(NamedTuple):
    """A request ready for the engine; `prompt` is None when it came as token ids."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    payload: TextRequest
    cache_salt: str | None = None


class InputProcessor:
    """Tokenises and validates requests for one model.

    Args:
        tokenizer: The model's; without one, prompts are token ids.
        vocab_size: Rows of the model's embedding.
        eos_token_ids: Ids that end a text.
        max_model_len: Longest prompt plus output.
        grammars: Checks the forms of outputs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        grammars: GrammarCompiler,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._grammars = grammars
        self._eos_token_ids = frozenset(eos_token_ids)

    def process(
        self,
        prompt: Prompt,
        params: SamplingParams,
        add_special_tokens: bool = True,
        embeds: bool = False,
    ) -> TextInput:
        """Check a request and tokenise its prompt.

        Args:
            prompt: Text or token ids.
            params: What to sample.
            add_special_tokens: Whether the tokenizer adds its own, such as a begin-of-text id; a
                rendered chat template has them already.
            embeds: Whether the prompt's embedding is wanted.

        Raises:
            InvalidRequestError: The prompt or a parameter cannot be used with this model.
            ContextLengthError: The prompt leaves no room for an output.
        """
        cache_salt = None
        if isinstance(prompt, Mapping):
            prompt, cache_salt = _content(prompt)
        text = prompt if isinstance(prompt, str) else None
        if text is not None and params.truncate_prompt_tokens is None:
            self._check_size(text)
        token_ids = self._token_ids(prompt, add_special_tokens)
        # A tokenizer may have tokens for which the model has no row.
        self._check_ids("prompt", token_ids)
        token_ids = self._fitted(token_ids, params, embeds)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            given = getattr(params, name) or ()
            if len(given) > self._vocab_size:
                raise InvalidRequestError(
                    f"{name} has {len(given)} token ids: the vocabulary has {self._vocab_size}",
                    name,
                )
            self._check_ids(name, list(given))
        if params.stop_strings:
            self._require_tokenizer("stop")
        payload = TextRequest(
            frozenset() if params.ignore_eos else self._eos_token_ids,
            self._bad_words(params),
            self._grammar(params),
            embeds=embeds,
        )
        _check_choice(params, payload)
        params = replace(
            params,
            detokenize=params.detokenize and self._tokenizer is not None,
            structured_outputs=None,  # from here on it is the grammar
        )
        return TextInput(text, token_ids, params, payload, cache_salt)

    def _fitted(self, token_ids: list[int], params: SamplingParams, embeds: bool) -> list[int]:
        """The prompt, cut where that is asked for, with room for the output in the context.

        What is gone on with keeps its end. What is embedded needs no room, and keeps its beginning,
        as in vLLM, and the token that the tokenizer ends it with.
        """
        if not token_ids:
            raise InvalidRequestError("the prompt is empty: give at least one token", "prompt")
        kept = params.truncate_prompt_tokens
        if kept is not None:
            room = self._max_model_len - (0 if embeds else params.max_tokens or 1)
            size = kept if kept >= 0 else max(room, 1)
            if embeds and len(token_ids) > size:
                special = frozenset() if self._tokenizer is None else self._tokenizer.special_ids
                ending = token_ids[-1:] if token_ids[-1] in special else []
                token_ids = token_ids[: size - len(ending)] + ending
            token_ids = token_ids[-size:]
        if len(token_ids) > self._max_model_len - (not embeds):
            raise ContextLengthError.of_prompt(self._max_model_len, len(token_ids))
        return token_ids

    def _check_size(self, text: str) -> None:
        """Refuse a text that cannot fit, without the second a million characters take."""
        longest = self._require_tokenizer("a text prompt").max_token_chars * NORMALIZATION_MARGIN
        if len(text) > self._max_model_len * longest:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens, and the "
                f"prompt has {len(text)} characters, at least {len(text) // longest} tokens: "
                "shorten it",
                "prompt",
            )

    def _token_ids(self, prompt: str | Sequence[int], add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._require_tokenizer("a text prompt")
            return tokenizer.encode(prompt, add_special_tokens, "prompt")
        try:
            token_ids = [] if isinstance(prompt, bytes) else list(prompt)
            valid = not isinstance(prompt, bytes)
        except TypeError:
            valid = False
        if not valid or not all(_is_id(token_id) for token_id in token_ids):
            raise InvalidRequestError(
                f"a prompt is a string or a list of token ids, got {prompt!r:.80}", "prompt"
            )
        return [int(token_id) for token_id in token_ids]

    def _check_ids(self, name: str, token_ids: list[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            wrong = next(i for i in token_ids if not 0 <= i < self._vocab_size)
            raise InvalidRequestError(
                f"token id {wrong} in {name} is out of range: the vocabulary has "
                f"{self._vocab_size} ids, 0 to {self._vocab_size - 1}",
                name,
            )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word's token ids, both at the start of a text and after a space.

        Those that the model has no row for it cannot write in any case.
        """
        if not params.bad_words:
            return ()
        tokenizer = self._require_tokenizer("bad_words")
        spellings = [prefix + word.lstrip() for word in params.bad_words for prefix in ("", " ")]
        encoded = [tuple(tokenizer.encode(spelling, False, "bad_words")) for spelling in spellings]
        possible = (ids for ids in encoded if ids and max(ids) < self._vocab_size)
        words = tuple(dict.fromkeys(possible))
        longest = max(map(len, words), default=0)
        if len(words) * longest > MAX_BAD_TOKENS:
            raise InvalidRequestError(
                f"bad_words are too much to look for at each step: {len(words)} spellings of up to "
                f"{longest} tokens, and {MAX_BAD_TOKENS} are the most; give fewer or shorter ones",
                "bad_words",
            )
        return words

    def _grammar(self, params: SamplingParams) -> str | None:
        """The form of the output as a grammar, made sure of."""
        if params.structured_outputs is None:
            return None
        self._require_tokenizer("structured_outputs")
        return self._grammars.check(params.structured_outputs, self._max_model_len)

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"{what} needs a tokenizer, and the model's directory has none: give token ids, "
                "or say where one is (tokenizer=)",
                "prompt",
            )
        return self._tokenizer


def _check_choice(params: SamplingParams, payload: TextRequest) -> None:
    """Refuse a request that may at some point leave no token to choose.

    Raises:
        InvalidRequestError: All allowed tokens may be forbidden at the same time.
    """
    if params.allowed_token_ids is None or payload.grammar is not None:
        return
    forbidden = {word[-1] for word in payload.bad_words}
    if params.min_tokens:
        forbidden.update(payload.eos_token_ids, params.stop_token_ids or ())
    if forbidden.issuperset(params.allowed_token_ids):
        raise InvalidRequestError(
            "allowed_token_ids must have a token that neither bad_words nor min_tokens forbid",
            "allowed_token_ids",
        )


def _content(prompt: Mapping[str, Any]) -> tuple[str | Sequence[int], str | None]:
    """What a prompt in vLLM's form holds, and its cache salt if it has one.

    Raises:
        InvalidRequestError: It has keys we do not know, neither text nor token ids, or a salt that
            is no text.
    """
    kinds = {"prompt", "prompt_token_ids"}
    if prompt.keys() - kinds - {"cache_salt"} or not prompt.keys() & kinds:
        raise InvalidRequestError(
            "a prompt mapping has 'prompt' or 'prompt_token_ids', and perhaps 'cache_salt', got "
            f"{sorted(prompt)}",
            "prompt",
        )
    salt: str | None = prompt.get("cache_salt")
    if not isinstance(salt, str | None):
        raise InvalidRequestError(f"cache_salt must be a string, got {salt!r:.80}", "cache_salt")
    content: str | Sequence[int] = (
        prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
    )
    return content, salt


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
