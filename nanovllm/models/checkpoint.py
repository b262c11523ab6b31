"""The tensors of a checkpoint, by their names in it."""

import logging
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.models.model_config import read_json

logger = logging.getLogger(__name__)

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "decoder.sr_bin_boundaries")
"""Buffers that some checkpoints store, and that everyone makes from the config."""

BODY = "model."
"""What the names of a causal model's parameters begin with, but for those of its head."""

LANGUAGE_MODEL = {
    "language_model.model.": BODY,
    "model.language_model.": BODY,  # as some are saved since transformers 4.52
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
"""What they begin with in a model that sees images as well, and by themselves."""

TIED_ROWS = 16
"""Of a head and an embedding that are said to be one, so many are compared."""
MAX_NAMES = 64
"""Of tensors that a message names: a mixture of experts may lack thousands."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a parameter may be stored in that is not quantized."""


def language_model_name(name: str) -> str | None:
    """A parameter's name in the language model by itself; None if it is of the vision part."""
    for prefix, own in LANGUAGE_MODEL.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None


class WeightSource(Protocol):
    """Where the tensors of a checkpoint come from, by their names in it."""

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare with the names and shapes that a model has.

        Raises:
            InvalidRequestError: `Missing parameters: [...]`, `Unexpected parameters: [...]`, or a
                wrong shape or dtype.
        """

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        """The matrix of a linear layer, quantized if it is stored so or is to be so."""


class Checkpoint:
    """Safetensors files, mapped into memory and read tensor by tensor; see `weight_files`.

    Models for embeddings are stored without `BODY`, and often without a head; of those that see
    images the `LANGUAGE_MODEL` is read. Their tensors are found by the names of causal ones, the
    embedding in place of a head; what sees is left out.

    Raises:
        InvalidRequestError: A file is corrupt.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        self._own_names: dict[str, str] = {}  # in the files, if they are others there
        for path in files:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as e:
                raise InvalidRequestError(f"{path} is not a readable safetensors file: {e}") from e
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            self._files |= dict.fromkeys(names, file)
        self._name_as_causal()

    def _name_as_causal(self) -> None:
        head, names = "lm_head.weight", self._files
        if "embed_tokens.weight" in names:
            own_names = {BODY + name: name for name in names if name != head}
            own_names[head] = head if head in names else "embed_tokens.weight"
        elif any(language_model_name(name) == f"{BODY}embed_tokens.weight" for name in names):
            found = ((language_model_name(name), name) for name in names)
            own_names = {name: own for name, own in found if name is not None}
        else:
            return
        self._files = {name: self._files[own] for name, own in own_names.items()}
        self._own_names = own_names

    @property
    def names(self) -> Set[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        # Of a tensor as a whole all would be read.
        some: Tensor = self._slice(name)[:0] if self.shape(name) else self._stored(name)
        return some.dtype

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self.check_names({*expected})
        for name, shape in expected.items():
            self.check_parameter(name, shape)

    def check_parameter(self, name: str, expected: tuple[int, ...]) -> None:
        """Complain of a parameter whose shape is not what `config.json` makes it."""
        self.check_tensor(name, expected, FLOATS)

    def check_tensor(
        self, name: str, expected: tuple[int, ...], dtypes: Sequence[torch.dtype]
    ) -> None:
        """Complain of a tensor that is not of a shape and one of some dtypes."""
        shape, dtype = self.shape(name), self.dtype(name)
        if shape != expected:
            raise InvalidRequestError(
                f"parameter {name} has shape {list(shape)} in the checkpoint; config.json makes "
                f"it {list(expected)}"
            )
        if dtype not in dtypes:
            message = (
                f"parameter {name} is {dtype} in the checkpoint; it must be "
                f"{' or '.join(map(str, dtypes))}".replace("torch.", "")
            )
            if dtypes == FLOATS:
                message += ", or quantized as quantization_config says, with its scales"
            raise InvalidRequestError(message)

    def check_names(self, expected: Set[str]) -> None:
        """Complain of tensors that are missing or that nobody asks for."""
        found = {name for name in self.names if not name.endswith(IGNORED_SUFFIXES)}
        if "lm_head.weight" in found - expected:  # tied, and stored all the same
            found.remove("lm_head.weight")
            self._check_tied_head()
        if (
            "lm_head.weight" in expected
            and self._own_names.get("lm_head.weight") == "embed_tokens.weight"
        ):
            logger.warning(
                "the checkpoint has no output head: it embeds, but what it writes is void"
            )
        complaints = [
            f"{what} parameters: {_some(names)}"
            for what, names in (("Missing", expected - found), ("Unexpected", found - expected))
            if names
        ]
        if complaints:
            raise InvalidRequestError("; ".join(complaints))

    def _check_tied_head(self) -> None:
        """Complain of a head that is not the embedding it is tied to, as far as some rows tell.

        Only what is stored as it is can be compared: both of them whole, and in one dtype.
        """
        names = ("lm_head.weight", f"{BODY}embed_tokens.weight")
        is_one = self._own_names.get(names[0]) == "embed_tokens.weight"
        if is_one or not self._files.keys() >= {*names}:
            return
        dtypes = {self.dtype(name) for name in names}
        if len(dtypes) > 1 or not dtypes <= {*FLOATS}:
            return
        head, embedding = (self._slice(name)[:TIED_ROWS] for name in names)
        if self.shape(names[0]) != self.shape(names[1]) or not torch.allclose(
            head, embedding, rtol=0, atol=0, equal_nan=True
        ):
            raise InvalidRequestError(
                "the checkpoint's lm_head.weight is not its embedding, to which config.json ties "
                "it: set tie_word_embeddings to false there, or remove lm_head.weight",
                "tie_word_embeddings",
            )

    def tensor(self, name: str) -> Tensor:
        return self._stored(name)

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        return self.tensor(name)

    def _stored(self, name: str) -> Tensor:
        """A tensor of the files, as it is there."""
        tensor: Tensor = self._files[name].get_tensor(self._own_names.get(name, name))
        return tensor

    def _slice(self, name: str) -> Any:
        return self._files[name].get_slice(self._own_names.get(name, name))


def _some(names: Set[str]) -> str:
    """The first of some names, as a list, and how many more there are."""
    more = len(names) - MAX_NAMES
    return f"{sorted(names)[:MAX_NAMES]}" + (f" and {more} more" if more > 0 else "")


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
    others = sorted(file for file in directory.glob("*.safetensors") if file.is_file())
    files = [single] if single.is_file() else others
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
        InvalidRequestError: The index does not name them.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise InvalidRequestError(
            f"{index}: weight_map must be an object that names the file of each parameter, not "
            f"{weight_map!r:.80}",
            "weight_map",
        )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are missing: {missing}")
    return [index.parent / name for name in names]
