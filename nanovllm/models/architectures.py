"""What each architecture says in its own way in `config.json`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.layers.rope_config import RopeConfig
from nanovllm.models.config_fields import positive
from nanovllm.models.rope_fields import one_rope, ropes_by_layer

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
        reads_layer_types: Whether `layer_types` says which layers have one.
        windowed: Which layers have one, if no `layer_types` says so, given the fields and the
            number of layers.
        has_mixtures: Whether some layers may have a mixture of experts.
        ropes: Rotary parameters of all layers, or of those without a window and those with one,
            given the fields and the width of a head.
        activation: The field that names the activation of gates.
        has_query_scalar: Whether `query_pre_attn_scalar` counts.
        scales_embeddings: Whether embeddings are multiplied by the root of their width.
        overflows_float16: Whether the residual stream leaves the range of float16.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    has_windows: Literal["asked", "not null", "always", "never"] = "asked"
    reads_layer_types: bool = True
    windowed: Callable[[Raw, int], list[bool]] = _upper_layers
    has_mixtures: bool = False
    ropes: Callable[[Raw, int], tuple[RopeConfig, RopeConfig | None]] = one_rope
    activation: str = "hidden_act"
    has_query_scalar: bool = False
    scales_embeddings: bool = False
    overflows_float16: bool = False


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
        ropes=ropes_by_layer,
        activation="hidden_activation",
        has_query_scalar=True,
        scales_embeddings=True,
        overflows_float16=True,
    ),
    "LlamaForCausalLM": Architecture(biases=("attention_bias", "mlp_bias"), has_windows="never"),
    "MistralForCausalLM": Architecture(has_windows="not null", windowed=_all_layers),
    "Qwen2ForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(defaults={"head_dim": 128}, biases=("attention_bias",)),
    "Qwen3MoeForCausalLM": Architecture(
        biases=("attention_bias",),
        reads_layer_types=False,
        windowed=_all_layers,
        has_mixtures=True,
    ),
}
"""What we read; `registry.py` has the classes."""

TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Models that see images as well, of which we read what writes: its `text_config`."""
