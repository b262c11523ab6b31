"""How the matrices of a LoRA adapter go together, from the config beside them."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError

MAX_PATTERNS = 1024
MAX_PATTERN_CHARS = 256
NAME_CHARS = 48
"""A long name of a projection."""
MAX_WAYS = 1 << 18
"""To match a name by the patterns of an object, all together: it takes 20 ms at worst."""

UNSERVED = (
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""What an adapter may change besides the weights of linear layers, as PEFT's config says it."""

HARMLESS = ("use_rslora", "corda_config", "eva_config", "loftq_config", "lora_ga_config")
"""Of the options `use_*` and `*_config` those that say nothing else of a trained adapter."""

PLAIN_INITS = ("gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base model's weights alone, besides true and false."""

Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Rank and scale of an adapter's matrices, by projection.

    Args:
        rank: Of all that `rank_pattern` has not; None if it is not said.
        alpha: Of all that `alpha_pattern` has not.
        rank_pattern: What the names of some projections end with, and their ranks.
        alpha_pattern: The same for their alphas.
        use_rslora: Whether scales are alpha / sqrt(rank) (Kalajdzievski 2023) and not alpha / rank.
    """

    rank: int | None
    alpha: float
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()
    use_rslora: bool = False

    def rank_of(self, part: str) -> int | None:
        """The rank that a projection's matrices are said to have; None if it is not said."""
        rank = _first_match(self.rank_pattern, part)
        return self.rank if rank is None else int(rank)

    def scale_of(self, part: str, rank: int) -> float:
        """The factor on what a projection's matrices of that rank make."""
        alpha = _first_match(self.alpha_pattern, part)
        alpha = self.alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def peft_settings(raw: Mapping[str, Any]) -> AdapterSettings:
    """Read PEFT's `adapter_config.json`.

    Raises:
        InvalidRequestError: It is of something that cannot be served, or not valid.
    """
    if (kind := raw.get("peft_type", "LORA")) != "LORA":
        raise InvalidRequestError(f"peft_type must be 'LORA', got {kind!r:.80}", "path")
    for name, value in raw.items():
        unknown = name.startswith("use_") or name.endswith("_config")
        if value and (name in UNSERVED or (unknown and name not in HARMLESS)):
            raise _unserved(name, value)
    if raw.get("bias", "none") != "none":
        raise _unserved("bias", raw["bias"])
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and init not in PLAIN_INITS:
        raise InvalidRequestError(
            f"the LoRA was trained with init_lora_weights={init!r:.80}, on other weights than the "
            "model's: let PEFT convert it, with path_initial_model_for_weight_conversion of "
            "save_pretrained",
            "path",
        )
    return AdapterSettings(
        _rank("r", raw.get("r")),
        _alpha("lora_alpha", raw.get("lora_alpha")),
        _patterns("rank_pattern", raw, _rank),
        _patterns("alpha_pattern", raw, _alpha),
        bool(raw.get("use_rslora")),
    )


def voxcpm_settings(raw: Mapping[str, Any]) -> AdapterSettings:
    """Read the `lora_config.json` of VoxCPM's training.

    Raises:
        InvalidRequestError: It is not valid.
    """
    config = raw.get("lora_config")
    if not isinstance(config, dict):
        raise InvalidRequestError("there must be an object 'lora_config'", "path")
    rank = config.get("r", config.get("rank"))
    alpha = config.get("alpha", config.get("lora_alpha"))
    return AdapterSettings(None if rank is None else _rank("r", rank), _alpha("alpha", alpha))


def _unserved(name: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"the LoRA has {name}={value!r:.80}, which cannot be served: what can is the matrices A "
        "and B of linear layers",
        "path",
    )


def _rank(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise InvalidRequestError(f"{name} must be an integer above 0, got {value!r:.80}", "path")
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise InvalidRequestError(f"{name} must be a number above 0, got {value!r:.80}", "path")
    return float(value)


def _patterns(name: str, raw: Mapping[str, Any], read: Any) -> Patterns:
    """Read what some projections have of their own, by regular expressions of their names."""
    given = raw.get(name) or {}
    if not isinstance(given, dict) or len(given) > MAX_PATTERNS:
        raise InvalidRequestError(
            f"{name} must be an object of at most {MAX_PATTERNS} names, got {given!r:.80}", "path"
        )
    patterns = tuple((_pattern(name, key), read(f"{name} {key}", v)) for key, v in given.items())
    if sum(map(_num_ways, given)) > MAX_WAYS:
        raise InvalidRequestError(
            f"{name} could take for ever to match: use fewer of * + ? {{ | in its patterns, or the "
            "names of the projections",
            "path",
        )
    return patterns


def _num_ways(pattern: str) -> float:
    """In how many ways a pattern may match a name, at most, if it repeats no group."""
    num_repeats = len(re.findall(r"[*+{]", pattern))
    num_options = len(re.findall(r"(?<!\()\?", pattern))
    num_groups = 1 + pattern.count("(")
    # Alternatives of a group are a sum, and groups a product: greatest if they share them alike.
    num_choices = (1 + pattern.count("|") / num_groups) ** num_groups
    return num_choices * 2.0**num_options * math.comb(NAME_CHARS + num_repeats, num_repeats)


def _pattern(name: str, text: str) -> re.Pattern[str]:
    """Compile what PEFT would.

    Raises:
        InvalidRequestError: It is no regular expression, or it repeats a group, which may match in
            more ways than can be counted.
    """
    if len(text) > MAX_PATTERN_CHARS or re.search(r"\)[*+?{]", text):
        raise InvalidRequestError(
            f"{name} has {text!r:.80}: a pattern has at most {MAX_PATTERN_CHARS} characters, and "
            "repeats no group",
            "path",
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as e:
        raise InvalidRequestError(
            f"{name} has {text!r:.80}, which is no regular expression: {e}", "path"
        ) from e


def _first_match(patterns: Patterns, part: str) -> float | None:
    return next((value for pattern, value in patterns if pattern.match(part)), None)
