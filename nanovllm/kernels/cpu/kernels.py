"""The kernels of a CPU, as networks call them."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import AttentionConfig
from nanovllm.kernels.cpu.attention import CpuAttention
from nanovllm.kernels.cpu.library import Library
from nanovllm.kernels.cpu.packing import TYPES, Arena, PackedWeight
from nanovllm.kernels.kernels import Choice, Draws, QuantizedWeight, WeightSpec


class CpuKernels:
    """See `Kernels`. Tensors are contiguous and of the one dtype.

    Args:
        library: The kernels of an instruction set, its threads started.
        dtype: float32 or bfloat16.
        cascade: See `CpuAttention`.
        deterministic: Whether a row's result may not depend on the other rows of a step.
    """

    def __init__(
        self,
        library: Library,
        dtype: torch.dtype,
        cascade: bool = True,
        deterministic: bool = False,
    ) -> None:
        self._library, self._dtype, self._type = library, dtype, TYPES[dtype]
        self._cascade, self._deterministic = cascade, deterministic
        self._arena = Arena()

    @property
    def isa(self) -> str:
        return self._library.isa

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Leave the cores to our threads: torch's would wait on them for their next turn."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    def pack(
        self, spec: WeightSpec, parts: Iterable[Tensor | QuantizedWeight], bias: Tensor | None
    ) -> PackedWeight:
        parts = iter(parts)
        first = next(parts)
        weight = PackedWeight(spec, self._dtype, first, bias is not None, self._arena)
        weight.fill(self._library, itertools.chain([first], parts), bias)
        return weight

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._linear(x, weight, self._dtype)

    def logits(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._linear(x, weight, torch.float32)

    def _linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        rows = x.shape[0]
        out = torch.empty(rows, weight.width, dtype=dtype)
        self._library.linear(
            weight.reference,
            x.data_ptr(),
            rows,
            out.data_ptr(),
            dtype == torch.float32,
            self._deterministic,
        )
        return out

    def embed(self, token_ids: Tensor, weight: PackedWeight) -> Tensor:
        out = torch.empty(len(token_ids), weight.spec.depth, dtype=self._dtype)
        self._library.embed(weight.reference, token_ids.data_ptr(), len(token_ids), out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._norm(x, residual, weight, eps), residual

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rows, width = x.shape
        self._library.add_rms_norm(
            self._type,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            eps,
            rows,
            width,
            out.data_ptr(),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=self._dtype)
        self._library.silu_mul(self._type, gate_up.data_ptr(), rows, width, out.data_ptr())
        return out

    def attention(self, config: AttentionConfig) -> CpuAttention:
        return CpuAttention(self._library, config, self._cascade, self._deterministic)

    def choose(self, logits: Tensor, draws: Draws) -> Choice:
        rows, vocab_size = logits.shape
        token_ids = torch.empty(rows, dtype=torch.int64)
        valid = torch.empty(rows, dtype=torch.bool)
        self._library.sample(
            logits.data_ptr(),
            rows,
            vocab_size,
            draws.temperature.data_ptr(),
            *(None if t is None else t.data_ptr() for t in (draws.top_k, draws.top_p, draws.min_p)),
            draws.uniforms.data_ptr(),
            token_ids.data_ptr(),
            valid.data_ptr(),
        )
        return Choice(token_ids, valid)
