"""LoRA checkpoints: a directory of a config and of tensors, as PEFT or VoxCPM's training has it."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.models.adapter_settings import AdapterSettings, peft_settings, voxcpm_settings
from nanovllm.models.checkpoint import Checkpoint, language_model_name
from nanovllm.models.pickled import PickledCheckpoint

MAX_CONFIG_BYTES = 1 << 20
COMPILED = "._orig_mod"
"""What `torch.compile` puts into the names of a model's parameters."""
PEFT_PREFIX = "base_model.model."
PEFT_TENSOR = re.compile(r"(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight")
"""Some say between matrix and `weight` which adapter it is: `lora_A.default.weight`."""


class AdapterFiles(NamedTuple):
    """What a directory holds.

    Args:
        settings: How the matrices go together.
        tensors: The matrices, as `<module>.lora_A` and `<module>.lora_B`.
    """

    settings: AdapterSettings
    tensors: dict[str, Tensor]


class _Format(NamedTuple):
    """A kind of directory: its files, the first of those of weights that is there counts."""

    config: str
    weights: tuple[str, ...]
    settings: Callable[[Mapping[str, Any]], AdapterSettings]
    plain_name: Callable[[str], str]


def read_adapter_files(directory: Path) -> AdapterFiles:
    """Read an adapter's directory.

    Raises:
        InvalidRequestError: A file is missing, or holds something else than it should.
    """
    try:
        directory = directory.expanduser()
        is_there = directory.is_dir()
    except (OSError, RuntimeError) as e:  # a name that is too long, the home of nobody
        raise InvalidRequestError(f"LoRA directory not found: {directory}: {e}", "path") from e
    if not is_there:
        raise InvalidRequestError(f"LoRA directory not found: {directory}", "path")
    form = next((form for form in FORMATS if (directory / form.config).is_file()), None)
    if form is None:
        names = " nor ".join(form.config for form in FORMATS)
        raise InvalidRequestError(f"LoRA config not found: {directory} has neither {names}", "path")
    settings = _read_settings(directory / form.config, form)
    tensors = _read_tensors(directory, form)
    if not tensors:
        raise InvalidRequestError(f"the LoRA in {directory} is empty", "path")
    return AdapterFiles(settings, tensors)


def _read_settings(path: Path, form: _Format) -> AdapterSettings:
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {e}", "path") from e
    if not isinstance(raw, dict):
        raise InvalidRequestError(f"{path} must hold a JSON object", "path")
    try:
        return form.settings(raw)
    except InvalidRequestError as e:
        raise InvalidRequestError(f"{path}: {e}", "path") from e


def _read_tensors(directory: Path, form: _Format) -> dict[str, Tensor]:
    """The tensors of the first weight file there is, by their plain names."""
    path = next((directory / name for name in form.weights if (directory / name).is_file()), None)
    if path is None:
        raise InvalidRequestError(
            f"LoRA weights not found: {directory} has neither {' nor '.join(form.weights)}", "path"
        )
    kind = Checkpoint if path.suffix == ".safetensors" else PickledCheckpoint
    tensors = {}
    try:
        checkpoint = kind([path])
        for name in checkpoint.names:
            plain = form.plain_name(name.replace(COMPILED, "").removeprefix("module."))
            if plain in tensors:
                raise InvalidRequestError(f"{path} holds several tensors {plain}", "path")
            tensors[plain] = checkpoint.tensor(name)
    except OSError as e:
        raise InvalidRequestError(f"{path} cannot be read: {e}", "path") from e
    return tensors


def _peft_name(name: str) -> str:
    """Our name of one of PEFT's tensors.

    Raises:
        InvalidRequestError: It is none of the matrices A and B of linear layers.
    """
    plain = name.removeprefix(PEFT_PREFIX)
    matrix = PEFT_TENSOR.fullmatch(language_model_name(plain) or plain)
    if matrix is None:
        raise InvalidRequestError(
            f"the LoRA has a tensor {name}, which cannot be served: what can is the matrices "
            "lora_A and lora_B of linear layers",
            "path",
        )
    return f"{matrix[1]}.{matrix[2]}"


FORMATS = (
    _Format(
        "adapter_config.json",
        ("adapter_model.safetensors", "adapter_model.bin"),
        peft_settings,
        _peft_name,
    ),
    _Format(
        "lora_config.json",
        ("lora_weights.safetensors", "lora_weights.ckpt"),
        voxcpm_settings,
        str,
    ),
)
