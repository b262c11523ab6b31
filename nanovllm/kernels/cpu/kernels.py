"""The kernels of a CPU, as networks call them."""

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.attention_backend import AttentionBackend, AttentionConfig
from nanovllm.kernels.attention_select import select_attention
from nanovllm.kernels.audio import DepthwiseConv
from nanovllm.kernels.cpu.attention import CpuAttention
from nanovllm.kernels.cpu.library import Library
from nanovllm.kernels.cpu.packing import GATES, TYPES, Arena, PackedExperts, PackedWeight, pointer
from nanovllm.kernels.cpu.prefault import prefault
from nanovllm.kernels.cpu.replay import Replays
from nanovllm.kernels.grouped_lora import GroupedBatch, GroupedWeights
from nanovllm.kernels.kernels import (
    Choice,
    Draws,
    Penalties,
    QuantizedWeight,
    Routing,
    WeightSpec,
)
from nanovllm.kernels.lora import IntArray, LoRABatch, LoRAWeights
from nanovllm.kernels.torch_kernels import apply_penalties

CONV_TAPS, MAX_DILATION = 7, 9
"""Of depthwise convolutions; see csrc/audio.cpp."""
MAX_WINDOWS = 8
"""That a frame may be in."""


class CpuKernels:
    """See `Kernels`. Tensors are contiguous and of the one dtype.

    Args:
        library: The kernels of an instruction set, its threads started.
        dtype: float32 or bfloat16.
        cascade: See `CpuAttention`.
        deterministic: Whether a row's result may not depend on the other rows of a step.
        eager: Whether all kernels are called one by one, and none are replayed.
    """

    def __init__(
        self,
        library: Library,
        dtype: torch.dtype,
        cascade: bool = True,
        deterministic: bool = False,
        eager: bool = False,
    ) -> None:
        self._replays = Replays(library, not eager)
        self._library, self._dtype, self._type = self._replays.library, dtype, TYPES[dtype]
        self._cascade, self._deterministic, self._eager = cascade, deterministic, eager
        self._arena = Arena()

    @property
    def name(self) -> str:
        return self._library.isa

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def with_dtype(self, dtype: torch.dtype) -> "CpuKernels":
        return CpuKernels(self._library, dtype, self._cascade, self._deterministic, self._eager)

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
        has_bias = bias is not None
        weight = PackedWeight(spec, self._dtype, first, has_bias, self._arena, self.name)
        weight.fill(self._library, itertools.chain([first], parts), bias)
        weight.compact(self._library, self._arena)
        return weight

    def pack_experts(
        self, spec: WeightSpec, num_experts: int, parts: Iterable[Tensor | QuantizedWeight]
    ) -> PackedExperts:
        parts, num_parts = iter(parts), 2 if spec.gated else 1
        each = (itertools.islice(parts, num_parts) for _ in range(num_experts))
        return PackedExperts([self.pack(spec, of_one, None) for of_one in each])

    def repack(self, weight: PackedWeight, matrix: Tensor) -> None:
        if not weight.spec.replaceable:
            raise ValueError("only a weight that was packed as replaceable can be replaced")
        weight.fill(self._library, [matrix], None)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._linear(x, weight, self._dtype)

    def logits(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._linear(x, weight, torch.float32)

    def mixture(
        self,
        x: Tensor,
        scores: Tensor,
        routing: Routing,
        gate_up: PackedExperts,
        down: PackedExperts,
    ) -> Tensor:
        num_rows, num_experts = scores.shape
        out = self._replays.empty(num_rows, down.weights[0].width, dtype=self._dtype)
        self._library.mixture(
            gate_up.pointers,
            down.pointers,
            num_experts,
            x.data_ptr(),
            scores.data_ptr(),
            num_rows,
            routing.top_k,
            routing.normalized,
            self._deterministic,
            out.data_ptr(),
        )
        return out

    def linear_add(self, x: Tensor, weight: PackedWeight, total: Tensor) -> Tensor:
        return self._linear_into(x, weight, total, add=True)

    def _linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        out = self._replays.empty(x.shape[0], weight.width, dtype=dtype)
        return self._linear_into(x, weight, out, add=False)

    def _linear_into(self, x: Tensor, weight: PackedWeight, out: Tensor, add: bool) -> Tensor:
        self._library.linear(
            weight.reference,
            x.data_ptr(),
            x.shape[0],
            out.data_ptr(),
            out.dtype == torch.float32,
            self._deterministic,
            add,
        )
        return out

    def lora_weights(self, spec: WeightSpec, rank: int, num_slots: int) -> LoRAWeights:
        return GroupedWeights(self, spec, rank, num_slots)

    def lora_batch(self, slots: IntArray) -> LoRABatch | None:
        return GroupedBatch.of(slots, torch.device("cpu"))

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
        rows, width = x.shape
        out = self._replays.empty(rows, width, dtype=self._dtype)
        self._library.add_rms_norm(
            self._type,
            x.data_ptr(),
            pointer(residual),
            weight.data_ptr(),
            eps,
            rows,
            width,
            out.data_ptr(),
        )
        return out

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._replays.empty(rows, width, dtype=self._dtype)
        types = self._type, GATES[activation]
        self._library.act_and_mul(*types, gate_up.data_ptr(), rows, width, out.data_ptr())
        return out

    def attention(self, config: AttentionConfig) -> AttentionBackend:
        if config.backend not in ("auto", "cpu"):
            return select_attention(config, torch.device("cpu"))
        return CpuAttention(self._replays, config, self._cascade, self._deterministic)

    def replay(
        self,
        key: Hashable,
        compute: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        return self._replays.run(key, compute, inputs)

    def prefault(self, tensors: Sequence[Tensor], num_bytes: int) -> None:
        prefault(self._library, tensors, num_bytes)

    def local_attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        length: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        num_tokens, width = qkv.shape
        head_dim = width // (num_heads + 2 * num_kv_heads)
        cos, sin = (None, None) if rotary is None else rotary
        out = self._replays.empty(num_tokens, num_heads * head_dim, dtype=self._dtype)
        self._library.local_attention(
            self._type,
            qkv.data_ptr(),
            pointer(cos),
            pointer(sin),
            num_tokens // length,
            length,
            num_heads,
            num_kv_heads,
            head_dim,
            out.data_ptr(),
        )
        return out

    def apply_penalties(self, logits: Tensor, penalties: Penalties) -> None:
        apply_penalties(logits, penalties)

    def choose(self, logits: Tensor, draws: Draws) -> Choice:
        rows, vocab_size = logits.shape
        token_ids = torch.empty(rows, dtype=torch.int64)
        valid = torch.empty(rows, dtype=torch.bool)
        self._library.sample(
            logits.data_ptr(),
            rows,
            vocab_size,
            draws.temperature.data_ptr(),
            *map(pointer, (draws.top_k, draws.top_p, draws.min_p)),
            draws.uniforms.data_ptr(),
            token_ids.data_ptr(),
            valid.data_ptr(),
        )
        return Choice(token_ids, valid)

    def depthwise_conv(
        self, x: Tensor, conv: DepthwiseConv, history: Tensor, slots: Tensor
    ) -> Tensor:
        if len(conv.weight) != CONV_TAPS or conv.dilation > MAX_DILATION:
            raise ValueError(f"no kernel for {len(conv.weight)} taps {conv.dilation} frames apart")
        out = torch.empty_like(x)
        self._library.depthwise_conv(
            x.data_ptr(),
            *x.shape,
            pointer(conv.before),
            conv.weight.data_ptr(),
            conv.bias.data_ptr(),
            conv.dilation,
            pointer(conv.after),
            history.data_ptr(),
            slots.data_ptr(),
            out.data_ptr(),
        )
        return out

    def causal_windows(
        self,
        x: Tensor,
        snake: Tensor | None,
        history: Tensor,
        slots: Tensor,
        width: int,
        stride: int,
    ) -> Tensor:
        if width > MAX_WINDOWS * stride:
            raise ValueError(f"no kernel for windows of {width} frames every {stride}")
        num_seqs, num_frames, channels = x.shape
        out = torch.empty(num_seqs * num_frames // stride, width * channels)
        self._library.causal_windows(
            x.data_ptr(),
            num_seqs,
            num_frames,
            channels,
            pointer(snake),
            history.data_ptr(),
            history.shape[1],
            slots.data_ptr(),
            width,
            stride,
            out.data_ptr(),
        )
        return out
