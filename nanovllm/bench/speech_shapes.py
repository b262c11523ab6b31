"""Checkpoint directories of the published sizes without weights, for `dummy_weights`."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanovllm.errors import InvalidRequestError


def _lm(hidden: int, ffn: int, layers: int, head_dim: int) -> dict[str, Any]:
    """A MiniCPM4; the factors of its rotary embedding take no time, so any will do."""
    factors = [1.0 + 30.0 * i / (head_dim // 2 - 1) for i in range(head_dim // 2)]
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "kv_channels": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": 32768,
        },
        "max_position_embeddings": 32768,
        "vocab_size": 73448,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_mup": False,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    }


def _local(layers: int, head_dim: int) -> dict[str, Any]:
    """The encoder or decoder of patches."""
    sizes = {"hidden_dim": 1024, "ffn_dim": 4096, "num_heads": 16, "num_layers": layers}
    return sizes | {"kv_channels": head_dim}


def _vae(encoder: tuple[int, list[int]], decoder: tuple[int, list[int]]) -> dict[str, Any]:
    return {
        "encoder_dim": encoder[0],
        "encoder_rates": encoder[1],
        "latent_dim": 64,
        "decoder_dim": decoder[0],
        "decoder_rates": decoder[1],
        "depthwise": True,
        "use_noise_block": False,
    }


_CFM = {"sigma_min": 1e-6, "solver": "euler", "t_scheduler": "log-norm", "inference_cfg_rate": 2.0}
_COMMON = {"feat_dim": 64, "scalar_quantization_scale": 9, "dtype": "bfloat16"}
_V1 = _COMMON | {"architecture": "voxcpm", "scalar_quantization_latent_dim": 256}
RELEASES: dict[str, dict[str, Any]] = {
    "0.5b": _V1
    | {
        "patch_size": 2,
        "residual_lm_num_layers": 6,
        "max_length": 4096,
        "lm_config": _lm(1024, 4096, 24, 64),
        "encoder_config": _local(4, 64),
        "dit_config": _local(4, 64) | {"cfm_config": _CFM},
        "audio_vae_config": _vae((128, [2, 5, 8, 8]), (1536, [8, 8, 5, 2]))
        | {"sample_rate": 16000},
    },
    "1.5": _V1
    | {
        "patch_size": 4,
        "residual_lm_num_layers": 8,
        "max_length": 4096,
        "lm_config": _lm(1024, 4096, 24, 64),
        "encoder_config": _local(8, 64),
        "dit_config": _local(8, 64) | {"cfm_config": _CFM},
        "audio_vae_config": _vae((64, [2, 3, 6, 7, 7]), (2048, [7, 7, 6, 3, 2]))
        | {"sample_rate": 44100},
    },
    "2": _COMMON
    | {
        "architecture": "voxcpm2",
        "scalar_quantization_latent_dim": 512,
        "patch_size": 4,
        "residual_lm_num_layers": 8,
        "residual_lm_no_rope": True,
        "max_length": 8192,
        "lm_config": _lm(2048, 6144, 28, 128),
        "encoder_config": _local(12, 128),
        "dit_config": _local(12, 128) | {"dit_mean_mode": False, "cfm_config": _CFM},
        "audio_vae_config": _vae((128, [2, 5, 8, 8]), (2048, [8, 6, 5, 2, 2, 2]))
        | {
            "sample_rate": 16000,
            "out_sample_rate": 48000,
            "sr_bin_boundaries": [20000, 30000, 40000],
            "cond_type": "scale_bias",
            "cond_dim": 128,
            "cond_out_layer": False,
        },
    },
}
"""`config.json` of each release (sizes: the model cards of openbmb/VoxCPM-0.5B, VoxCPM1.5 and
VoxCPM2)."""


def write_release(directory: Path, release: str) -> Path:
    """Write `config.json` and a tokenizer of bytes, which is all that random weights need.

    Args:
        directory: Where to.
        release: A key of `RELEASES`.

    Raises:
        InvalidRequestError: There is no such release.
    """
    if release not in RELEASES:
        raise InvalidRequestError(
            f"release must be one of {', '.join(RELEASES)}, got {release!r}", "release"
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(RELEASES[release], indent=1))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # 101 to 104 mark where audio begins and ends.
    vocab = {char: 200 + index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
