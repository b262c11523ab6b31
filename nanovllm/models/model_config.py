"""What a checkpoint's `config.json` says, in one form for all architectures."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.config import QUANTIZED_METHODS
from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.kernels.activation import Activation
from nanovllm.layers.rope_config import RopeConfig
from nanovllm.models.architectures import ARCHITECTURES, TEXT_PARTS, Architecture
from nanovllm.models.config_fields import (
    boolean,
    indices,
    json_list,
    json_object,
    positive,
    positive_number,
)

OF_THE_WHOLE = ("eos_token_id", "tie_word_embeddings")
"""What is said of a model of several parts as a whole; its `text_config` may have the defaults."""

MAX_LAYERS = 4096

MAX_EXPERTS = 4096
"""In a layer; each has tensors of its own, whose names alone would fill the memory else."""

MAX_WINDOW = 1 << 30
"""More than any context, and in the range of the kernels."""

DTYPES = ("bfloat16", "float16", "float32")

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

LAYER_TYPES = ("full_attention", "sliding_attention")

NULLABLE = (
    *("head_dim", "num_key_value_heads", "layer_types", "query_pre_attn_scalar"),
    *("rope_theta", "rope_local_base_freq"),
)


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """MLPs of which each token goes through a few.

    Args:
        num_experts: How many MLPs there are.
        top_k: How many of them a token goes through.
        expert_size: Width of each.
        norm_topk_prob: Whether the shares of these few sum to one.
        layers: The layers that have such a mixture; the others have an MLP.

    Raises:
        InvalidRequestError: A token would go through more experts than there are.
    """

    num_experts: int
    top_k: int
    expert_size: int
    norm_topk_prob: bool
    layers: frozenset[int]

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise InvalidRequestError(
                f"num_experts_per_tok={self.top_k} is more than num_experts={self.num_experts}",
                "num_experts_per_tok",
            )


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
        head_dim: Width of a head, even: positions rotate pairs.
        rms_norm_eps: Epsilon of the norms.
        tie_word_embeddings: Whether the output head is the embedding.
        attention_bias: Whether the attention projections have biases, where an architecture
            leaves it open.
        mlp_bias: The same for the MLP.
        windows: Attention window of each layer; None is all.
        rope: Rotary parameters.
        dtype: Name of the checkpoint's dtype.
        eos_token_ids: Ids that end a text.
        mixture: What some layers have in place of an MLP; None is none.
        activation: Of the gates of MLPs.
        query_pre_attn_scalar: By whose root scores of attention are divided, in architectures that
            norm queries; None is `head_dim`.
        window_rope: Rotary parameters of layers with a window; None is those of the others.
        embedding_scale: Factor on the embeddings of tokens.
        residual_scale: Factor on what each attention and MLP adds to the residual stream.
        no_rope: Whether attention does without positions.

    Raises:
        InvalidRequestError: The heads do not fit together, or are of odd width.
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
    mixture: MixtureConfig | None = None
    activation: Activation = "silu"
    query_pre_attn_scalar: float | None = None
    window_rope: RopeConfig | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    no_rope: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidRequestError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}",
                "num_key_value_heads",
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InvalidRequestError(
                f"head_dim={self.head_dim} is not supported: it must be even and at least 2",
                "head_dim",
            )

    @property
    def num_mlp_values(self) -> int:
        """Values that a step holds at most for a token in an MLP, or in a mixture of them."""
        mixed = 0
        if self.mixture is not None:
            made = self.mixture.top_k * (3 * self.mixture.expert_size + 2 * self.hidden_size)
            mixed = made + 3 * self.mixture.num_experts  # their scores
        return max(4 * self.intermediate_size, mixed)

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
        if not raw.get("architectures"):
            raise UnsupportedModelError(
                "config.json names no architectures: it must have a list such as "
                '["Qwen3ForCausalLM"]',
                "architectures",
            )
        named = architecture = str(json_list(raw, "architectures")[0])
        if named.endswith("Model"):  # the same without a head
            architecture = named.removesuffix("Model") + "ForCausalLM"
        if architecture in TEXT_PARTS:
            if "text_config" not in raw:
                raise InvalidRequestError("config.json lacks 'text_config'", "text_config")
            whole = {name: raw[name] for name in OF_THE_WHOLE if raw.get(name) is not None}
            raw = raw | json_object(raw, "text_config") | whole
            architecture = TEXT_PARTS[architecture]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"Unsupported model architecture: {named}; supported: "
                f"{', '.join((*ARCHITECTURES, *TEXT_PARTS))}",
                "architectures",
            )
        stored_quantization(raw)
        try:
            return cls._parse(architecture, raw)
        except KeyError as e:
            raise InvalidRequestError(f"config.json lacks {e.args[0]!r}", str(e.args[0])) from e

    @classmethod
    def _parse(cls, name: str, raw: dict[str, Any]) -> "ModelConfig":
        _refuse_what_we_lack(raw)
        architecture = ARCHITECTURES[name]
        # Null counts as left out in some fields, and so does the 0 of some checkpoints.
        given = {n: value for n, value in raw.items() if value or n not in NULLABLE}
        raw = dict(architecture.defaults) | given
        dtype, activation = _dtype(raw), _activation(raw, architecture.activation)
        hidden_size = positive(raw, "hidden_size")
        num_layers = positive(raw, "num_hidden_layers", at_most=MAX_LAYERS)
        num_heads = positive(raw, "num_attention_heads")
        head_dim = positive(raw, "head_dim", hidden_size // num_heads)
        rope, window_rope = architecture.ropes(raw, head_dim)

        def has_bias(field: str) -> bool:
            return field in architecture.biases and boolean(raw, field)

        def query_scalar() -> float | None:
            is_read = architecture.has_query_scalar
            return positive_number(raw, "query_pre_attn_scalar") if is_read else None

        return cls(
            architecture=name,
            vocab_size=positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=positive(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=positive(raw, "num_key_value_heads", num_heads),
            head_dim=head_dim,
            rms_norm_eps=positive_number(raw, "rms_norm_eps", 1e-6),
            tie_word_embeddings=boolean(raw, "tie_word_embeddings"),
            attention_bias=has_bias("attention_bias"),
            mlp_bias=has_bias("mlp_bias"),
            windows=_windows(architecture, raw, num_layers),
            rope=rope,
            dtype="bfloat16" if dtype == "float16" and architecture.overflows_float16 else dtype,
            eos_token_ids=as_ids(raw.get("eos_token_id")),
            mixture=_mixture(raw, num_layers) if architecture.has_mixtures else None,
            activation=activation,
            query_pre_attn_scalar=query_scalar(),
            window_rope=window_rope,
            embedding_scale=math.sqrt(hidden_size) if architecture.scales_embeddings else 1.0,
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


def as_ids(value: Any) -> tuple[int, ...]:
    """One id, several or none, as a tuple.

    Raises:
        InvalidRequestError: It is something else.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise InvalidRequestError(
            f"eos_token_id must be an integer or a list of integers, not {value!r:.80}",
            "eos_token_id",
        )
    return tuple(ids)


