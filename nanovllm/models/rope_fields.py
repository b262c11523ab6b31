"""Rotary parameters as the `config.json` of an architecture has them."""

from typing import Any

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.layers.rope_config import RopeConfig
from nanovllm.models.config_fields import (
    boolean,
    finite_number,
    json_object,
    not_supported,
    positive,
    positive_number,
)

MAX_CONTEXT = 10**9
"""Positions; in the range of the kernels. No number of a scaling is larger, or less than its
inverse: frequencies would be infinite."""

ORIGINAL = "original_max_position_embeddings"

ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        ORIGINAL,
    ),
}
"""What each kind of rope scaling cannot do without."""

YARN_FIELDS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""What yarn has a default for, which 0 stands for as well."""


def rope(raw: dict[str, Any], head_dim: int) -> RopeConfig:
    """Rotary parameters, from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`.

    Where both are there, `rope_scaling` was added by hand, for a longer context. It replaces the
    others, as in transformers, but for their theta.

    Raises:
        UnsupportedModelError: They are of a kind we do not know.
        InvalidRequestError: A value is missing or wrong.
    """
    parameters = json_object(raw, "rope_parameters")
    scaling = dict(json_object(raw, "rope_scaling") or parameters)
    given = parameters | scaling
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModelError(
            f"rope_parameters by the type of a layer ({', '.join(given)}) are not supported here; "
            "supported: the same for all layers",
            "rope_parameters",
        )
    old_name = scaling.pop("type", None)
    scaling["rope_type"] = str(scaling.get("rope_type") or old_name or "default")
    scaling.pop("rope_theta", None)
    theta = given.get("rope_theta") or raw.get("rope_theta") or 10000.0
    rotated = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if rotated != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {rotated} is not supported; supported: 1.0",
            "partial_rotary_factor",
        )
    extends = scaling["rope_type"] in ("yarn", "llama3")
    if extends and scaling.get(ORIGINAL) is None and raw.get(ORIGINAL):
        scaling[ORIGINAL] = raw[ORIGINAL]
    theta = positive_number({"rope_theta": theta}, "rope_theta")
    _check_scaling(scaling, theta)
    max_position = positive(raw, "max_position_embeddings", at_most=MAX_CONTEXT)
    config = RopeConfig(head_dim, theta, max_position, scaling)
    if not 1 <= config.context_length <= MAX_CONTEXT:
        raise InvalidRequestError(
            f"rope scaling makes a context of {config.context_length} positions of "
            f"max_position_embeddings={max_position}; supported: 1 to {MAX_CONTEXT}",
            "factor",
        )
    return config


def one_rope(raw: dict[str, Any], head_dim: int) -> tuple[RopeConfig, None]:
    """The same for all layers; see `rope`."""
    return rope(raw, head_dim), None


def ropes_by_layer(raw: dict[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Rotary parameters of layers that see all, and of those with a window (Gemma 3).

    Only the former are scaled, and `max_position_embeddings` is what that leads to.

    Raises:
        UnsupportedModelError: See `rope`.
        InvalidRequestError: See `rope`.
    """
    parameters = json_object(raw, "rope_parameters")
    if not parameters.keys() <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            "rope_parameters must be by the type of a layer (full_attention, sliding_attention), "
            f"not {', '.join(parameters)}",
            "rope_parameters",
        )
    full = {"rope_theta": raw["rope_theta"]} | json_object(parameters, "full_attention")
    full |= json_object(raw, "rope_scaling")
    window = {"rope_theta": raw["rope_local_base_freq"]}
    window |= json_object(parameters, "sliding_attention")
    length = positive(raw, "max_position_embeddings", at_most=MAX_CONTEXT)
    if (full.get("rope_type") or full.get("type")) == "linear":
        length = int(length / _scaling_number(full, "factor"))
    others = raw | {"rope_scaling": None}
    return (
        rope(others | {"rope_parameters": full, "max_position_embeddings": length}, head_dim),
        rope(others | {"rope_parameters": window}, head_dim),
    )


def _check_scaling(scaling: dict[str, Any], theta: float) -> None:
    """Hold the fields of a scaling to what its kind makes of them.

    Raises:
        InvalidRequestError: A value is missing or wrong.
    """
    needed = ROPE_FIELDS.get(scaling["rope_type"], ())
    for name in ("factor", ORIGINAL, *needed):
        if scaling.get(name) is not None or name in needed:
            _scaling_number(scaling, name)
    if scaling["rope_type"] == "yarn":
        _check_yarn(scaling, theta)


def _check_yarn(scaling: dict[str, Any], theta: float) -> None:
    for name in YARN_FIELDS:
        if scaling.get(name):
            _scaling_number(scaling, name)
    boolean(scaling, "truncate")
    if scaling.get("attention_factor") is not None:
        magnitude = finite_number(scaling, "attention_factor")
        if abs(magnitude) > MAX_CONTEXT:
            raise not_supported("attention_factor", magnitude, f"up to {MAX_CONTEXT}")
    if theta <= 1:
        raise not_supported("rope_theta", theta, "above 1, with yarn")


def _scaling_number(scaling: dict[str, Any], name: str) -> float:
    """A number above 0 that float32 can calculate with."""
    value = positive_number(scaling, name)
    if not 1 / MAX_CONTEXT <= value <= MAX_CONTEXT:
        raise not_supported(name, value, f"{1 / MAX_CONTEXT} to {MAX_CONTEXT}")
    return value
