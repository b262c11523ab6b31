"""Weights in the order in which the kernels read them."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.activation import Activation
from nanovllm.kernels.cpu.library import Library, Weights
from nanovllm.kernels.kernels import QuantizedWeight, WeightSpec

FLOAT32, BFLOAT16, INT8, INT4, COMPACT = range(5)
"""Formats; see csrc/weights.h."""

TYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
GATES: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}
TILE = 16
ARENA_BYTES = 64 << 20
"""So large that nearly all of it is huge pages."""
MAX_INT4_GROUP = 256
"""The kernels hold the sum of a group's activations in 16 bits."""

_DEPTH_MULTIPLE = {FLOAT32: 1, BFLOAT16: 32, INT8: 64}
_PANEL_TILES, _BLOCK_DEPTH = 4, 16  # see csrc/compact.h
_BITS = {FLOAT32: 32, BFLOAT16: 16, INT8: 8, INT4: 4}


def zeroed(num_bytes: int) -> Tensor:
    """Zeroed bytes, aligned to pages, huge ones where the system gives them at the first touch."""
    return torch.frombuffer(anonymous(num_bytes), dtype=torch.uint8, count=num_bytes)


def anonymous(num_bytes: int) -> mmap.mmap:
    """The same, as the system gives it."""
    # Private: huge pages are seldom given to shared memory.
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def compact_bytes(isa: str) -> float:
    """Size from which on a matrix of bf16 is kept in 12 bits a weight, by instruction set.

    Smaller ones stay in the caches, and with shorter vectors arithmetic would be the limit.
    """
    return 1 << 20 if isa.startswith(("amx", "avx512")) else math.inf


class Arena:
    """Zeroed memory for many tensors in large pieces: a small piece would have no huge page."""

    def __init__(self) -> None:
        self._piece: mmap.mmap | None = None
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """Bytes at a multiple of a cache line."""
        if self._piece is None or self._used + num_bytes > len(self._piece):
            self._piece, self._used = anonymous(max(num_bytes, ARENA_BYTES)), 0
        first = self._used
        self._used += _round_up(num_bytes, 64)
        return torch.frombuffer(self._piece, dtype=torch.uint8, count=num_bytes, offset=first)


