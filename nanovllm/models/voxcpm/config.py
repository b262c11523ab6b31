"""What a VoxCPM checkpoint's `config.json` says; reading it takes no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.layers.rope_config import RopeConfig
from nanovllm.models.config_fields import json_list, json_object, positive, positive_number
from nanovllm.models.model_config import MAX_LAYERS, ModelConfig, read_json

ARCHITECTURES = ("voxcpm", "voxcpm2")

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}

V1_DEFAULTS: dict[str, Any] = {
    "patch_size": 2,
    "residual_lm_num_layers": 6,
    "scalar_quantization_latent_dim": 256,
    "max_length": 4096,
}
V2_DEFAULTS: dict[str, Any] = {
    "patch_size": 4,
    "residual_lm_num_layers": 8,
    "scalar_quantization_latent_dim": 512,
    "max_length": 8192,
}
LOCAL_DEFAULTS = {"hidden_dim": 1024, "ffn_dim": 4096, "num_heads": 16, "num_layers": 4}
"""Of the transformers within a patch."""


@dataclass(frozen=True, slots=True)
class AudioVAEConfig:
    """Hyper-parameters of the convolutional autoencoder between waveforms and latent frames.

    Args:
        is_v2: Whether it is that of VoxCPM2, which pads odd strides in another way.
        encoder_dim: Channels of the encoder's first layer.
        encoder_rates: Strides of the encoder.
        latent_dim: Values of a frame.
        decoder_dim: Channels of the decoder's first layer.
        decoder_rates: Strides of the decoder.
        sample_rate: Rate in Hz of what the encoder reads.
        out_sample_rate: Rate in Hz of what the decoder writes.
        depthwise: Whether the convolutions of the residual units work channel by channel.
        sr_bin_boundaries: Output rates that divide the buckets the decoder is conditioned on, in
            Hz; None where it is not.
    """

    is_v2: bool
    encoder_dim: int
    encoder_rates: tuple[int, ...]
    latent_dim: int
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    sample_rate: int
    out_sample_rate: int
    depthwise: bool
    sr_bin_boundaries: tuple[int, ...] | None

    @property
    def hop(self) -> int:
        """Samples that the encoder makes a frame of."""
        return math.prod(self.encoder_rates)

    @property
    def decoder_hop(self) -> int:
        """Samples that the decoder makes of a frame."""
        return math.prod(self.decoder_rates)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], is_v2: bool) -> "AudioVAEConfig":
        """Read `audio_vae_config`; what it lacks is as in the smallest release of its version.

        Raises:
            UnsupportedModelError: The releases have nothing of the kind.
            InvalidRequestError: A value is of the wrong type.
        """
        has_more = raw.get("use_noise_block") or raw.get("cond_out_layer")
        if has_more or raw.get("cond_type", "scale_bias") != "scale_bias":
            raise UnsupportedModelError(
                "audio_vae_config: use_noise_block, cond_out_layer and a cond_type other than "
                "'scale_bias' are not supported",
                "audio_vae_config",
            )
        sample_rate = positive(raw, "sample_rate", 16000)
        boundaries = raw.get("sr_bin_boundaries", [20000, 30000, 40000]) if is_v2 else None
        return cls(
            is_v2=is_v2,
            encoder_dim=positive(raw, "encoder_dim", 128),
            encoder_rates=_rates(raw, "encoder_rates", (2, 5, 8, 8)),
            latent_dim=positive(raw, "latent_dim", 64),
            decoder_dim=positive(raw, "decoder_dim", 2048 if is_v2 else 1536),
            decoder_rates=_rates(
                raw, "decoder_rates", (8, 6, 5, 2, 2, 2) if is_v2 else (8, 8, 5, 2)
            ),
            sample_rate=sample_rate,
            out_sample_rate=positive(raw, "out_sample_rate", 48000) if is_v2 else sample_rate,
            depthwise=bool(raw.get("depthwise", True)),
            sr_bin_boundaries=None if boundaries is None else tuple(boundaries),
        )


@dataclass(frozen=True, slots=True)
class VoxCPMConfig:
    """Hyper-parameters of a VoxCPM checkpoint.

    A *frame* is a latent vector of the autoencoder, a *patch* so many frames in a row: what stands
    at an audio position of the language models, and what a step generates.

    Args:
        architecture: `voxcpm` (0.5B and 1.5) or `voxcpm2`.
        base: The language model that reads text and patches; it has the embedding of tokens.
        residual: The language model behind it, which adds acoustic detail.
        encoder: LocEnc, which makes an embedding of a patch.
        dit: LocDiT, which denoises a patch.
        patch_size: Frames of a patch.
        feat_dim: Values of a frame.
        fsq_dim: Values that the finite scalar quantization rounds.
        fsq_scale: To how many steps on either side of zero.
        mean_mode: Whether LocDiT is told the length of a step.
        vae: The autoencoder.
        dtype: Name of the checkpoint's dtype.
        max_model_len: Positions that the authors make room for.
    """

    architecture: str
    base: ModelConfig
    residual: ModelConfig
    encoder: ModelConfig
    dit: ModelConfig
    patch_size: int
    feat_dim: int
    fsq_dim: int
    fsq_scale: int
    mean_mode: bool
    vae: AudioVAEConfig
    dtype: str
    max_model_len: int

    @property
    def is_v2(self) -> bool:
        return self.architecture == "voxcpm2"

    @property
    def supports_reference(self) -> bool:
        """Whether a voice may be given apart from a text that it speaks."""
        return self.is_v2

    @property
    def num_layers(self) -> int:
        """Layers with a KV cache: first the base model's, then the residual model's."""
        return self.base.num_layers + self.residual.num_layers

    @property
    def num_heads(self) -> int:
        return self.base.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.base.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.base.head_dim

    @property
    def hidden_size(self) -> int:
        return self.base.hidden_size

    @property
    def num_mlp_values(self) -> int:
        return self.base.num_mlp_values

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.base.windows + self.residual.windows

    @property
    def num_row_values(self) -> int:
        """Values that a step holds at most for a row behind its hidden states.

        LocDiT's are those of two branches of some `2 * patch_size + 3` positions, the decoder's a
        few copies of its widest layer. What comes in and goes out at fixed addresses is little
        beside them; and what a captured graph takes by itself, at every evaluation of LocDiT, is
        less than twice as much, a GiB aside.
        """
        dit, vae = self.dit, self.vae
        tokens = 2 * (2 * self.patch_size + 3)
        denoising = tokens * (8 * dit.hidden_size + 4 * dit.intermediate_size)
        frames, widest = self.patch_size, 0
        for index, rate in enumerate(vae.decoder_rates, start=1):
            frames *= rate
            widest = max(widest, frames * vae.decoder_dim >> index)
        return denoising + 6 * widest

    @property
    def samples_per_patch(self) -> int:
        """Samples that a patch is decoded to."""
        return self.patch_size * self.vae.decoder_hop

    @classmethod
    def from_directory(cls, directory: Path) -> "VoxCPMConfig":
        """Read `config.json`.

        Raises:
            FileNotFoundError: There is none.
            UnsupportedModelError: The checkpoint is of a kind we do not read.
            InvalidRequestError: A value is missing or does not fit the others.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no config.json in {directory}: a model directory holds config.json, "
                "tokenizer.json, audiovae.pth and *.safetensors"
            )
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "VoxCPMConfig":
        """Read the content of a `config.json`; see `from_directory`."""
        named = raw.get("architecture") or (raw.get("architectures") or ["voxcpm"])[0]
        architecture = str(named).lower()
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"Unsupported model architecture: {named}; supported: {', '.join(ARCHITECTURES)}",
                "architecture",
            )
        try:
            return cls._parse(architecture, raw)
        except KeyError as e:
            raise InvalidRequestError(f"config.json lacks {e.args[0]!r}", str(e.args[0])) from e

    @classmethod
    def _parse(cls, architecture: str, raw: dict[str, Any]) -> "VoxCPMConfig":
        is_v2 = architecture == "voxcpm2"
        raw = (V2_DEFAULTS if is_v2 else V1_DEFAULTS) | raw
        dtype = DTYPES.get(str(raw.get("dtype", "bfloat16")).removeprefix("torch."))
        if dtype is None:
            raise UnsupportedModelError(
                f"dtype {raw['dtype']!r} is not supported; supported: {', '.join(DTYPES)}", "dtype"
            )
        lm = json_object({"lm_config": raw["lm_config"]}, "lm_config")
        residual = lm | {
            "num_hidden_layers": _num_layers(raw, "residual_lm_num_layers"),
            "vocab_size": 0,
            "no_rope": raw.get("residual_lm_no_rope", False) if is_v2 else lm.get("no_rope", False),
        }
        encoder, dit, vae = (
            json_object(raw, name) for name in ("encoder_config", "dit_config", "audio_vae_config")
        )
        config = cls(
            architecture=architecture,
            base=_transformer(lm, dtype),
            residual=_transformer(residual, dtype),
            encoder=_transformer(_local(lm, encoder), dtype),
            dit=_transformer(_local(lm, dit), dtype),
            patch_size=positive(raw, "patch_size"),
            feat_dim=positive(raw, "feat_dim", 64),
            fsq_dim=positive(raw, "scalar_quantization_latent_dim"),
            fsq_scale=positive(raw, "scalar_quantization_scale", 9),
            mean_mode=bool((dit if is_v2 else raw).get("dit_mean_mode", False)),
            vae=AudioVAEConfig.from_dict(vae, is_v2),
            dtype=dtype,
            max_model_len=positive(raw, "max_length"),
        )
        if config.vae.latent_dim != config.feat_dim:
            raise InvalidRequestError(
                f"feat_dim={config.feat_dim} is not the latent_dim={config.vae.latent_dim} of "
                "audio_vae_config",
                "feat_dim",
            )
        return config


