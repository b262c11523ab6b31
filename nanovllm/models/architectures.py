"""What each architecture says in its own way in `config.json`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.errors import UnsupportedModelError
from nanovllm.kernels.activation import Activation
from nanovllm.models.config_fields import positive, positive_number
from nanovllm.models.rope_fields import rope, ropes_by_layer

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

DTYPES = ("bfloat16", "float16", "float32")

Raw = dict[str, Any]
"""The content of a `config.json`."""


def _all_layers(_raw: Raw, num_layers: int) -> list[bool]:
    return [True] * num_layers


def _upper_layers(raw: Raw, num_layers: int) -> list[bool]:
    first = 0 if raw.get("max_window_layers") == 0 else positive(raw, "max_window_layers", 28)
    return [i >= first for i in range(num_layers)]


def _all_but_every_sixth(raw: Raw, num_layers: int) -> list[bool]:
    every = positive(raw, "sliding_window_pattern", 6)
    return [i % every != 0 for i in range(1, num_layers + 1)]


def _usual(raw: Raw, head_dim: int) -> dict[str, Any]:
    return {
        "rope": rope(raw, head_dim),
        "activation": _activation(raw, "hidden_act"),
        "dtype": _dtype(raw),
    }


def _of_gemma(raw: Raw, head_dim: int) -> dict[str, Any]:
    full, window = ropes_by_layer(raw, head_dim)
    dtype = _dtype(raw)
    return {
        "rope": full,
        "window_rope": window,
        "activation": _activation(raw, "hidden_activation"),
        "query_pre_attn_scalar": positive_number(raw, "query_pre_attn_scalar"),
        "embedding_scale": math.sqrt(raw["hidden_size"]),
        # Its residual stream leaves the range of float16.
        "dtype": "bfloat16" if dtype == "float16" else dtype,
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """How the `config.json` of an architecture is read.

    Args:
        defaults: What transformers takes for a field that is left out, where that is not the same
            for all.
        biases: The fields that say of some projections whether they have biases. What others say
            is ignored.
        has_windows: Whether attention has windows: if `use_sliding_window` is true and
            `sliding_window` is not null ("asked"), if only the latter holds ("not null"), or
            whatever they say.
        windowed: Which layers have one, if there is no `layer_types`, given the fields and the
            number of layers.
        has_mixtures: Whether some layers may have a mixture of experts.
        special: Further arguments of `ModelConfig`, from the fields and the width of a head.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    has_windows: Literal["asked", "not null", "always", "never"] = "asked"
    windowed: Callable[[Raw, int], list[bool]] = _upper_layers
    has_mixtures: bool = False
    special: Callable[[Raw, int], dict[str, Any]] = _usual


ARCHITECTURES = {
    "Gemma3ForCausalLM": Architecture(
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        biases=("attention_bias",),
        has_windows="always",
        windowed=_all_but_every_sixth,
        special=_of_gemma,
    ),
    "LlamaForCausalLM": Architecture(biases=("attention_bias", "mlp_bias"), has_windows="never"),
    "MistralForCausalLM": Architecture(has_windows="not null", windowed=_all_layers),
    "Qwen2ForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(defaults={"head_dim": 128}, biases=("attention_bias",)),
    "Qwen3MoeForCausalLM": Architecture(
        biases=("attention_bias",), windowed=_all_layers, has_mixtures=True
    ),
}
"""What we read; `registry.py` has the classes."""

TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Models that see images as well, of which we read what writes: its `text_config`."""


def _activation(raw: Raw, name: str) -> Activation:
    value = raw.get(name, "silu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name} {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}", name
        )
    return ACTIVATIONS[value]


def _dtype(raw: Raw) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}", "dtype"
        )
    return dtype
