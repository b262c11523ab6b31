#!/usr/bin/env python3
"""Build tiny, randomly initialised VoxCPM model directories and run the REFERENCE package on CPU.

Purpose: an independent numeric oracle for tests of a VoxCPM engine.  It uses the PyPI package
`voxcpm==2.0.3` installed with --no-deps; nothing of that package is copied here.

    uv venv vox --python 3.11
    uv pip install --python vox/bin/python torch==2.13.0 numpy pydantic einops transformers   # (tqdm, safetensors, huggingface-hub come along)
    uv pip install --python vox/bin/python --no-deps voxcpm==2.0.3
    vox/bin/python voxcpm_oracle.py --out /some/dir            # all checks, ~10 s on 1 CPU core

Not needed (stubbed or never imported): torchaudio, librosa, torchcodec, modelscope, funasr, gradio, datasets, wetext,
inflect, spaces, argbind, matplotlib, soundfile.

Library use:
    from voxcpm_oracle import import_reference, make_model_dir, load_reference, feed_noise, generate, golden
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
import types
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*weight_norm.*")

import numpy as np
import torch

# --------------------------------------------------------------------------------------------------------------------
# 1. importing the reference package without its heavy dependencies
# --------------------------------------------------------------------------------------------------------------------


def import_reference():
    """Import voxcpm.model.voxcpm and voxcpm.model.voxcpm2 without running voxcpm/__init__ (which wants everything).

    voxcpm.modules.*        needs torch, numpy, pydantic, einops
    voxcpm.model.utils      + transformers
    voxcpm.model.voxcpm     + tqdm, safetensors (both come with transformers) and a module called `torchaudio`
    voxcpm.model.voxcpm2    + a module called `librosa`
    torchaudio and librosa are only called for loading audio *files*; empty stand-ins are enough when latents or
    in-memory prompt caches are used.
    """
    if "voxcpm.model.voxcpm2" in sys.modules:
        return sys.modules["voxcpm.model.voxcpm"], sys.modules["voxcpm.model.voxcpm2"]
    base = None
    for p in sys.path:
        if p and os.path.isdir(os.path.join(p, "voxcpm", "modules")):
            base = os.path.join(p, "voxcpm")
            break
    if base is None:
        raise ModuleNotFoundError("voxcpm is not installed: pip install --no-deps voxcpm==2.0.3")
    for name, path in (("voxcpm", base), ("voxcpm.model", os.path.join(base, "model"))):
        if name not in sys.modules:
            pkg = types.ModuleType(name)
            pkg.__path__ = [path]  # a namespace-like stand-in: sub-modules are found, __init__ is not executed
            sys.modules[name] = pkg
    from transformers import LlamaTokenizerFast  # noqa: F401  first: it probes sys.modules["torchaudio"].__spec__

    stand_ins = [n for n in ("torchaudio", "librosa") if n not in sys.modules and importlib.util.find_spec(n) is None]
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
    try:
        v1 = importlib.import_module("voxcpm.model.voxcpm")
        v2 = importlib.import_module("voxcpm.model.voxcpm2")
    finally:
        for name in stand_ins:  # the reference modules keep their reference; nobody else should find an empty module
            sys.modules.pop(name, None)
    for m in (v1, v2):
        m.tqdm = lambda it, *a, **k: it  # a progress bar per generation is noise in tests
    return v1, v2


# --------------------------------------------------------------------------------------------------------------------
# 2. tiny configurations (same field names as the real config.json)
# --------------------------------------------------------------------------------------------------------------------

HEAD_DIM = 16


def _lm(hidden, layers, *, vocab=512, kv_channels=None, use_mup=False, long_ctx=False):
    n = HEAD_DIM // 2
    short = [1.0 + 0.05 * i for i in range(n)]
    long = [1.0 + 0.25 * i for i in range(n)]
    cfg = dict(
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        # max > original selects long_factor AND an amplitude factor != 1; real checkpoints have both equal (32768)
        max_position_embeddings=1024 if long_ctx else 512,
        num_attention_heads=4,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=10000,
        rope_scaling=dict(type="longrope", long_factor=long, short_factor=short, original_max_position_embeddings=512),
        vocab_size=vocab,
        use_mup=use_mup,
        scale_emb=12,
        dim_model_base=256,
        scale_depth=1.4,
    )
    if kv_channels is not None:
        cfg["kv_channels"] = kv_channels
    return cfg


def tiny_config(kind: str, *, dtype="float32", use_mup=False, long_ctx=False) -> dict:
    """kind: 'v1' (0.5B-like, patch 2, 4 strides), 'v1.5' (patch 4, 5 strides with odd strides), 'v2'."""
    cfm = dict(sigma_min=1e-6, solver="euler", t_scheduler="log-norm", inference_cfg_rate=2.0)
    if kind in ("v1", "v1.5"):
        vae = (
            dict(encoder_dim=8, encoder_rates=[2, 5, 8, 8], latent_dim=16, decoder_dim=64, decoder_rates=[8, 8, 5, 2],
                 depthwise=True, sample_rate=16000)
            if kind == "v1"
            else dict(encoder_dim=8, encoder_rates=[2, 3, 6, 7, 7], latent_dim=16, decoder_dim=64,
                      decoder_rates=[7, 7, 6, 3, 2], depthwise=True, sample_rate=44100)
        )
        return dict(
            architecture="voxcpm",
            lm_config=_lm(64, 3, use_mup=use_mup, long_ctx=long_ctx),
            patch_size=2 if kind == "v1" else 4,
            feat_dim=16,
            residual_lm_num_layers=2,
            scalar_quantization_latent_dim=32,
            scalar_quantization_scale=9,
            encoder_config=dict(hidden_dim=64, ffn_dim=128, num_heads=4, num_layers=2),
            dit_config=dict(hidden_dim=64, ffn_dim=128, num_heads=4, num_layers=2, cfm_config=cfm),
            audio_vae_config=vae,
            max_length=512,
            device="cpu",
            dtype=dtype,
        )
    if kind == "v2":
        # hidden 96 with 4 heads of 16: kv_channels decouples head_dim from hidden_size, as in the real VoxCPM2
        return dict(
            architecture="voxcpm2",
            lm_config=_lm(96, 3, kv_channels=HEAD_DIM, use_mup=use_mup, long_ctx=long_ctx),
            patch_size=4,
            feat_dim=16,
            residual_lm_num_layers=2,
            residual_lm_no_rope=True,
            scalar_quantization_latent_dim=32,
            scalar_quantization_scale=9,
            encoder_config=dict(hidden_dim=48, ffn_dim=96, num_heads=4, num_layers=2, kv_channels=HEAD_DIM),
            dit_config=dict(hidden_dim=48, ffn_dim=96, num_heads=4, num_layers=2, kv_channels=HEAD_DIM,
                            dit_mean_mode=False, cfm_config=cfm),
            audio_vae_config=dict(encoder_dim=8, encoder_rates=[2, 5, 8, 8], latent_dim=16, decoder_dim=128,
                                  decoder_rates=[8, 6, 5, 2, 2, 2], depthwise=True, sample_rate=16000,
                                  out_sample_rate=48000, sr_bin_boundaries=[20000, 30000, 40000],
                                  cond_type="scale_bias"),
            max_length=512,
            device="cpu",
            dtype=dtype,
        )
    raise ValueError(kind)


# --------------------------------------------------------------------------------------------------------------------
# 3. a tiny Llama-style tokenizer directory (sentencepiece-BPE emulation, byte fallback, some multi-character Chinese)
# --------------------------------------------------------------------------------------------------------------------


def make_tokenizer(path: str, vocab_size: int = 512) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def add(tok):
        vocab.setdefault(tok, len(vocab))

    for b in range(256):
        add(f"<0x{b:02X}>")
    for i in range(4):  # occupy more ids; ids 101..104 are the *reserved audio tokens* and are byte tokens here
        add(f"<reserved_{i}>")
    add("▁")
    for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'()-":
        add(c)
    for c in "你好世界今天气很":
        add(c)
    merges = []

    def merge(a, b):
        add(a + b)
        merges.append((a, b))

    for a, b in [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e"), ("l", "l"), ("▁", "w"), ("o", "r"),
                 ("你", "好"), ("世", "界"), ("今", "天"), ("天", "气")]:
        if a in vocab and b in vocab:
            merge(a, b)
    assert len(vocab) <= vocab_size, len(vocab)
    while len(vocab) < vocab_size:
        add(f"<pad_{len(vocab)}>")
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tok.save(os.path.join(path, "tokenizer.json"))
    with open(os.path.join(path, "tokenizer_config.json"), "w") as f:
        json.dump(dict(tokenizer_class="LlamaTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                       add_bos_token=True, add_eos_token=False, legacy=True, clean_up_tokenization_spaces=False), f)
    with open(os.path.join(path, "special_tokens_map.json"), "w") as f:
        json.dump(dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), f)


# --------------------------------------------------------------------------------------------------------------------
# 4. writing a model directory with random weights
# --------------------------------------------------------------------------------------------------------------------


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Deterministic, *informative* random weights: norms not 1, embeddings of order 1, biases not 0, snake alpha > 0."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if p.ndim == 0:
            continue
        if name.endswith("norm.weight") or "layernorm.weight" in name:
            v = 1.0 + 0.2 * torch.randn(p.shape, generator=g)
        elif name.endswith(".alpha"):
            v = 0.5 + torch.rand(p.shape, generator=g)
        elif name.endswith("scale_embed.weight"):
            v = 1.0 + 0.2 * torch.randn(p.shape, generator=g)
        elif name.endswith(".weight_g"):
            # small gains, smaller still for the last convolution: the waveform stays well inside (-1, 1), otherwise
            # tanh saturates and any comparison of waveforms is meaningless
            v = (0.3 + 0.3 * torch.rand(p.shape, generator=g)) * (0.3 if p.numel() == 1 else 1.0)
        elif name.endswith("special_token"):
            v = torch.randn(p.shape, generator=g)
        elif name.endswith("embed_tokens.weight"):
            v = torch.randn(p.shape, generator=g)
        elif name.endswith(".bias"):
            v = 0.1 * torch.randn(p.shape, generator=g)
        else:
            fan_in = p.shape[1] if p.ndim == 2 else p[0].numel()
            v = torch.randn(p.shape, generator=g) / max(fan_in, 1) ** 0.5
        p.data.copy_(v)


def make_model_dir(path: str, kind: str, *, seed: int = 0, stop_bias: float | None = None, **cfg_kw) -> dict:
    """Write config.json, model.safetensors, audiovae.pth ({'state_dict': ...}) and the tokenizer files.

    stop_bias: None -> random stop head; +1.0 / -1.0 -> the stop class always / never wins (rows of stop_head set).
    """
    from safetensors.torch import save_file

    v1, v2 = import_reference()
    cfg = tiny_config(kind, **cfg_kw)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(cfg, f, indent=1)
    make_tokenizer(path, cfg["lm_config"]["vocab_size"])

    mod = v2 if kind == "v2" else v1
    vae_cls, vae_cfg_cls = (v2.AudioVAEV2, v2.AudioVAEConfigV2) if kind == "v2" else (v1.AudioVAE, v1.AudioVAEConfig)
    model_cls = v2.VoxCPM2Model if kind == "v2" else v1.VoxCPMModel
    pcfg = mod.VoxCPMConfig.model_validate(cfg)
    vae = vae_cls(vae_cfg_cls.model_validate(cfg["audio_vae_config"]))
    from transformers import LlamaTokenizerFast

    model = model_cls(pcfg, LlamaTokenizerFast.from_pretrained(path), vae, None, device="cpu")
    _randomise(model, seed)
    if stop_bias is not None:
        # stop_head has no bias: make the two rows opposite along a direction that SiLU keeps positive on average
        w = torch.full_like(model.stop_head.weight[0], 0.05).abs()
        model.stop_proj.bias.data.fill_(3.0)
        model.stop_head.weight.data[1] = w * stop_bias
        model.stop_head.weight.data[0] = -w * stop_bias
    sd = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("audio_vae.")}
    if cfg["dtype"] in ("bfloat16", "bf16"):
        sd = {k: v.to(torch.bfloat16) for k, v in sd.items()}
    save_file(sd, os.path.join(path, "model.safetensors"))
    torch.save({"state_dict": vae.state_dict()}, os.path.join(path, "audiovae.pth"))
    return cfg


# --------------------------------------------------------------------------------------------------------------------
# 5. loading and running
# --------------------------------------------------------------------------------------------------------------------


def load_reference(path: str):
    v1, v2 = import_reference()
    arch = json.load(open(os.path.join(path, "config.json"))).get("architecture", "voxcpm").lower()
    cls = v2.VoxCPM2Model if arch == "voxcpm2" else v1.VoxCPMModel
    # optimize=False: no torch.compile, no warm-up.  device="cpu" also overrides config.device.
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        return cls.from_local(path, optimize=False, device="cpu")


@contextlib.contextmanager
def feed_noise(noises):
    """Feed pre-drawn tensors, one per generated patch, shape (B, feat_dim, patch_size), to the CFM sampler.

    The sampler calls torch.randn((b, C, P), device=, dtype=) exactly once per patch; nothing else in inference calls
    torch.randn as long as audio_vae_config.use_noise_block is false (it is, in all releases).
    torch.randn as long as audio_vae_config.use_noise_block is false (it is, in all releases).
    """
    it, real = iter(noises), torch.randn

    def fake(*shape, **kw):
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        z = next(it)
        assert tuple(z.shape) == tuple(size), (z.shape, size)
        return z.to(dtype=kw.get("dtype", z.dtype))

    torch.randn = fake
    try:
        yield
    finally:
        torch.randn = real


def draw_noise(model, n: int, seed: int = 1234, batch: int = 1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn((batch, model.feat_dim, model.patch_size), generator=g) for _ in range(n)]


def generate(model, text: str, noises, *, cache=None, timesteps=10, cfg_value=2.0, min_len=2, max_len=8, streaming=False,
             **kw):
    """-> (list of float32 1-D chunks, features (T, P, D) tensor).  `cache` as returned by build_prompt_cache."""
    with feed_noise(noises):
        if streaming:
            chunks, feats = [], None
            for wav, _, f in model.generate_with_prompt_cache_streaming(
                target_text=text, prompt_cache=cache, min_len=min_len, max_len=max_len, inference_timesteps=timesteps,
                cfg_value=cfg_value, **kw):
                chunks.append(wav.squeeze(0).numpy().copy())
                feats = f
            return chunks, feats
        wav, _, f = model.generate_with_prompt_cache(
            target_text=text, prompt_cache=cache, min_len=min_len, max_len=max_len, inference_timesteps=timesteps,
            cfg_value=cfg_value, **kw)
        return [wav.squeeze(0).numpy()], f


def encode_prompt(model, wave: torch.Tensor, side: str = "left") -> torch.Tensor:
    """(1, T) waveform at the VAE's encoder rate -> (patches, P, D) latents, padded like the reference pads files.

    Reference padding: prompt (continuation) audio on the LEFT, VoxCPM2 reference audio on the RIGHT.
    """
    n = model.patch_size * model.chunk_size
    pad = -wave.shape[1] % n
    wave = torch.nn.functional.pad(wave, (pad, 0) if side == "left" else (0, pad))
    with torch.inference_mode():
        lat = model.audio_vae.encode(wave, model.audio_vae.sample_rate)  # (1, D, frames)
    return lat[0].T.reshape(-1, model.patch_size, model.audio_vae.latent_dim)


def golden(model, text: str, noises, **kw) -> dict[str, torch.Tensor]:
    """Record what a re-implementation must reproduce, step by step (module hooks only)."""
    rec: dict[str, list] = {k: [] for k in ("mu", "cond", "patch", "stop_logits", "feat_embed", "base_lm", "residual_lm")}
    hs = []
    hs.append(model.feat_decoder.register_forward_hook(
        lambda m, a, k, o: (rec["mu"].append(k["mu"].clone()), rec["cond"].append(k["cond"].clone()),
                            rec["patch"].append(o.clone())) and None, with_kwargs=True))
    hs.append(model.stop_head.register_forward_hook(lambda m, a, o: rec["stop_logits"].append(o.clone()) and None))
    hs.append(model.enc_to_lm_proj.register_forward_hook(lambda m, a, o: rec["feat_embed"].append(o.clone()) and None))
    # prefill goes through forward(), decode through forward_step() (not a Module call): wrap forward_step
    wrapped = []
    for name in ("base_lm", "residual_lm"):
        lm = getattr(model, name)
        hs.append(lm.register_forward_hook(lambda m, a, k, o, n=name: rec[n].append(o[0][:, -1].clone()) and None,
                                           with_kwargs=True))
        orig = lm.forward_step

        def step(x, pos, _o=orig, _n=name):
            y = _o(x, pos)
            rec[_n].append(y.clone())
            return y

        lm.forward_step = step
        wrapped.append((lm, orig))
    try:
        chunks, feats = generate(model, text, noises, **kw)
    finally:
        for h in hs:
            h.remove()
        for lm, orig in wrapped:
            del lm.forward_step
    out = {k: torch.stack([t.squeeze(0) for t in v]) for k, v in rec.items() if v and k != "feat_embed"}
    out["prefill_feat_embed"] = rec["feat_embed"][0].squeeze(0)
    out["waveform"] = torch.from_numpy(np.concatenate(chunks))
    out["features"] = feats if torch.is_tensor(feats) else torch.cat(feats, 1).squeeze(0)
    return out
