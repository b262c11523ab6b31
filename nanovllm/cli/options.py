"""Flags that several commands share."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token

from nanovllm.config import EngineConfig, Options, PoolConfig, ServerConfig, SpeechConfig
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

DEFAULT_CONFIG = EngineConfig()


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How to sample. What is not given is the model's own `generation_config.json`.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_p: Keeps the smallest set of tokens whose probability reaches this.
        top_k: Keeps this many tokens; 0 keeps all.
        min_p: Keeps tokens with at least this share of the top probability.
        max_tokens: Tokens to generate at most.
        min_tokens: Tokens to generate before anything may end the text.
        stop: Text that ends the output where it begins; may be given several times.
        stop_token_ids: Token id that ends the output; may be given several times.
        ignore_eos: Whether to go on after the model's end-of-text ids.
        repetition_penalty: Above 1 makes tokens of prompt and output less likely.
        presence_penalty: Subtracted from the logit of every token generated so far.
        frequency_penalty: Subtracted once for each time a token was generated.
        bad_words: Word that is never generated; may be given several times.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    bad_words: list[str] | None = None

    def over(self, defaults: SamplingParams, **overrides: Any) -> SamplingParams:
        """Return `defaults` with `overrides`, and the flags that were given over both."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(defaults, **(overrides | given))


DEFAULT_SAMPLING = SamplingFlags()


def numbers(kind: type, tokens: Sequence[Token]) -> list[int]:  # noqa: ARG001
    """Read `0,1` as well as `0 1`."""
    return [int(number) for token in tokens for number in token.value.split(",")]


@dataclass(frozen=True, kw_only=True)
class PoolFlags(PoolConfig):  # noqa: D101  # PoolConfig's docstring is the help
    devices: Annotated[list[int] | None, Parameter(converter=numbers)] = None


PoolFlags.__doc__ = PoolConfig.__doc__
DEFAULT_POOL = PoolFlags()


@dataclass(frozen=True, kw_only=True)
class SpeechFlags(SpeechConfig):  # noqa: D101  # SpeechConfig's docstring is the help
    speech_devices: Annotated[list[int] | None, Parameter(converter=numbers)] = None


SpeechFlags.__doc__ = SpeechConfig.__doc__
DEFAULT_SPEECH = SpeechFlags()
DEFAULT_SERVER = ServerConfig()

Server = Annotated[ServerConfig, Parameter(name="*", group=Group("Server", sort_key=2))]
Pool = Annotated[PoolFlags, Parameter(name="*", group=Group("Pool", sort_key=4))]
Speech = Annotated[SpeechFlags, Parameter(name="*", group=Group("Speech", sort_key=5))]
Engine = Annotated[EngineConfig, Parameter(name="*", group=Group("Engine", sort_key=3))]
Sampling = Annotated[SamplingFlags, Parameter(name="*", group=Group("Sampling", sort_key=2))]


def environment(*classes: type[Options]) -> dict[str, Any]:
    """Return the options that the environment sets to something else than their default."""
    given: dict[str, Any] = {}
    for cls in classes:
        config, default = cls.from_env(), cls()
        values = {name: getattr(config, name) for name in cls.names()}
        given |= {name: v for name, v in values.items() if v != getattr(default, name)}
    return given


def open_llm(config: EngineConfig) -> "LLM":
    """Load the model. Imported late, so that `--help` does not wait for torch."""
    from nanovllm.llm import LLM

    return LLM.from_config(config)
