"""Checkpoint tensors into a model's parameters."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.layers.linear import PackedLinear
from nanovllm.models.decoder import CausalLM
from nanovllm.models.model_config import ModelConfig, read_json
from nanovllm.models.registry import CLASSES

logger = logging.getLogger(__name__)

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints store and everyone recomputes."""


def load_model(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    dummy_seed: int | None = None,
) -> CausalLM:
    """Build the model of a config and fill it from the checkpoint in a directory.

    Args:
        directory: Holds the safetensors files.
        config: The checkpoint's hyper-parameters.
        dtype: Dtype of the parameters; tensors are converted.
        device: Where they live.
        dummy_seed: Fill with random values from this seed instead of reading files.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        UnsupportedModelError: The architecture or the format is not one we read.
        ValueError: Tensors are missing, unexpected, of the wrong shape, or a file is corrupt.
    """
    with torch.device("meta"):
        model = CLASSES[config.architecture](config)
    model = model.to(dtype).to_empty(device=device).eval()
    if dummy_seed is None:
        fill(model, read_tensors(weight_files(directory)))
    else:
        fill_randomly(model, dummy_seed)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Raises:
        FileNotFoundError: There are none, or the index names one that is missing.
        UnsupportedModelError: There are weights of another format only.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names files that are missing: {missing}")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if files:
        return files
    for suffix in (".gguf", ".bin", ".pt", ".pth", ".onnx", ".msgpack", ".h5"):
        if any(directory.glob(f"*{suffix}")):
            raise UnsupportedModelError(
                f"{directory} holds {suffix} weights, which are not supported; supported: "
                "*.safetensors"
            )
    raise FileNotFoundError(
        f"no *.safetensors in {directory}; for random weights say dummy_weights (--dummy-weights)"
    )


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the files, one at a time.

    Raises:
        InvalidRequestError: A file is corrupt.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        except SafetensorError as e:
            raise InvalidRequestError(f"{path} is not a readable safetensors file: {e}") from e


@torch.inference_mode()
def fill(model: CausalLM, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy checkpoint tensors into the parameters, packing those that are packed.

    Raises:
        ValueError: `Missing parameters: [...]`, `Unexpected parameters: [...]`, or a wrong shape.
    """
    targets = checkpoint_targets(model)
    missing, unexpected = set(targets), []
    for name, tensor in tensors:
        if name.endswith(IGNORED_SUFFIXES) or (model.lm_head is None and name == "lm_head.weight"):
            continue
        if name not in targets:
            unexpected.append(name)
            continue
        target = targets[name]
        if target.shape != tensor.shape:
            raise InvalidRequestError(
                f"parameter {name} has shape {list(tensor.shape)} in the checkpoint; config.json "
                f"makes it {list(target.shape)}"
            )
        target.copy_(tensor)
        missing.discard(name)
    complaints = []
    if missing:
        complaints.append(f"Missing parameters: {sorted(missing)}")
    if unexpected:
        complaints.append(f"Unexpected parameters: {sorted(unexpected)}")
    if complaints:
        raise InvalidRequestError("; ".join(complaints))


def checkpoint_targets(model: nn.Module) -> dict[str, Tensor]:
    """Where each tensor goes, by its name in the checkpoint."""
    targets: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, PackedLinear):
                parent = path.rpartition(".")[0]
                for part in module.parts:
                    targets[f"{parent}.{part}.{name}"] = parameter[module.rows_of(part)]
            else:
                targets[f"{path}.{name}"] = parameter
    return targets


@torch.inference_mode()
def fill_randomly(model: nn.Module, seed: int) -> None:
    """Fill with seeded values of the usual scales: norms 1, biases 0, matrices Xavier-normal."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = 0.02 if name.endswith("embed_tokens.weight") else parameter.shape[1] ** -0.5
            # Uniform values of that standard deviation: three times as fast to draw as normal.
            parameter.uniform_(-std * math.sqrt(3), std * math.sqrt(3), generator=generator)
