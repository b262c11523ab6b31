"""Weights that were quantized when they were loaded, kept for the next start."""

import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.kernels.cpu.build import private_cache
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.models.quantization import VERSION, QuantizingSource, Scheme, for_chunks

logger = logging.getLogger(__name__)

TYPE_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
"""Dtypes as safetensors calls them."""


class CachedSource:
    """The quantized matrices of another source, kept in a file and mapped into memory.

    The file is named by a hash of every byte of the checkpoint, so it is never stale. Where it
    cannot be written, the matrices are quantized at each start.

    Args:
        source: Quantizes the matrices.
        files: The checkpoint that it reads.
    """

    def __init__(self, source: QuantizingSource, files: Sequence[Path]) -> None:
        self._source, self._files = source, files
        self._kept: Any = None
        self._shapes: dict[str, tuple[int, int]] = {}

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._source.check(expected)
        self._shapes = {
            name: (shape[0], shape[1]) for name, shape in expected.items() if len(shape) == 2
        }
        path = private_cache("quantized") / f"{self._key()}.safetensors"
        try:
            self._kept = _open(path)
            if self._kept is None:
                logger.info("quantizing the weights (once: they are kept in %s)", path)
                self._write(path)
                self._kept = _open(path)
        except OSError as e:
            logger.warning("the quantized weights cannot be kept for the next start: %s", e)

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def matrix(self, name: str) -> QuantizedWeight:
        if self._kept is None:
            return self._source.matrix(name)
        scheme, depth = self._source.scheme, self._shapes[name][1]
        codes: Tensor = self._kept.get_tensor(f"{name}.codes")
        scales: Tensor = self._kept.get_tensor(f"{name}.scales").float()
        if scheme.bits == 4:
            codes = _unpacked(codes, depth)
        return QuantizedWeight(codes, scales, None, scheme.bits, scheme.group_size or depth)

    def _key(self) -> str:
        """A name for the result: what goes in, and the code that it goes through."""
        scheme = self._source.scheme
        digest = hashlib.sha256(f"{VERSION} {sorted(self._shapes.items())}".encode())
        for path in self._files:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                digest.update(hashlib.sha256(m).digest())
        return f"int{scheme.bits}-g{scheme.group_size or 'row'}-{digest.hexdigest()[:32]}"

    def _write(self, path: Path) -> None:
        """Write the file as safetensors would, but with one matrix in memory at a time."""
        scheme = self._source.scheme
        header: dict[str, Any] = {}
        end = 0
        for name, shape in self._shapes.items():
            for part, (dtype, part_shape) in _stored_shapes(scheme, shape).items():
                start, end = end, end + part_shape[0] * part_shape[1] * dtype.itemsize
                header[f"{name}.{part}"] = {
                    "dtype": TYPE_NAMES[dtype],
                    "shape": part_shape,
                    "data_offsets": [start, end],
                }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            with whole.open("wb") as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded)
                for tensor in self._stored_tensors():
                    tensor.numpy().tofile(file)
                file.flush()
                os.fsync(file.fileno())
            whole.replace(path)  # atomic: another process may be doing the same

    def _stored_tensors(self) -> Iterator[Tensor]:
        for name in self._shapes:
            weight = self._source.matrix(name)
            if weight.bits == 8:
                yield from (weight.codes, weight.scales)
            else:
                yield from (_packed(weight.codes), weight.scales.half())


def _stored_shapes(
    scheme: Scheme, shape: tuple[int, int]
) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """Dtypes and shapes of the tensors that a matrix is kept as."""
    rows, depth = shape
    if scheme.bits == 8:
        return {"codes": (torch.uint8, shape), "scales": (torch.float32, (rows, 1))}
    return {
        "codes": (torch.uint8, (rows, -(-depth // 2))),
        "scales": (torch.float16, (rows, scheme.num_groups(depth))),
    }


def _open(path: Path) -> Any:
    """Map a file into memory; None if there is none, or it is broken."""
    if not path.is_file():
        return None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as e:
        logger.warning("%s is broken and is written anew: %s", path, e)
        return None


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte: `[rows, depth]` to `[rows, ceil(depth / 2)]`, the row's halves together."""
    rows, depth = codes.shape
    half = -(-depth // 2)
    packed = torch.empty(rows, half, dtype=torch.uint8)

    def pack(chunk: slice) -> None:
        packed[chunk] = codes[chunk, :half]
        packed[chunk, : depth - half] |= codes[chunk, half:] << 4

    for_chunks(rows, depth, pack)
    return packed


def _unpacked(packed: Tensor, depth: int) -> Tensor:
    """The inverse of `_packed`."""
    rows, half = packed.shape
    codes = torch.empty(rows, depth, dtype=torch.uint8)

    def unpack(chunk: slice) -> None:
        codes[chunk, :half] = packed[chunk] & 15
        codes[chunk, half:] = packed[chunk, : depth - half] >> 4

    for_chunks(rows, depth, unpack)
    return codes
