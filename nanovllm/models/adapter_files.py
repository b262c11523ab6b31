"""LoRA checkpoints as VoxCPM's training writes them: a directory of two files."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.models.checkpoint import Checkpoint
from nanovllm.models.pickled import PickledCheckpoint

CONFIG_FILE = "lora_config.json"
WEIGHT_FILES = ("lora_weights.safetensors", "lora_weights.ckpt")
MAX_CONFIG_BYTES = 1 << 20
COMPILED = "._orig_mod"
"""What `torch.compile` puts into the names of a model's parameters."""


class AdapterFiles(NamedTuple):
    """What a directory holds.

    Args:
        rank: The rank it is said to have; None if it is not said.
        alpha: The adapter is scaled by alpha / rank.
        tensors: Its matrices, by their names.
    """

    rank: int | None
    alpha: float
    tensors: dict[str, Tensor]


def read_adapter_files(directory: Path) -> AdapterFiles:
    """Read an adapter's directory.

    Raises:
        InvalidRequestError: A file is missing, or holds something else than it should.
    """
    try:
        directory = directory.expanduser()
    except RuntimeError as e:  # the home of nobody
        raise InvalidRequestError(f"LoRA directory not found: {directory}: {e}", "path") from e
    if not directory.is_dir():
        raise InvalidRequestError(f"LoRA directory not found: {directory}", "path")
    rank, alpha = _read_config(directory / CONFIG_FILE)
    tensors = _read_tensors(directory)
    if not tensors:
        raise InvalidRequestError(f"the LoRA in {directory} is empty", "path")
    return AdapterFiles(rank, alpha, {_plain(name): t for name, t in tensors.items()})


def _read_config(path: Path) -> tuple[int | None, float]:
    """The rank, if it is said, and alpha."""
    if not path.is_file():
        raise InvalidRequestError(f"LoRA config not found: {path}", "path")
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {e}", "path") from e
    config = raw.get("lora_config") if isinstance(raw, dict) else None
    if not isinstance(config, dict):
        raise InvalidRequestError(f"{path} must hold an object 'lora_config'", "path")
    rank = config.get("r", config.get("rank"))
    if rank is not None and (type(rank) is not int or rank < 1):
        raise InvalidRequestError(f"{path}: r must be an integer above 0, got {rank!r}", "path")
    alpha: Any = config.get("alpha", config.get("lora_alpha"))
    if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
        raise InvalidRequestError(f"{path}: alpha must be a number above 0, got {alpha!r}", "path")
    return rank, float(alpha)


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of the first weight file there is."""
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise InvalidRequestError(
            f"LoRA weights not found: {directory} has neither {' nor '.join(WEIGHT_FILES)}", "path"
        )
    kind = Checkpoint if path.suffix == ".safetensors" else PickledCheckpoint
    try:
        checkpoint = kind([path])
        return {name: checkpoint.tensor(name) for name in checkpoint.names}
    except OSError as e:
        raise InvalidRequestError(f"{path} cannot be read: {e}", "path") from e


def _plain(name: str) -> str:
    """A parameter's name without what training wraps around the model."""
    return name.replace(COMPILED, "").removeprefix("module.")
