"""The reference package of VoxCPM on a CPU: the oracle of speech."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.voxcpm_checkpoint import (
    KINDS,
    import_reference,
    make_model_dir,
    make_tokenizer,
    tiny_config,
)

__all__ = [
    "KINDS",
    "draw_noise",
    "encode_prompt",
    "feed_noise",
    "generate",
    "golden",
    "import_reference",
    "load_reference",
    "make_model_dir",
    "make_tokenizer",
    "tiny_config",
]


def load_reference(directory: str | Path) -> Any:
    """The reference's model of a checkpoint, uncompiled and on the CPU."""
    v1, v2 = import_reference()
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    is_v2 = config.get("architecture", "voxcpm").lower() == "voxcpm2"
    model_class = v2.VoxCPM2Model if is_v2 else v1.VoxCPMModel
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        return model_class.from_local(str(directory), optimize=False, device="cpu")


@contextlib.contextmanager
def feed_noise(noises: Sequence[Tensor]) -> Iterator[None]:
    """Let the reference's sampler draw these, one a patch, each `[batch, feat_dim, patch_size]`.

    It calls `torch.randn` once a patch, and nothing else does while it generates.
    """
    queue, real = iter(noises), torch.randn

    def fake(*shape: Any, **options: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        noise = next(queue)
        assert tuple(noise.shape) == tuple(size), (noise.shape, size)
        return noise.to(dtype=options.get("dtype", noise.dtype))

    torch.randn = fake
    try:
        yield
    finally:
        torch.randn = real


def draw_noise(model: Any, num_patches: int, seed: int = 1234, batch: int = 1) -> list[Tensor]:
    """Noise for so many patches, each `[batch, feat_dim, patch_size]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.feat_dim, model.patch_size)
    return [torch.randn(shape, generator=generator) for _ in range(num_patches)]


def generate(
    model: Any,
    text: str,
    noises: Sequence[Tensor],
    *,
    cache: Any = None,
    timesteps: int = 10,
    cfg_value: float = 2.0,
    min_len: int = 2,
    max_len: int = 8,
    streaming: bool = False,
    **options: Any,
) -> tuple[list[Any], Any]:
    """Speak with the reference.

    Args:
        model: What `load_reference` returned.
        text: The target text.
        noises: See `feed_noise`.
        cache: What the model's `build_prompt_cache` returned.
        timesteps: Steps of the sampler.
        cfg_value: Weight of the guidance.
        min_len: Two patches more than this come at least.
        max_len: Most patches.
        streaming: Whether to decode patch by patch, as the reference streams.
        options: More of the reference's own.

    Returns:
        The waveform's chunks, float32 `[num_samples]`, and the patches `[num_patches, P, D]`.
    """
    options |= {"target_text": text, "prompt_cache": cache, "min_len": min_len, "max_len": max_len}
    options |= {"inference_timesteps": timesteps, "cfg_value": cfg_value}
    with feed_noise(noises):
        if not streaming:
            wave, _, features = model.generate_with_prompt_cache(**options)
            return [wave.squeeze(0).numpy()], features
        chunks, features = [], None
        for wave, _, features in model.generate_with_prompt_cache_streaming(**options):  # noqa: B007
            chunks.append(wave.squeeze(0).numpy().copy())
        return chunks, features


def encode_prompt(model: Any, wave: Tensor, side: str = "left") -> Tensor:
    """Encode a waveform `[1, num_samples]` at the encoder's rate to patches `[num_patches, P, D]`.

    It is padded as the reference pads files: speech to be continued on the left, a reference on
    the right.
    """
    padding = -wave.shape[1] % (model.patch_size * model.chunk_size)
    wave = torch.nn.functional.pad(wave, (padding, 0) if side == "left" else (0, padding))
    with torch.inference_mode():
        latents: Tensor = model.audio_vae.encode(wave, model.audio_vae.sample_rate)
    return latents[0].T.reshape(-1, model.patch_size, model.audio_vae.latent_dim)


def golden(model: Any, text: str, noises: Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
    """Record what the reference computes while it speaks; see `generate`.

    Returns:
        By step: `mu`, `cond` and `patch` (`[N, D, P]`), `stop_logits` (`[N, 2]`), `base_lm` (before
        FSQ) and `residual_lm` (`[N + 1, h]`, the prompt's last position first). Besides:
        `prefill_feat_embed` (`[num_positions, h]`), `waveform`, `features` (`[N, P, D]`).
    """
    names = ("mu", "cond", "patch", "stop_logits", "feat_embed", "base_lm", "residual_lm")
    records: dict[str, list[Tensor]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        _record(model, records, stack)
        chunks, features = generate(model, text, noises, **options)
    out = {
        name: torch.stack([tensor.squeeze(0) for tensor in tensors])
        for name, tensors in records.items()
        if tensors and name != "feat_embed"
    }
    out["prefill_feat_embed"] = records["feat_embed"][0].squeeze(0)
    out["waveform"] = torch.from_numpy(np.concatenate(chunks))
    whole = torch.is_tensor(features)
    out["features"] = features if whole else torch.cat(features, 1).squeeze(0)
    return out


def _record(model: Any, records: dict[str, list[Tensor]], stack: contextlib.ExitStack) -> None:
    """Hook a model until the stack is unwound."""

    def of_sampler(module: Any, args: Any, options: Any, output: Tensor) -> None:
        for name, tensor in (("mu", options["mu"]), ("cond", options["cond"]), ("patch", output)):
            records[name].append(tensor.clone())

    def of(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0][:, -1] if isinstance(output, tuple) else output
            records[name].append(hidden.clone())

        return hook

    hooks = [
        model.feat_decoder.register_forward_hook(of_sampler, with_kwargs=True),
        model.stop_head.register_forward_hook(of("stop_logits")),
        model.enc_to_lm_proj.register_forward_hook(of("feat_embed")),
        *(
            getattr(model, name).register_forward_hook(of(name))
            for name in ("base_lm", "residual_lm")
        ),
    ]
    for hook in hooks:
        stack.callback(hook.remove)
    for name in ("base_lm", "residual_lm"):
        # Steps after the prompt go through this method, which runs no hooks.
        model_part = getattr(model, name)
        step = model_part.forward_step

        def recorded(x: Tensor, position: Any, step: Any = step, name: str = name) -> Tensor:
            output: Tensor = step(x, position)
            records[name].append(output.clone())
            return output

        model_part.forward_step = recorded
        stack.callback(delattr, model_part, "forward_step")