class PackedWeight:
    """One linear layer's weight, bias and scales, and the struct that points to them.

    Args:
        spec: Shape of the weight.
        activation: Dtype of its inputs and outputs.
        like: Its first part, which says how the others are stored.
        has_bias: Whether to make room for a bias.
        arena: Where to take the memory.
        isa: What reads it.
    """

    def __init__(
        self,
        spec: WeightSpec,
        activation: torch.dtype,
        like: Tensor | QuantizedWeight,
        has_bias: bool,
        arena: Arena,
        isa: str,
    ) -> None:
        self._form = kind, group = _form(like, activation)
        self.spec = spec
        depth = _round_up(spec.depth, group if kind == INT4 else _DEPTH_MULTIPLE[kind])
        # Gate and up are padded to whole tiles each, because their tiles alternate.
        part_rows = spec.rows // 2 if spec.gated else spec.rows
        self.num_tiles = -(-part_rows // TILE) * (2 if spec.gated else 1)
        columns = self.num_tiles * TILE
        # A group of int4 has its scales, and its zero points if there are some, beside its codes.
        has_zeros = isinstance(like, QuantizedWeight) and like.zeros is not None
        num_bytes = columns * depth * _BITS[kind] // 8
        if kind == INT4:
            num_bytes += columns * depth // group * (3 if has_zeros else 2)
        large = kind == BFLOAT16 and num_bytes >= compact_bytes(isa)
        self._becomes_compact = large and not spec.replaceable
        self.data = zeroed(num_bytes) if self._becomes_compact else arena.take(num_bytes)
        self.scales: Tensor | None = None
        self.bias: Tensor | None = None
        self.blocks: Tensor | None = None
        if kind == INT8:
            self.scales = torch.zeros(columns, dtype=torch.float32)
        if has_bias:
            self.bias = torch.zeros(columns, dtype=torch.float32)
        self.struct = Weights(
            format=kind,
            activation=TYPES[activation],
            group_size=group,
            gate=GATES[spec.activation],
            has_zeros=has_zeros,
            columns=spec.rows,
            depth=spec.depth,
            padded_depth=depth,
            num_tiles=self.num_tiles,
            data=self.data.data_ptr(),
            scales=pointer(self.scales),
            bias=pointer(self.bias),
        )
        self.reference = ctypes.byref(self.struct)
        self.width = spec.rows // 2 if spec.gated else spec.rows
        self._dtype = activation

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        tensors = (self.data, self.scales, self.bias, self.blocks)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def fill(
        self, library: Library, parts: Iterable[Tensor | QuantizedWeight], bias: Tensor | None
    ) -> None:
        """Pack the parts, one after the other.

        Raises:
            InvalidRequestError: Parts of one matrix are quantized in different ways.
        """
        first = 0
        for index, part in enumerate(parts):
            if _form(part, self._dtype) != self._form:
                raise InvalidRequestError(
                    "matrices that read the same input must be quantized in the same way"
                )
            scales = zeros = None
            if isinstance(part, QuantizedWeight):
                codes = part.codes.contiguous()
                scales = part.scales.to(torch.float32 if part.bits == 8 else torch.float16)
                if part.bits == 4 and not scales.isfinite().all():
                    raise InvalidRequestError(
                        "a scale of the int4 weights is beyond 65504, what float16 holds; quantize "
                        "the original checkpoint instead, by quantization='int4'"
                    )
                scales = scales.contiguous()
                zeros = None if part.zeros is None else part.zeros.contiguous()
            else:
                codes = part.to(self._dtype).contiguous()
            if zeros is not None and not self.struct.has_zeros:
                raise InvalidRequestError(
                    "matrices that read the same input must all have the same zero points or none"
                )
            rows = len(codes)
            place = (0, 2, index) if self.spec.gated else (first, 1, 0)
            pointers = codes.data_ptr(), pointer(scales), pointer(zeros)
            library.pack(self.reference, *pointers, rows, *place)
            if bias is not None and self.bias is not None:
                self.bias[_packed_columns(rows, *place)] = bias[first : first + rows].float()
            first += rows

    def compact(self, library: Library, arena: Arena) -> None:
        """Move a large matrix of bf16 into the arena, in a form that takes less."""
        if not self._becomes_compact:
            return
        dense = Weights.from_buffer_copy(self.struct)
        num_blocks = -(-self.num_tiles // _PANEL_TILES) * (dense.padded_depth // _BLOCK_DEPTH)
        self.blocks = torch.empty(num_blocks + 1, dtype=torch.int64)
        data = arena.take(library.plan_blocks(ctypes.byref(dense), self.blocks.data_ptr()))
        self.struct.format, self.struct.data = COMPACT, data.data_ptr()
        self.struct.blocks = self.blocks.data_ptr()
        library.compact(ctypes.byref(dense), self.reference)
        self.data = data


class PackedExperts:
    """The weights of one linear layer of every expert, of equal shapes.

    Attributes:
        weights: These.
        pointers: Where the pointers to their structs are.
    """

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self.weights = weights
        structs = (ctypes.addressof(weight.struct) for weight in weights)
        self._table = (ctypes.c_void_p * len(weights))(*structs)
        self.pointers = ctypes.addressof(self._table)


def _form(part: Tensor | QuantizedWeight, activation: torch.dtype) -> tuple[int, int]:
    """Format and group size in which the kernels keep a part.

    Raises:
        InvalidRequestError: They do not have it.
    """
    if not isinstance(part, QuantizedWeight):
        return TYPES[activation], 0
    if part.bits == 8:
        if part.scales.shape[1] > 1 or part.zeros is not None:
            raise InvalidRequestError(
                "int8 weights must have one scale a row and no zero points on a CPU"
            )
        return INT8, 0
    if part.group_size % 32 or part.group_size > MAX_INT4_GROUP:
        raise InvalidRequestError(
            f"int4 weights must be in groups of a multiple of 32, at most {MAX_INT4_GROUP}, on a "
            f"CPU; got a group of {part.group_size}"
        )
    return INT4, part.group_size


def _packed_columns(rows: int, first: int, step: int, phase: int) -> Tensor:
    """Where a part's outputs lie among the packed columns, as csrc/packing.cpp has it."""
    column = torch.arange(first, first + rows)
    return (column // TILE * step + phase) * TILE + column % TILE


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's data are; None, which kernels see as null, if there is none."""
    return None if tensor is None else tensor.data_ptr()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