def stored_quantization(raw: dict[str, Any]) -> dict[str, Any] | None:
    """How a `config.json` says that the weights are quantized; None if they are not.

    Returns:
        The settings of the tool that did it, with its name of `QUANTIZED_METHODS` as
        `quant_method`.

    Raises:
        UnsupportedModelError: It is a method that we do not read.
    """
    settings = json_object(raw, "quantization_config") or json_object(raw, "compression_config")
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


def _refuse_what_we_lack(raw: dict[str, Any]) -> None:
    """Complain of settings that would change what a model says.

    Raises:
        UnsupportedModelError: There is one.
    """
    if raw.get("is_causal") is False or raw.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            "attention in both directions (is_causal=false) is not supported", "is_causal"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if raw.get(name) is not None:
            raise UnsupportedModelError(f"{name} is not supported; supported: null", name)


def _activation(raw: dict[str, Any], name: str) -> Activation:
    value = raw.get(name, "silu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name} {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}", name
        )
    return ACTIVATIONS[value]


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}", "dtype"
        )
    return dtype


def _has_windows(architecture: Architecture, raw: dict[str, Any]) -> bool:
    if architecture.has_windows in ("always", "never"):
        return architecture.has_windows == "always"
    if "sliding_window" in raw and not raw["sliding_window"]:  # left out, it has its default
        return False
    return architecture.has_windows == "not null" or bool(raw.get("use_sliding_window"))


def _windows(
    architecture: Architecture, raw: dict[str, Any], num_layers: int
) -> tuple[int | None, ...]:
    """The attention window of each layer."""
    if not _has_windows(architecture, raw):
        return (None,) * num_layers
    window = min(positive(raw, "sliding_window", 4096), MAX_WINDOW)
    listed = _by_layer_types(raw) if architecture.reads_layer_types else []
    windowed = listed or architecture.windowed(raw, num_layers)
    if len(windowed) != num_layers:
        raise InvalidRequestError(
            f"layer_types has {len(windowed)} entries, and num_hidden_layers={num_layers}: there "
            "must be one for each layer",
            "layer_types",
        )
    return tuple(window if has_window else None for has_window in windowed)


def _by_layer_types(raw: dict[str, Any]) -> list[bool]:
    """Which layers `layer_types` gives a window, empty if it is left out."""
    if "layer_types" not in raw:
        return []
    kinds = json_list(raw, "layer_types")
    unknown = [kind for kind in kinds if kind not in LAYER_TYPES]
    if unknown:
        raise UnsupportedModelError(
            f"layer type {unknown[0]!r:.80} is not supported; supported: {', '.join(LAYER_TYPES)}",
            "layer_types",
        )
    return [kind == "sliding_attention" for kind in kinds]


def _mixture(raw: dict[str, Any], num_layers: int) -> MixtureConfig | None:
    """The experts of `Qwen3MoeForCausalLM`; None if no layer has any."""
    raw = {name: value for name, value in raw.items() if value is not None}
    every = positive(raw, "decoder_sparse_step", 1)
    sparse = range(every - 1, num_layers, every)
    layers = frozenset(sparse) - set(indices(raw, "mlp_only_layers"))
    if "num_local_experts" in raw:  # what transformers 5 writes
        raw.setdefault("num_experts", raw["num_local_experts"])
    if not layers or raw.get("num_experts") == 0:
        return None
    return MixtureConfig(
        num_experts=positive(raw, "num_experts", at_most=MAX_EXPERTS),
        top_k=positive(raw, "num_experts_per_tok"),
        expert_size=positive(raw, "moe_intermediate_size"),
        norm_topk_prob=boolean(raw, "norm_topk_prob"),
        layers=layers,
    )