def is_speech(directory: Path) -> bool:
    """Whether a model directory holds a speech model: text models have a list `architectures`."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    raw = read_json(path)
    return not raw.get("architectures") and ("architecture" in raw or "lm_config" in raw)


def _local(lm: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a transformer within a patch: what it does not say is the language model's."""
    raw = LOCAL_DEFAULTS | raw
    return lm | {
        "hidden_size": raw["hidden_dim"],
        "intermediate_size": raw["ffn_dim"],
        "num_attention_heads": raw["num_heads"],
        "num_hidden_layers": _num_layers(raw, "num_layers"),
        "kv_channels": raw.get("kv_channels"),
        "vocab_size": 0,
    }


def _transformer(raw: dict[str, Any], dtype: str) -> ModelConfig:
    """Read MiniCPM4's fields, by which all four transformers are described."""
    hidden_size, num_layers = positive(raw, "hidden_size"), _num_layers(raw, "num_hidden_layers")
    num_heads = positive(raw, "num_attention_heads")
    width = raw.get("kv_channels")
    head_dim = hidden_size // num_heads if width is None else positive(raw, "kv_channels")
    # True where it is missing, although all releases say False.
    scaled = bool(raw.get("use_mup", True))
    return ModelConfig(
        architecture="minicpm4",
        vocab_size=raw["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=positive(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=positive(raw, "num_key_value_heads"),
        head_dim=head_dim,
        rms_norm_eps=positive_number(raw, "rms_norm_eps"),
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        windows=(None,) * num_layers,
        rope=_rope(raw, head_dim),
        dtype=dtype,
        eos_token_ids=(),
        embedding_scale=positive_number(raw, "scale_emb") if scaled else 1.0,
        residual_scale=positive_number(raw, "scale_depth") / math.sqrt(num_layers)
        if scaled
        else 1.0,
        no_rope=bool(raw.get("no_rope", False)),
    )


def _rope(raw: dict[str, Any], head_dim: int) -> RopeConfig:
    """LongRoPE (Ding et al. 2024) as MiniCPM4 has it: one list of factors, chosen once for all."""
    theta = positive_number(raw, "rope_theta")
    max_position = positive(raw, "max_position_embeddings")
    scaling = json_object(raw, "rope_scaling")
    if not scaling:
        return RopeConfig(head_dim, theta, max_position, {"rope_type": "default"})
    kind = scaling.get("type") or scaling.get("rope_type")
    if kind != "longrope":
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported; supported: longrope", "rope_scaling"
        )
    original = positive(scaling, "original_max_position_embeddings")
    factors = json_list(scaling, "long_factor" if max_position > original else "short_factor")
    if len(factors) != head_dim // 2:
        raise InvalidRequestError(
            f"rope_scaling has {len(factors)} factors for heads of {head_dim}: there must be one "
            "for every two values",
            "rope_scaling",
        )
    magnitude = math.sqrt(1 + math.log(max_position / original) / math.log(original))
    fixed = {"rope_type": "factors", "factors": tuple(factors), "magnitude": magnitude}
    return RopeConfig(head_dim, theta, max_position, fixed)


def _num_layers(raw: dict[str, Any], name: str) -> int:
    return positive(raw, name, at_most=MAX_LAYERS)


def _rates(raw: dict[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    rates = json_list(raw, name) if name in raw else default
    return tuple(positive({name: rate}, name) for rate in rates)
