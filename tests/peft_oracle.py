"""LoRA checkpoints as PEFT writes them, and the same merged into transformers' model."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LAYER = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_peft(
    checkpoint: Path,
    directory: Path,
    *,
    seed: int = 0,
    r: int = 4,
    lora_alpha: float = 8,
    modules: Sequence[str] = ATTENTION,
    prefix: str = "base_model.model.",
    **config: Any,
) -> Path:
    """Write a random adapter that changes what a model says a good deal.

    Args:
        checkpoint: The model's directory.
        directory: Where to.
        seed: Of the matrices.
        r: Rank, but for what `rank_pattern` has.
        lora_alpha: The adapter is scaled by lora_alpha / r.
        modules: Which linear layers it changes.
        prefix: Of the tensors' names.
        config: More of PEFT's `LoraConfig`.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint),
        "bias": "none",
        "target_modules": list(modules),
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "use_dora": False,
        "loftq_config": {},
        "init_lora_weights": True,
        **config,
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (width, depth) in linear_layers(checkpoint, modules).items():
        rank = of_pattern(config.get("rank_pattern") or {}, name, r)
        down = torch.randn(rank, depth, generator=generator) * depth**-0.5
        up = 0.5 * torch.randn(width, rank, generator=generator)
        tensors[f"{prefix}{name}.lora_A.weight"] = down
        tensors[f"{prefix}{name}.lora_B.weight"] = up
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def linear_layers(checkpoint: Path, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Shapes of the weights of a checkpoint's linear layers of these names."""
    weights = load_file(checkpoint / "model.safetensors")
    paths = [name.removesuffix(".weight") for name in sorted(weights)]
    shapes = {path: weights.get(f"{path}.weight") for path in paths}
    return {
        path: (weight.shape[0], weight.shape[1])
        for path, weight in shapes.items()
        if weight is not None and path.rpartition(".")[2] in modules
    }


def of_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """What PEFT's `get_pattern_key` finds for a module."""
    found = (v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def merged(
    checkpoint: Path, adapter: Path, rounded: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """Transformers' model with an adapter merged into its weights: `W + scale * B A`.

    Args:
        checkpoint: The model's directory.
        adapter: The adapter's.
        rounded: What becomes of the model's own matrices before.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if rounded is not None:
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = rounded(parameter.data)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        rank = of_pattern(config.get("rank_pattern") or {}, path, config["r"])
        alpha = of_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        up = tensors[name.replace(".lora_A.", ".lora_B.")]
        with torch.no_grad():
            model.get_submodule(path).weight.add_(scale * up @ down)
    return model


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers' model goes on with."""
    ids: Tensor = torch.tensor([list(prompt)])
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found
