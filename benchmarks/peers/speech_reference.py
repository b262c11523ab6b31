"""The reference package `voxcpm`, with random weights. Its imports of audio files are left out."""

import contextlib
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

from peers.speech_worker import TEXT, Speak, work


def import_reference() -> types.ModuleType:
    """The module of both generations, without what reads files and shows web pages."""
    from transformers import PreTrainedTokenizerFast  # noqa: F401  # it looks for torchaudio

    spec = next(p for p in map(Path, sys.path) if (p / "voxcpm" / "modules").is_dir()) / "voxcpm"
    for name, path in (("voxcpm", spec), ("voxcpm.model", spec / "model")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    for name in ("torchaudio", "librosa"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    return types.SimpleNamespace(  # type: ignore[return-value]
        v1=importlib.import_module("voxcpm.model.voxcpm"),
        v2=importlib.import_module("voxcpm.model.voxcpm2"),
    )


def build(directory: Path) -> Any:
    """A model of random weights whose stop head never stops."""
    from transformers import PreTrainedTokenizerFast

    reference = import_reference()
    raw = json.loads((directory / "config.json").read_text())
    is_v2 = raw["architecture"] == "voxcpm2"
    module = reference.v2 if is_v2 else reference.v1
    config = module.VoxCPMConfig.model_validate(raw | {"device": "cpu", "max_length": 1024})
    vae_class, vae_config, model_class = (
        (module.AudioVAEV2, module.AudioVAEConfigV2, module.VoxCPM2Model)
        if is_v2
        else (module.AudioVAE, module.AudioVAEConfig, module.VoxCPMModel)
    )
    vae = vae_class(vae_config.model_validate(raw["audio_vae_config"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    model = model_class(config, tokenizer, vae, None, device="cpu").to(torch.bfloat16)
    model.audio_vae = model.audio_vae.to(torch.float32)
    torch.nn.init.zeros_(model.stop_head.weight)
    return model.eval()


def load(settings: dict[str, Any]) -> Speak:
    """Build the model; what it streams is what is timed, as that is what ours does."""
    torch.set_num_threads(settings["num_threads"])
    with contextlib.redirect_stdout(sys.stderr):
        model = build(Path(settings["model"]))
    num_patches = settings["num_patches"]

    def speak(num_streams: int) -> dict[str, float]:
        start = time.perf_counter()
        first, num_samples = 0.0, 0
        for _ in range(num_streams):
            for chunk in model.generate_streaming(
                target_text=TEXT,
                min_len=num_patches,
                max_len=num_patches,
                inference_timesteps=settings["inference_timesteps"],
            ):
                num_samples += chunk.shape[-1]
                first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        rate = getattr(model.audio_vae, "out_sample_rate", model.audio_vae.sample_rate)
        return {"seconds": seconds, "first": first, "audio": num_samples / rate}

    return speak


if __name__ == "__main__":
    work(load)
