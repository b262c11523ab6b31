"""LoRA checkpoints as VoxCPM's training writes them; the reference's model, and ours, with them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.models.adapters import AdapterTable
from nanovllm.runners.speech import SpeechRunner
from nanovllm.worker.loading import LoadedEngine, load_engine
from tests.small_engine import SMALL
from tests.voxcpm_oracle import import_reference

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY_LAYER = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PROJECTIONS = ["enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj", "fusion_concat_proj"]
EVERYWHERE: dict[str, Any] = {
    "enable_proj": True,
    "target_modules_lm": EVERY_LAYER,
    "target_modules_dit": EVERY_LAYER,
    "target_proj_modules": PROJECTIONS,
}


def write_adapter(
    checkpoint: Path,
    directory: Path,
    *,
    seed: int = 0,
    r: int = 4,
    alpha: int = 6,
    **settings: Any,
) -> Path:
    """Write a random adapter that changes what a model says a good deal.

    Args:
        checkpoint: The model's directory.
        directory: Where to.
        seed: Of the matrices.
        r: Rank.
        alpha: The adapter is scaled by alpha / r.
        settings: More of the reference's `LoRAConfig`.
    """
    settings = {"enable_lm": True, "enable_dit": True, **settings, "r": r, "alpha": alpha}
    model = load_with_lora(checkpoint, settings)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.5 * torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5
        for name, tensor in sorted(model.get_lora_state_dict().items())
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_files(directory, tensors, settings)
    return directory


def write_files(directory: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write the two files of an adapter."""
    save_file(tensors, directory / "lora_weights.safetensors")
    config = {"base_model": "openbmb/VoxCPM", "lora_config": settings}
    (directory / "lora_config.json").write_text(json.dumps(config), encoding="utf-8")


def load_with_lora(checkpoint: Path, settings: dict[str, Any]) -> Any:
    """The reference's model of a checkpoint, prepared for adapters."""
    v1, v2 = import_reference()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    module = v2 if config["architecture"] == "voxcpm2" else v1
    model_class = module.VoxCPM2Model if module is v2 else module.VoxCPMModel
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        return model_class.from_local(
            str(checkpoint),
            optimize=False,
            device="cpu",
            lora_config=module.LoRAConfig(**settings),
        )


def load_adapted(checkpoint: Path, adapter: Path) -> Any:
    """The reference's model of a checkpoint with an adapter."""
    raw = json.loads((adapter / "lora_config.json").read_text(encoding="utf-8"))
    model = load_with_lora(checkpoint, raw["lora_config"])
    loaded, skipped = model.load_lora_weights(str(adapter))
    assert loaded
    assert not skipped
    return model


def load_small(checkpoint: Path, **options: Any) -> LoadedEngine:
    """An engine of ours that takes adapters, one at a time unless the options say otherwise."""
    return load_engine(EngineConfig(**SMALL | options), checkpoint)


def speech_runner(loaded: LoadedEngine) -> SpeechRunner:
    assert isinstance(loaded.runner, SpeechRunner)
    return loaded.runner


def adapters_of(loaded: LoadedEngine) -> AdapterTable:
    adapters = speech_runner(loaded).adapters
    assert adapters is not None
    return adapters
