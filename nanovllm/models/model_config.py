"""What a checkpoint's `config.json` says, in one form for all architectures."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.config import QUANTIZED_METHODS
from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.layers.rope_config import RopeConfig

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""What we read; `registry.py` has the classes."""

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

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyper-parameters of a decoder-only language model.

    Args:
        architecture: Class name in the checkpoint, such as `Qwen3ForCausalLM`.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head.
        rms_norm_eps: Epsilon of the norms.
        tie_word_embeddings: Whether the output head is the embedding.
        attention_bias: Whether the attention projections have biases, where an architecture
            leaves it open.
        mlp_bias: The same for the MLP.
        windows: Attention window of each layer; None is all.
        rope: Rotary parameters.
        dtype: Name of the checkpoint's dtype.
        eos_token_ids: Ids that end a text.
        embedding_scale: Factor on the embeddings of tokens.
        residual_scale: Factor on what each attention and MLP adds to the residual stream.
        no_rope: Whether attention does without positions.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: str
    eos_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    no_rope: bool = False

    @property
    def num_row_values(self) -> int:
        """Values that a step holds at most for a row behind its hidden states: copies of logits."""
        return 8 * self.vocab_size

    @property
    def max_model_len(self) -> int:
        """Positions the model can use, rope scaling included."""
        return self.rope.context_length

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Read `config.json` and the end-of-text ids of `generation_config.json`.

        Raises:
            FileNotFoundError: There is no `config.json`.
            UnsupportedModelError: The checkpoint is of a kind we do not read.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no config.json in {directory}: a model directory holds config.json, "
                "tokenizer.json and *.safetensors"
            )
        config = cls.from_dict(read_json(path))
        eos = as_ids(read_generation_config(directory).get("eos_token_id"))
        return replace(config, eos_token_ids=eos) if eos else config

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read the content of a `config.json`.

        Raises:
            UnsupportedModelError: It is of a kind we do not read.
            InvalidRequestError: A value is missing or does not fit the others.
        """
        architectures = raw.get("architectures")
        if not architectures:
            raise UnsupportedModelError(
                "config.json names no architectures: it must have a list such as "
                '["Qwen3ForCausalLM"]',
                "architectures",
            )
        if architectures[0] not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"Unsupported model architecture: {architectures[0]}; supported: "
                f"{', '.join(ARCHITECTURES)}",
                "architectures",
            )
        stored_quantization(raw)
        try:
            return cls._parse(str(architectures[0]), raw)
        except KeyError as e:
            raise InvalidRequestError(f"config.json lacks {e.args[0]!r}", str(e.args[0])) from e

    @classmethod
    def _parse(cls, architecture: str, raw: dict[str, Any]) -> "ModelConfig":
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu", "hidden_act"
            )
        hidden_size, num_heads = raw["hidden_size"], raw["num_attention_heads"]
        num_kv_heads = raw.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise InvalidRequestError(
                f"num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}",
                "num_key_value_heads",
            )
        default_head_dim = 128 if raw.get("model_type") == "qwen3" else hidden_size // num_heads
        head_dim = raw.get("head_dim") or default_head_dim
        return cls(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
            windows=_windows(raw),
            rope=_rope(raw, head_dim),
            dtype=_dtype(raw),
            eos_token_ids=as_ids(raw.get("eos_token_id")),
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidRequestError: The file is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InvalidRequestError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise InvalidRequestError(f"{path} must hold a JSON object")
    return content


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The content of `generation_config.json`, empty if there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id, several or none, as a tuple."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def stored_quantization(raw: dict[str, Any]) -> dict[str, Any] | None:
    """How a `config.json` says that the weights are quantized; None if they are not.

    Returns:
        The settings of the tool that did it, with its name of `QUANTIZED_METHODS` as
        `quant_method`.

    Raises:
        UnsupportedModelError: It is a method that we do not read.
    """
    settings: dict[str, Any] | None = raw.get("quantization_config") or raw.get(
        "compression_config"
    )
    if not settings:
        return None
    method = str(settings.get("quant_method") or settings.get("format") or "unknown")
    if method.replace("_", "-") not in QUANTIZED_METHODS:
        raise UnsupportedModelError(
            f"the checkpoint is quantized with {method!r}, which is not supported; supported: "
            f"float32, float16 and bfloat16 safetensors, and {', '.join(QUANTIZED_METHODS)} in 4 "
            "or 8 bits",
            "quantization_config",
        )
    return settings | {"quant_method": method.replace("_", "-")}


def _windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    """The attention window of each layer, from the ways the architectures say it."""
    num_layers: int = raw["num_hidden_layers"]
    window: int | None = raw.get("sliding_window")
    if raw.get("model_type") == "mistral":
        return (window,) * num_layers
    if not window or not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}", "dtype"
        )
    return dtype


def _rope(raw: dict[str, Any], head_dim: int) -> RopeConfig:
    """Rotary parameters, from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    rotated = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if rotated != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {rotated} is not supported; supported: 1.0",
            "partial_rotary_factor",
        )
    max_position = raw["max_position_embeddings"]
    if scaling["rope_type"] in ("yarn", "llama3") and raw.get("original_max_position_embeddings"):
        scaling.setdefault(
            "original_max_position_embeddings", raw["original_max_position_embeddings"]
        )
    for name in ROPE_FIELDS.get(scaling["rope_type"], ()):
        float(scaling[name])
    return RopeConfig(head_dim, float(theta), max_position, scaling)
