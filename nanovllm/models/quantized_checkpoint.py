"""Checkpoints whose matrices other tools have quantized: GPTQ, AWQ and compressed-tensors.

What is stored decides, not what the settings say of it: a matrix that is there as it is stays as
it is (the tools leave out the head, and what the user names), and its bits and groups are those
that its shapes tell. The kernels hold 4 bits in groups of 32, 64 and 128, so longer groups become
several with the same scale; and 8 bits with one scale a row, so 8 bits in groups or with zero
points are rounded once more.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Set
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.models.checkpoint import FLOATS, Checkpoint, weight_files
from nanovllm.models.config_fields import json_object, positive
from nanovllm.models.quantization import SCHEMES, quantize

GROUP_SIZES = (128, 64, 32)
"""What the kernels have, the best first."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word AWQ has each of eight columns."""

IGNORED_SUFFIXES = tuple(
    f".{of}_{what}" for of in ("input", "output", "q", "k", "v") for what in ("scale", "zero_point")
)
"""Static scales of activations and of the KV cache: ours are measured as they come."""

WORDS = (torch.int32,)
"""What several codes are packed into."""


class Stored(NamedTuple):
    """A matrix as a checkpoint has it, unpacked.

    Args:
        codes: uint8 `[rows, depth]`.
        scales: `[rows, num_groups]`.
        zeros: uint8 `[rows, num_groups]`, or None for the middle code.
        bits: 4 or 8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int


def open_quantized(directory: Path, settings: dict[str, Any]) -> "QuantizedCheckpoint":
    """Open a checkpoint by its `quantization_config`.

    Args:
        directory: The checkpoint.
        settings: See `stored_quantization`.

    Raises:
        UnsupportedModelError: It is of a variant that we do not read. For the rest see
            `Checkpoint`.
    """
    match settings["quant_method"]:
        case "gptq":
            return GptqCheckpoint(directory, settings)
        case "awq":
            return AwqCheckpoint(directory, settings)
        case _:
            return CompressedTensorsCheckpoint(directory, settings)


class QuantizedCheckpoint(Checkpoint, ABC):
    """A checkpoint in which some matrices are several tensors each.

    Subclasses say which, and how to unpack them.

    Args:
        directory: The checkpoint.
        settings: Its `quantization_config`.

    Raises:
        UnsupportedModelError: The settings are of a variant that we do not read.

    Attributes:
        suffixes: Names of the tensors that may make up a matrix; where the first is, it is
            quantized.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._group_sizes = self._read_settings(settings)
        super().__init__(weight_files(directory))
        self._modules = {
            module
            for module, _, suffix in (name.rpartition(".") for name in self._files)
            if suffix == self.suffixes[0]
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._spare: set[str] = set()

    @property
    def names(self) -> Set[str]:
        names = set()
        for name in self._files:
            module, _, suffix = name.rpartition(".")
            if module in self._modules and suffix in self.suffixes:
                names.add(f"{module}.weight")
            elif name not in self._spare and not name.endswith(IGNORED_SUFFIXES):
                names.add(name)
        return names

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._shapes = expected
        # Some tools write a bias, of zeros, for each matrix that they quantize.
        biases = {f"{module}.bias" for module in self._modules} & self._files.keys()
        self._spare = {name for name in biases - {*expected} if not self._stored(name).any()}
        super().check(expected)

    def check_parameter(self, name: str, expected: tuple[int, ...]) -> None:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._modules:
            self._check_module(module, *expected)
        else:
            super().check_parameter(name, expected)

    def tensor(self, name: str) -> Tensor:
        matrix = self.matrix(name)
        return matrix.dequantize() if isinstance(matrix, QuantizedWeight) else matrix

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return self._stored(name)
        rows, depth = self._shapes[name]
        stored = self._read(module, rows, depth)
        # The kernels hold those of 4 bits in half precision.
        largest = torch.finfo(torch.float16 if stored.bits == 4 else torch.float32).max
        if not (stored.scales.float().abs() <= largest).all():  # false for NaN
            raise InvalidRequestError(
                f"a scale of {module} is NaN, infinite or beyond {largest:g}; quantize the "
                f"original checkpoint instead, by quantization='int{stored.bits}'"
            )
        return _for_kernels(stored, self._group_size(module, depth, stored.scales.shape[1]))

    @abstractmethod
    def _read_settings(self, settings: dict[str, Any]) -> set[int]:
        """Refuse the variants that we do not read; returns the group sizes, -1 for a whole row."""

    @abstractmethod
    def _check_module(self, module: str, rows: int, depth: int) -> None:
        """Complain of a matrix that is not whole, or whose shapes or dtypes do not fit."""

    @abstractmethod
    def _read(self, module: str, rows: int, depth: int) -> Stored:
        """Unpack a matrix."""

    def _require(self, module: str, *suffixes: str) -> None:
        missing = [f"{module}.{s}" for s in suffixes if f"{module}.{s}" not in self._files]
        if missing:
            raise InvalidRequestError(f"Missing parameters: {missing}")

    def _bits(self, name: str, dim: int, depth: int) -> int:
        """The bits of `depth` codes that fill a dimension of a matrix of words."""
        shape = self.shape(name)
        for bits in (4, 8):
            if len(shape) == 2 and shape[dim] == num_words(depth, bits):
                return bits
        raise InvalidRequestError(
            f"parameter {name} has shape {list(shape)} in the checkpoint, which is not "
            f"that of {depth} values in 4 or 8 bits"
        )

    def _num_groups(self, name: str, found: tuple[int, ...], rows: int, depth: int) -> int:
        """Groups of a row by the scales `found`, which must be a whole number of them."""
        if len(found) != 2 or found[0] != rows:
            raise InvalidRequestError(
                f"parameter {name} has shape {list(self.shape(name))} in the checkpoint, which is "
                f"not that of scales for {rows} outputs"
            )
        self.check_tensor(name, self.shape(name), FLOATS)
        self._group_size(name, depth, found[1])
        return found[1]

    def _check_order(self, name: str, depth: int, num_groups: int) -> None:
        """Complain of columns that do not belong to their groups in order."""
        if name not in self._files:
            return
        groups = self._stored(name)
        in_order = torch.arange(depth) // self._group_size(name, depth, num_groups)
        # Zeros, and in compressed-tensors -1, are no order, as for vLLM and ExLlamaV2.
        if not (torch.equal(groups.long(), in_order) or (groups <= 0).all()):
            raise UnsupportedModelError(
                f"{name} orders the columns of a matrix by their activations (desc_act, or "
                "actorder=group), which is not supported; supported: checkpoints made with "
                "desc_act=False, or actorder=weight or static"
            )

    def _group_size(self, name: str, depth: int, num_groups: int) -> int:
        """Columns of a group: as the settings say if that fits, or as the shapes do."""
        for size in sorted(self._group_sizes):
            if -(-depth // (size if size > 0 else depth)) == num_groups:
                return size if size > 0 else depth
        if num_groups == 0 or depth % num_groups:
            raise InvalidRequestError(
                f"{name} has {num_groups} groups for {depth} columns, which is no whole number of "
                "columns a group"
            )
        return depth // num_groups


class GptqCheckpoint(QuantizedCheckpoint):
    """Matrices as GPTQModel and AutoGPTQ store them (Frantar et al. 2022): codes packed by inputs.

    Version 1 of the format stores zero points less one.
    """

    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def _read_settings(self, settings: dict[str, Any]) -> set[int]:
        form = str(settings.get("checkpoint_format") or "gptq")
        if form not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
            raise UnsupportedModelError(
                f"GPTQ in the format {form!r} is not supported; supported: gptq, gptq_v2",
                "quantization_config",
            )
        _check_bits(settings, "bits", "GPTQ")
        self._less_one = form == "gptq"
        self._symmetric = bool(settings.get("sym", True))
        return {_stored_group_size(settings, "group_size")}

    def _check_module(self, module: str, rows: int, depth: int) -> None:
        self._require(module, "qzeros", "scales")
        bits = self._bits(f"{module}.qweight", 0, depth)
        scales = f"{module}.scales"
        num_groups = self._num_groups(scales, self.shape(scales)[::-1], rows, depth)
        self.check_tensor(f"{module}.qweight", (num_words(depth, bits), rows), WORDS)
        self.check_tensor(f"{module}.qzeros", (num_groups, num_words(rows, bits)), WORDS)
        self._check_order(f"{module}.g_idx", depth, num_groups)

    def _read(self, module: str, rows: int, depth: int) -> Stored:
        qweight = self._stored(f"{module}.qweight")  # [depth / per_word, rows]
        bits = self._bits(f"{module}.qweight", 0, depth)
        codes = unpack(qweight, bits).permute(1, 0, 2).reshape(rows, -1)[:, :depth]
        qzeros = self._stored(f"{module}.qzeros")  # [num_groups, rows / per_word]
        if self._less_one:
            # As a whole word: GPTQModel borrows from the next where a zero point is zero.
            qzeros = qzeros + (0x11111111 if bits == 4 else 0x01010101)
        zeros: Tensor | None = unpack(qzeros, bits).flatten(1)[:, :rows].T
        if self._symmetric and zeros is not None and (zeros == 1 << (bits - 1)).all():
            zeros = None
        return Stored(codes, self._stored(f"{module}.scales").T, zeros, bits)


class AwqCheckpoint(QuantizedCheckpoint):
    """Matrices as AutoAWQ stores them (Lin et al. 2023), version GEMM: codes packed by outputs."""

    suffixes = ("qweight", "qzeros", "scales")

    def _read_settings(self, settings: dict[str, Any]) -> set[int]:
        version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm")
        if version.lower() != "gemm":
            raise UnsupportedModelError(
                f"AWQ in the version {version!r} is not supported; supported: gemm",
                "quantization_config",
            )
        _check_bits(settings, "bits" if "bits" in settings else "w_bit", "AWQ", supported=(4,))
        self._symmetric = settings.get("zero_point") is False
        name = "group_size" if settings.get("group_size") else "q_group_size"
        return {_stored_group_size(settings, name)}

    def _check_module(self, module: str, rows: int, depth: int) -> None:
        self._require(module, "scales", *(() if self._symmetric else ("qzeros",)))
        scales = f"{module}.scales"
        num_groups = self._num_groups(scales, self.shape(scales)[::-1], rows, depth)
        self.check_tensor(f"{module}.qweight", (depth, num_words(rows, 4)), WORDS)
        if f"{module}.qzeros" in self._files:
            self.check_tensor(f"{module}.qzeros", (num_groups, num_words(rows, 4)), WORDS)

    def _read(self, module: str, rows: int, depth: int) -> Stored:
        def unpack_columns(suffix: str, num_rows: int) -> Tensor:
            words = self._stored(f"{module}.{suffix}")  # [num_rows, rows / 8]
            return unpack(words, 4)[..., AWQ_ORDER].reshape(num_rows, -1)[:, :rows].T

        scales = self._stored(f"{module}.scales")
        zeros = None
        if f"{module}.qzeros" in self._files:
            zeros = unpack_columns("qzeros", len(scales))
        return Stored(unpack_columns("qweight", depth), scales.T, zeros, 4)


class CompressedTensorsCheckpoint(QuantizedCheckpoint):
    """Matrices as llm-compressor stores them, in integers: `pack-quantized` and `int-quantized`."""

    suffixes = (
        "weight_scale",
        "weight_packed",
        "weight",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )
    formats = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")

    def _read_settings(self, settings: dict[str, Any]) -> set[int]:
        sizes = set()
        self._symmetric = not settings.get("config_groups")
        sparsity = json_object(settings, "sparsity_config").get("format", "dense")
        if sparsity != "dense" or settings.get("transform_config"):
            raise UnsupportedModelError(
                "compressed-tensors with sparsity or transforms is not supported",
                "quantization_config",
            )
        schemes = json_object(settings, "config_groups")
        widths = set()
        for name in schemes:
            scheme = json_object(schemes, name)
            form = scheme.get("format") or settings.get("format")
            weights = json_object(scheme, "weights")
            if weights.get("type", "int") != "int" or form not in self.formats:
                kind = f"{weights.get('type')}{weights.get('num_bits')}"
                raise UnsupportedModelError(
                    f"compressed-tensors in the format {form!r} ({kind}) is not supported; "
                    f"supported: {', '.join(self.formats)} of integers in 4 or 8 bits",
                    "quantization_config",
                )
            _check_bits(weights, "num_bits", "compressed-tensors")
            widths.add(weights.get("num_bits", 4))
            sizes.add(_stored_group_size(weights, "group_size"))
            # Which matrices are a group's we do not read: one such group excuses all.
            self._symmetric |= weights.get("symmetric") is not False
        # Of codes that are a byte each, nothing that is stored says how wide they are.
        self._bits_of_bytes = 4 if widths == {4} else 8
        return sizes

    def _check_module(self, module: str, rows: int, depth: int) -> None:
        packed, zeros = f"{module}.weight_packed", f"{module}.weight_zero_point"
        if packed in self._files:
            bits = self._bits(packed, 1, depth)
            self.check_tensor(packed, (rows, num_words(depth, bits)), WORDS)
        else:
            bits = self._bits_of_bytes
            self._require(module, "weight")
            self.check_tensor(f"{module}.weight", (rows, depth), (torch.int8,))
        scales = f"{module}.weight_scale"
        shape = tuple(self._scales(module, rows).shape)
        num_groups = self._num_groups(scales, shape, rows, depth)
        if not self._symmetric:
            self._require(module, "weight_zero_point")
        if zeros in self._files and self.dtype(zeros) in WORDS:
            self.check_tensor(zeros, (num_words(rows, bits), num_groups), WORDS)
        elif zeros in self._files:  # in int64 by the tool's first versions
            is_one = math.prod(self.shape(zeros)) == math.prod(self.shape(scales)) == 1
            shape = self.shape(zeros if is_one else scales)
            self.check_tensor(zeros, shape, (torch.int8, torch.int64))
        self._check_order(f"{module}.weight_g_idx", depth, num_groups)

    def _scales(self, module: str, rows: int) -> Tensor:
        scales = self._stored(f"{module}.weight_scale")
        return scales.reshape(1, 1).expand(rows, 1) if scales.numel() == 1 else scales

    def _read(self, module: str, rows: int, depth: int) -> Stored:
        if f"{module}.weight_packed" in self._files:
            words = self._stored(f"{module}.weight_packed")  # [rows, depth / per_word]
            bits = self._bits(f"{module}.weight_packed", 1, depth)
            codes = unpack(words, bits).flatten(1)[:, :depth]
        else:
            bits = self._bits_of_bytes
            codes = self._unsigned(self._stored(f"{module}.weight"), bits)
            if int(codes.max()) >= 1 << bits:
                raise InvalidRequestError(f"{module}.weight has values of more than {bits} bits")
        scales = self._scales(module, rows)
        zeros = None
        if f"{module}.weight_zero_point" in self._files:
            zeros = self._stored(f"{module}.weight_zero_point")
            if zeros.dtype == torch.int32:  # [rows / per_word, num_groups]
                zeros = unpack(zeros, bits).permute(0, 2, 1).flatten(0, 1)[:rows]
            else:
                zeros = self._unsigned(zeros, bits)
            zeros = zeros.expand(rows, scales.shape[1])
        return Stored(codes, scales, zeros, bits)

    def _unsigned(self, codes: Tensor, bits: int) -> Tensor:
        """Codes around zero as codes around the middle; int8 wraps around as it should."""
        return codes.to(torch.int8).view(torch.uint8) + (1 << (bits - 1))


def num_words(count: int, bits: int) -> int:
    """Words of 32 bits that so many codes take."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Take int32 words `[n, m]` apart into uint8 values `[n, m, 32 / bits]`, the lowest first."""
    octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(2)


def _for_kernels(stored: Stored, group_size: int) -> QuantizedWeight:
    """A matrix in what the kernels can hold.

    Raises:
        UnsupportedModelError: Its groups are of no size that they have.
    """
    codes, scales, zeros, bits = stored
    depth = codes.shape[1]
    codes, scales = codes.contiguous(), scales.float().contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    if bits == 8:
        weight = QuantizedWeight(codes, scales, zeros, bits, group_size)
        exact = scales.shape[1] == 1 and (zeros is None or bool((zeros == 128).all()))
        return (
            QuantizedWeight(codes, scales, None, 8, depth)
            if exact
            else quantize(weight, SCHEMES["int8"])
        )
    for size in GROUP_SIZES:
        if group_size % size == 0 or group_size >= depth:
            break
    else:
        raise UnsupportedModelError(
            f"groups of {group_size} columns are not supported; supported: multiples of "
            f"{GROUP_SIZES[-1]}, or one group a row",
            "quantization_config",
        )

    def split(values: Tensor) -> Tensor:
        return values.repeat_interleave(-(-group_size // size), dim=1)[:, : -(-depth // size)]

    return QuantizedWeight(codes, split(scales), None if zeros is None else split(zeros), 4, size)


def _check_bits(
    settings: dict[str, Any], name: str, tool: str, supported: tuple[int, ...] = (4, 8)
) -> None:
    bits = positive(settings, name, 4)
    if bits not in supported:
        raise UnsupportedModelError(
            f"{tool} in {bits} bits is not supported; supported: {', '.join(map(str, supported))}",
            "quantization_config",
        )


def _stored_group_size(settings: dict[str, Any], name: str) -> int:
    """Columns of a group as the settings have it; -1 is a whole row."""
    return -1 if settings.get(name) in (None, 0, -1) else positive(settings, name)
