"""Rotary parameters as the `config.json` of an architecture has them."""

from typing import Any

from nanovllm.errors import UnsupportedModelError
from nanovllm.layers.rope_config import RopeConfig
from nanovllm.models.config_fields import json_object, positive, positive_number

ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""What each kind of rope scaling cannot do without."""


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
    original = "original_max_position_embeddings"
    extends = scaling["rope_type"] in ("yarn", "llama3")
    if extends and scaling.get(original) is None and raw.get(original):
        scaling[original] = raw[original]
    needed = ROPE_FIELDS.get(scaling["rope_type"], ())
    for name in ("factor", original, *needed):
        if scaling.get(name) is not None or name in needed:
            positive_number(scaling, name)
    return RopeConfig(
        head_dim,
        positive_number({"rope_theta": theta}, "rope_theta"),
        positive(raw, "max_position_embeddings"),
        scaling,
    )


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
    length = positive(raw, "max_position_embeddings")
    if (full.get("rope_type") or full.get("type")) == "linear":
        length = int(length / positive_number(full, "factor"))
    others = raw | {"rope_scaling": None}
    return (
        rope(others | {"rope_parameters": full, "max_position_embeddings": length}, head_dim),
        rope(others | {"rope_parameters": window}, head_dim),
    )
