"""Tiny VoxCPM checkpoints, and the import of the reference package that writes them."""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*weight_norm.*")

HEAD_DIM = 16
KINDS = ("v1", "v1.5", "v2")
"""Like VoxCPM-0.5B (patches of 2), VoxCPM1.5 (patches of 4, odd strides) and VoxCPM2."""

CFM = {
    "sigma_min": 1e-6,
    "solver": "euler",
    "t_scheduler": "log-norm",
    "inference_cfg_rate": 2.0,
}


def import_reference() -> tuple[types.ModuleType, types.ModuleType]:
    """Import the modules of VoxCPM 1 and VoxCPM 2 without running `voxcpm/__init__`.

    The package declares far more than its networks need, and its `__init__` imports all of that.
    torchaudio and librosa, which they import to read audio files, may be missing.
    """
    if "voxcpm.model.voxcpm2" in sys.modules:
        return sys.modules["voxcpm.model.voxcpm"], sys.modules["voxcpm.model.voxcpm2"]
    bases = (Path(path) / "voxcpm" for path in sys.path if path)
    base = next((path for path in bases if (path / "modules").is_dir()), None)
    if base is None:
        raise ModuleNotFoundError("voxcpm is not installed: pip install --no-deps voxcpm==2.0.3")
    for name, path in (("voxcpm", base), ("voxcpm.model", base / "model")):
        if name not in sys.modules:
            # A package of which submodules are found, but whose __init__ does not run.
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
    with _stand_ins("torchaudio", "librosa"):
        modules = [
            importlib.import_module(f"voxcpm.model.{name}") for name in ("voxcpm", "voxcpm2")
        ]
    for module in modules:
        vars(module)["tqdm"] = lambda steps, *args, **kwargs: steps
    return modules[0], modules[1]


