"""The tensors of a checkpoint, by their names in it."""

from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.models.model_config import read_json

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints store and everyone recomputes."""


class WeightSource(Protocol):
    """Where the tensors of a checkpoint come from, by their names in it."""

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare with the names and shapes that a model has.

        Raises:
            InvalidRequestError: `Missing parameters: [...]`, `Unexpected parameters: [...]`, or a
                wrong shape.
        """

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        """The matrix of a linear layer, quantized if it is stored so or is to be so."""


class Checkpoint:
    """Safetensors files, mapped into memory and read tensor by tensor; see `weight_files`.

    Raises:
        InvalidRequestError: A file is corrupt.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as e:
                raise InvalidRequestError(f"{path} is not a readable safetensors file: {e}") from e
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            self._files |= dict.fromkeys(names, file)

    @property
    def names(self) -> Set[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self.check_names({*expected})
        for name, shape in expected.items():
            self.check_shape(name, shape)

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Complain of a tensor whose shape is not what `config.json` makes it."""
        found = self.shape(name)
        if found != expected:
            raise InvalidRequestError(
                f"parameter {name} has shape {list(found)} in the checkpoint; config.json makes "
                f"it {list(expected)}"
            )

    def check_names(self, expected: Set[str]) -> None:
        """Complain of tensors that are missing or that nobody asks for."""
        found = {name for name in self.names if not name.endswith(IGNORED_SUFFIXES)}
        if "lm_head.weight" not in expected:  # tied, and stored all the same
            found.discard("lm_head.weight")
        complaints = [
            f"{what} parameters: {sorted(names)}"
            for what, names in (("Missing", expected - found), ("Unexpected", found - expected))
            if names
        ]
        if complaints:
            raise InvalidRequestError("; ".join(complaints))

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        return self.tensor(name)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index if it has one.

    Raises:
        FileNotFoundError: There are none, or the index names one that is missing.
        UnsupportedModelError: There are weights of another format only.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return indexed_files(index)
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


def indexed_files(index: Path) -> list[Path]:
    """The files of a checkpoint in several parts.

    Raises:
        FileNotFoundError: One is missing.
    """
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are missing: {missing}")
    return [index.parent / name for name in names]
