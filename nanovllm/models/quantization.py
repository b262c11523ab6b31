"""Weights that are quantized when they are loaded.

Round-to-nearest with a scale a row (int8) or a group of a row (int4). A group's scale is not its
largest magnitude over the largest code: that wastes half a step, since codes reach further down
than up, and follows every outlier. After llama.cpp's `make_qx_quants`, the value of the largest
magnitude, whatever its sign, goes to code -8 or a little beyond, and of a few such roundings the
one is taken whose least-squares scale leaves the least error.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.cpu.threads import num_usable_cores
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.models.checkpoint import WeightSource

VERSION = 1
"""Counts up whenever other codes or scales come out below: what was kept is then made anew."""

CHUNK_ELEMENTS = 1 << 18
"""Elements that a thread works on at a time: few, for its cache, but threads take turns at starting
each pass over them."""

OVERSHOOTS = (0.95, 1.0, 1.05, 1.1, 1.2)
"""How far beyond code -8 an int4 group's largest magnitude may go. One leaves 6 % more squared
error on normal weights; nineteen leave 1.5 % less in three times the time."""

LEAST_INT4_MAGNITUDE = 2.0**-23
"""A group below this has a scale that half precision cannot hold: it becomes zero."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantize.

    Args:
        bits: 4 or 8.
        group_size: Columns with a scale of their own; None is the whole row.
    """

    bits: int
    group_size: int | None

    def num_groups(self, depth: int) -> int:
        return 1 if self.group_size is None else -(-depth // self.group_size)


SCHEMES = {
    "int8": Scheme(8, None),
    "int4": Scheme(4, 32),
    "int4-g32": Scheme(4, 32),
    "int4-g64": Scheme(4, 64),
    "int4-g128": Scheme(4, 128),
}
"""The values of `quantization` that apply to any checkpoint."""


def quantize(matrix: Tensor | QuantizedWeight, scheme: Scheme) -> QuantizedWeight:
    """Round a matrix to a scheme, by chunks of rows on all cores.

    Args:
        matrix: `[rows, depth]`; one that is quantized already is expanded first.
        scheme: What to round to.

    Raises:
        InvalidRequestError: A value is infinite, NaN, or beyond half precision.
    """
    rows, depth = (matrix.codes if isinstance(matrix, QuantizedWeight) else matrix).shape
    codes = torch.empty(rows, depth, dtype=torch.uint8)
    scales = torch.empty(rows, scheme.num_groups(depth))

    def fill(chunk: slice) -> None:
        if isinstance(matrix, QuantizedWeight):
            x = _rows_of(matrix, chunk).dequantize()
        else:
            x = matrix[chunk].float()
        codes[chunk], scales[chunk] = _to_int8(x) if scheme.bits == 8 else _to_int4(x, scheme)

    for_chunks(rows, depth, fill)
    if not scales.isfinite().all():
        raise InvalidRequestError("it holds NaN, infinite or enormous values")
    return QuantizedWeight(codes, scales, None, scheme.bits, scheme.group_size or depth)


def for_chunks(rows: int, depth: int, work: Callable[[slice], None]) -> None:
    """Call `work` for chunks of rows, on all cores: torch leaves the interpreter's lock."""
    size = max(1, CHUNK_ELEMENTS // depth)

    def run(first: int) -> None:
        with torch.inference_mode():
            work(slice(first, first + size))

    with ThreadPoolExecutor(num_usable_cores()) as pool:
        for _ in pool.map(run, range(0, rows, size)):
            pass


def _rows_of(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return QuantizedWeight(
        weight.codes[rows], weight.scales[rows], zeros, weight.bits, weight.group_size
    )


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes around 128 by the largest magnitude of each row, and the scales `[rows, 1]`."""
    largest = x.abs().amax(1, keepdim=True)
    inverse = torch.where(largest < 1e-30, 0.0, 127.0 / largest)
    return _unsigned((x * inverse).round_(), 128), largest / 127.0


def _to_int4(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes around 8, and the scales `[rows, num_groups]`, all of which fit half precision."""
    rows, depth = x.shape
    group = scheme.group_size or depth
    x = F.pad(x, (0, -depth % group)).view(rows, -1, group)
    scales = _best_scales(x).half().float()
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    codes = _unsigned((x * inverse[..., None]).round_().clamp_(-8, 7), 8)
    return codes.view(rows, -1)[:, :depth], scales


def _unsigned(codes: Tensor, zero: int) -> Tensor:
    """Signed codes moved up; by way of int8, as torch converts to uint8 one by one."""
    return codes.to(torch.int8).view(torch.uint8).add_(zero)


def _best_scales(x: Tensor) -> Tensor:
    """Scales `[rows, num_groups]` for values `[rows, num_groups, group_size]`.

    Rounded to codes `q`, a group is left with the error `|x|^2 - (x.q)^2 / |q|^2` by its best
    scale, `x.q / |q|^2`.
    """
    low, high = x.amin(-1), x.amax(-1)  # `aminmax` goes one by one
    extreme = torch.where(-low > high, low, high)
    to_lowest = torch.where(extreme.abs() < LEAST_INT4_MAGNITUDE, 0.0, -8.0 / extreme)
    q = torch.empty_like(x)
    best, most = torch.zeros_like(extreme), torch.full_like(extreme, -torch.inf)
    for overshoot in OVERSHOOTS:
        torch.mul(x, (to_lowest * overshoot)[..., None], out=q).round_().clamp_(-8, 7)
        product = torch.linalg.vecdot(x, q)
        scale = product / torch.linalg.vecdot(q, q).clamp_(min=1.0)
        gain = product * scale
        worse = gain <= most  # false for NaN, which is to come through
        best, most = torch.where(worse, best, scale), torch.where(worse, most, gain)
    return best


def weight_bits(config: EngineConfig) -> float | None:
    """Bits of a weight and its share of a scale after quantization; None where there is none."""
    scheme = SCHEMES.get(config.quantization or "")
    if scheme is None:
        return None
    return scheme.bits + (16 / scheme.group_size if scheme.group_size else 0.0)


class QuantizingSource:
    """Another source, with its matrices quantized as they are read.

    Args:
        source: Holds them unquantized.
        quantization: A key of `SCHEMES`.
    """

    def __init__(self, source: WeightSource, quantization: str) -> None:
        self._source = source
        self.scheme = SCHEMES[quantization]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._source.check(expected)

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def matrix(self, name: str) -> QuantizedWeight:
        try:
            return quantize(self._source.matrix(name), self.scheme)
        except InvalidRequestError as e:
            raise InvalidRequestError(f"{name} cannot be quantized: {e}") from e