@contextlib.contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Empty modules for packages that are missing; nobody else should find them."""
    missing = [
        name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None
    ]
    sys.modules.update({name: types.ModuleType(name) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def tiny_config(
    kind: str, *, dtype: str = "float32", use_mup: bool = False, long_ctx: bool = False
) -> dict[str, Any]:
    """The `config.json` of a tiny model, with the strides and thus the sample rates of a real one.

    Args:
        kind: One of `KINDS`.
        dtype: Of the weights.
        use_mup: Whether residuals and text embeddings are scaled, which releases do not do.
        long_ctx: Whether the long factors of the rotary positions apply, and an amplitude.
    """
    if kind not in KINDS:
        raise ValueError(kind)
    # VoxCPM2 uncouples the width of a head from that of the residual stream.
    v2 = kind == "v2"
    hidden_size = 96 if v2 else 64
    local: dict[str, Any] = {"hidden_dim": 48, "ffn_dim": 96, "kv_channels": HEAD_DIM}
    if not v2:
        local = {"hidden_dim": 64, "ffn_dim": 128}
    local |= {"num_heads": 4, "num_layers": 2}
    return {
        "architecture": "voxcpm2" if v2 else "voxcpm",
        "lm_config": _lm_config(hidden_size, use_mup, long_ctx)
        | ({"kv_channels": HEAD_DIM} if v2 else {}),
        "patch_size": 2 if kind == "v1" else 4,
        "feat_dim": 16,
        "residual_lm_num_layers": 2,
        **({"residual_lm_no_rope": True} if v2 else {}),
        "scalar_quantization_latent_dim": 32,
        "scalar_quantization_scale": 9,
        "encoder_config": local,
        "dit_config": local | {"cfm_config": CFM} | ({"dit_mean_mode": False} if v2 else {}),
        "audio_vae_config": _vae_config(kind),
        "max_length": 512,
        "device": "cpu",
        "dtype": dtype,
    }


def _lm_config(hidden_size: int, use_mup: bool, long_ctx: bool) -> dict[str, Any]:
    num_factors = HEAD_DIM // 2
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 2,
        "max_position_embeddings": 1024 if long_ctx else 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + 0.25 * i for i in range(num_factors)],
            "short_factor": [1.0 + 0.05 * i for i in range(num_factors)],
            "original_max_position_embeddings": 512,
        },
        "vocab_size": 512,
        "use_mup": use_mup,
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
    }


def _vae_config(kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "encoder_dim": 8,
        "encoder_rates": [2, 5, 8, 8],
        "latent_dim": 16,
        "decoder_dim": 64,
        "decoder_rates": [8, 8, 5, 2],
        "depthwise": True,
        "sample_rate": 16000,
    }
    if kind == "v1.5":
        config |= {
            "encoder_rates": [2, 3, 6, 7, 7],
            "decoder_rates": [7, 7, 6, 3, 2],
            "sample_rate": 44100,
        }
    if kind == "v2":
        config |= {
            "decoder_dim": 128,
            "decoder_rates": [8, 6, 5, 2, 2, 2],
            "out_sample_rate": 48000,
            "sr_bin_boundaries": [20000, 30000, 40000],
            "cond_type": "scale_bias",
        }
    return config


def make_tokenizer(directory: str | Path, vocab_size: int = 512) -> None:
    """Write a tokenizer in the manner of sentencepiece, with Chinese tokens of two characters.

    Ids 101 to 104, which mark audio, fall on bytes here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'()-"
    pairs = ("▁ t", "▁t h", "▁th e", "h e", "l l", "▁ w", "o r", "你 好", "世 界", "今 天", "天 气")
    merges = [(left, right) for left, right in map(str.split, pairs)]
    tokens = [
        *("<unk>", "<s>", "</s>"),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(f"<reserved_{i}>" for i in range(4)),
        *("▁" + characters + "你好世界今天气很"),
        *("".join(pair) for pair in merges),
    ]
    tokens += [f"<pad_{i}>" for i in range(len(tokens), vocab_size)]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:3]])
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    settings = special | {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(Path(directory) / "tokenizer_config.json", settings)
    _write_json(Path(directory) / "special_tokens_map.json", special)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def random_value(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Values that tell a mistake apart: norms are not 1, biases not 0, embeddings of order 1."""
    shape = parameter.shape
    noise = torch.randn if not name.endswith((".alpha", ".weight_g")) else torch.rand
    value: Tensor = noise(shape, generator=generator)
    if name.endswith(("norm.weight", "scale_embed.weight")):
        return 1.0 + 0.2 * value
    if name.endswith(".alpha"):
        return 0.5 + value
    if name.endswith(".weight_g"):
        # Small, and smaller for the last convolution: waveforms that saturate are all alike.
        return (0.3 + 0.3 * value) * (0.3 if parameter.numel() == 1 else 1.0)
    if name.endswith(("special_token", "embed_tokens.weight")):
        return value
    if name.endswith(".bias"):
        return 0.1 * value
    fan_in = shape[1] if parameter.ndim == 2 else parameter[0].numel()
    return value / math.sqrt(max(fan_in, 1))


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim:
            parameter.data.copy_(random_value(name, parameter, generator))


def make_model_dir(
    directory: str | Path,
    kind: str,
    *,
    seed: int = 0,
    stop_bias: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a tiny checkpoint as the releases are laid out: weights, VAE, tokenizer.

    Args:
        directory: Where to.
        kind: One of `KINDS`.
        seed: Of the weights.
        stop_bias: 1.0 stops at every patch, -1.0 at none; None leaves the stop head random.
        options: See `tiny_config`.

    Returns:
        The content of `config.json`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(kind, **options)
    _write_json(directory / "config.json", config)
    make_tokenizer(directory, config["lm_config"]["vocab_size"])
    model: Any = _untrained(directory, kind, config)
    _randomise(model, seed)
    if stop_bias is not None:
        # The head has no bias: its rows are opposite along a direction that SiLU keeps positive.
        row = torch.full_like(model.stop_head.weight[0], 0.05) * stop_bias
        model.stop_proj.bias.data.fill_(3.0)
        model.stop_head.weight.data.copy_(torch.stack((-row, row)))
    dtype = torch.bfloat16 if config["dtype"] in ("bfloat16", "bf16") else torch.float32
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("audio_vae.")
    }
    save_file(tensors, directory / "model.safetensors")
    torch.save({"state_dict": model.audio_vae.state_dict()}, directory / "audiovae.pth")
    return config


def _untrained(directory: Path, kind: str, config: dict[str, Any]) -> torch.nn.Module:
    """The reference's model of a config, in float32."""
    v1, v2 = import_reference()
    vae: Any
    if kind == "v2":
        vae = v2.AudioVAEV2(v2.AudioVAEConfigV2.model_validate(config["audio_vae_config"]))
        model_class, module = v2.VoxCPM2Model, v2
    else:
        vae = v1.AudioVAE(v1.AudioVAEConfig.model_validate(config["audio_vae_config"]))
        model_class, module = v1.VoxCPMModel, v1
    tokenizer = LlamaTokenizerFast.from_pretrained(directory)
    settings = module.VoxCPMConfig.model_validate(config)
    model: torch.nn.Module = model_class(settings, tokenizer, vae, None, device="cpu")
    return model
