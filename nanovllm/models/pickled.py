"""Checkpoints that torch pickled, as older releases have them."""

import zipfile
from collections.abc import Iterable, Set
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.models.checkpoint import Checkpoint, indexed_files


class PickledCheckpoint(Checkpoint):
    """Files of `torch.save`: a dictionary of tensors, or one whose `state_dict` is that.

    They are unpickled as data: one that would run code is refused.

    Raises:
        InvalidRequestError: A file is corrupt, or holds something else.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._own_names, self._files = {}, {}
        for path in files:
            self._tensors |= _unpickled(path)

    @property
    def names(self) -> Set[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def pickled_files(directory: Path, stem: str = "pytorch_model") -> list[Path]:
    """The files of a pickled checkpoint, by its index if it has one; empty if there is none.

    Raises:
        FileNotFoundError: The index names one that is missing.
    """
    index = directory / f"{stem}.bin.index.json"
    if index.is_file():
        return indexed_files(index)
    names = (f"{stem}{suffix}" for suffix in (".bin", ".pt", ".pth"))
    return [path for path in map(directory.joinpath, names) if path.is_file()][:1]


def _unpickled(path: Path) -> dict[str, Tensor]:
    mapped = zipfile.is_zipfile(path)  # since torch 1.6
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as e:
        reason = str(e).partition("\n")[0]
        raise InvalidRequestError(f"{path} is not a readable file of tensors: {reason}") from e
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and _is_dense(value) for name, value in content.items()
    ):
        raise InvalidRequestError(f"{path} must hold a dictionary of dense tensors")
    return content


def _is_dense(value: object) -> bool:
    """Whether it is a tensor with all its numbers: neither sparse, nested nor without any."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )
