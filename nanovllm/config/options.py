"""What all options have in common: names, aliases, checks, and how the environment is read."""

import os
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from nanovllm.errors import InvalidRequestError
from nanovllm.validation import conform

ALIASES = {
    "num_kvcache_blocks": "num_kv_blocks",
    "kvcache_block_size": "block_size",
    "num_pages": "num_kv_blocks",
    "page_size": "block_size",
    "memory_ratio": "gpu_memory_utilization",
    "max_seq_len_override": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "max_prefill_length": "max_num_batched_tokens",
    "dummy_weight": "dummy_weights",
    "tp_size": "tensor_parallel_size",
    "data_parallel_size": "replicas",
    "scheduler_mode": "dispatch_policy",
    "attn": "attention_backend",
    "cuda_graph_max_bs": "max_cudagraph_capture_size",
    "use_torch_compile": "compile_model",
}
"""Names that the family's engines use for our options."""

Config = TypeVar("Config", bound="Options")


class Switch(NamedTuple):
    """An option that a variable sets by being on or off, and to what."""

    option: str
    on: Any
    off: Any


class Options:
    """What the dataclasses of options have in common: they check, and read names and variables."""

    __slots__ = ()

    environment_aliases: ClassVar[Mapping[str, str]] = {}
    """The family's variables besides `NANOVLLM_<OPTION>`; the first one set wins."""

    environment_switches: ClassVar[Mapping[str, Switch]] = {}
    """Those that are on or off where our option is something else; the ones above win."""

    removed_variables: ClassVar[Mapping[str, str]] = {}
    """Variables that the family has given up, and what there is instead."""

    @classmethod
    def names(cls) -> list[str]:
        return [option.name for option in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def from_options(cls: type[Config], **options: Any) -> Config:
        """Build from keyword options by their names or aliases.

        Raises:
            InvalidRequestError: An option is unknown (the message has the nearest name), given
                under two names, or outside its range.
        """
        config: Config = split_options(options, cls)[0]
        return config

    @classmethod
    def from_env(cls: type[Config], environ: Mapping[str, str] | None = None) -> Config:
        """Build from `NANOVLLM_<OPTION>` and the family's variables.

        Raises:
            InvalidRequestError: A value cannot be read as its option's type or is out of range, or
                a variable is no longer supported.
        """
        environ = os.environ if environ is None else environ
        for variable, instead in cls.removed_variables.items():
            if environ.get(variable):
                raise InvalidRequestError(
                    f"environment variable {variable} is no longer supported: {instead}", variable
                )
        hints = get_type_hints(cls)
        variables = {f"NANOVLLM_{name.upper()}": name for name in cls.names()}
        variables |= {f"NANOVLLM_SERVERPOOL_{name.upper()}": name for name in cls.names()}
        values: dict[str, Any] = {}
        for variable, name in (variables | dict(cls.environment_aliases)).items():
            text = environ.get(variable, "").strip()
            if text and name not in values:
                values[name] = _parse(variable, text, hints[name])
        for variable, switch in cls.environment_switches.items():
            text = environ.get(variable, "").strip()
            if text and switch.option not in values:
                is_on = _parse(variable, text, bool)
                values[switch.option] = switch.on if is_on else switch.off
        return cls(**values)

    @classmethod
    def variables_of(cls, name: str) -> list[str]:
        """The variables that set an option, ours first."""
        aliases = [v for v, option in cls.environment_aliases.items() if option == name]
        switches = [v for v, switch in cls.environment_switches.items() if switch.option == name]
        return [f"NANOVLLM_{name.upper()}", *aliases, *switches]

    def _check_types(self) -> None:
        """Hold every field to its type, and to its choices if it has some."""
        conform(self)
        hints = get_type_hints(type(self))
        for name in self.names():
            value, choices = getattr(self, name), get_args(hints[name])
            if get_origin(hints[name]) is Literal and value not in choices:
                raise InvalidRequestError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}", name
                )

    def _check_range(self, low: float, *names: str, high: float = float("inf")) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bounds = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
                raise InvalidRequestError(f"{name} must be {bounds}, got {value}", name)


def split_options(options: Mapping[str, Any], *classes: type[Any]) -> list[Any]:
    """Build one config of each class from keyword options, by their names or aliases.

    Raises:
        InvalidRequestError: No class has an option of this name (the message has the nearest), or
            it is given under two names, or outside its range.
    """
    values: list[dict[str, Any]] = [{} for _ in classes]
    known = [name for cls in classes for name in cls.names()]
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in known:
            nearest = get_close_matches(given, [*known, *ALIASES], n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidRequestError(f"unknown option {given!r}{hint}", given)
        target = next(v for v, cls in zip(values, classes, strict=True) if name in cls.names())
        if name in target:
            raise InvalidRequestError(f"option {name!r} is given twice", name)
        target[name] = value
    return [cls(**given) for given, cls in zip(values, classes, strict=True)]


def _parse(variable: str, text: str, hint: Any) -> Any:
    """Read an environment variable as the type of its option."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                text.lower()
            ]
        if get_origin(kind) is list:
            (item,) = get_args(kind)
            return [item(part.strip()) for part in text.split(",") if part.strip()]
        return kind(text) if kind in (int, float) else text
    except (KeyError, ValueError) as e:
        raise InvalidRequestError(
            f"environment variable {variable}={text!r} is not a valid {kind.__name__}", variable
        ) from e
