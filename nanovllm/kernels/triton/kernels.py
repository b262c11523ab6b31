"""The kernels of a GPU, as networks call them."""

import torch
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.audio import DepthwiseConv
from nanovllm.kernels.kernels import Choice, Draws, Penalties, Routing, WeightSpec
from nanovllm.kernels.lora import IndexedBatch, IntArray, LoRABatch, LoRAWeights
from nanovllm.kernels.torch_kernels import DenseWeight, TorchKernels
from nanovllm.kernels.triton.audio import causal_windows, depthwise_conv, serves_audio
from nanovllm.kernels.triton.elementwise import act_and_mul, add_rms_norm, rms_norm
from nanovllm.kernels.triton.linear import matmul
from nanovllm.kernels.triton.local_attention import local_attention, serves_local
from nanovllm.kernels.triton.lora import StackedWeights
from nanovllm.kernels.triton.mixture import mixture
from nanovllm.kernels.triton.penalties import PenaltyKernel
from nanovllm.kernels.triton.sampling import choose


class TritonKernels(TorchKernels):
    """See `Kernels`. What has no kernel of its own here is torch's.

    Args:
        device: A GPU; the CPU where Triton's interpreter runs, for tests.
        dtype: Of weights and activations.
        deterministic: Whether a row's result may not depend on the other rows of a step.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, deterministic: bool = False
    ) -> None:
        super().__init__(device, dtype)
        self._deterministic = deterministic
        self._penalties = PenaltyKernel(device)

    @property
    def name(self) -> str:
        return "triton"

    def with_dtype(self, dtype: torch.dtype) -> "TritonKernels":
        return TritonKernels(self._device, dtype, self._deterministic)

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        if not self._deterministic:
            return super().linear(x, weight)
        y = matmul(x, weight.weight, weight.bias)
        return y if weight.activation is None else act_and_mul(y, weight.activation)

    def mixture(
        self,
        x: Tensor,
        scores: Tensor,
        routing: Routing,
        gate_up: DenseWeight,
        down: DenseWeight,
    ) -> Tensor:
        return mixture(x, scores, routing, gate_up, down, self._deterministic)

    def lora_weights(self, spec: WeightSpec, rank: int, num_slots: int) -> LoRAWeights:
        return StackedWeights(spec, rank, num_slots, self._dtype, self._device)

    def lora_batch(self, slots: IntArray) -> LoRABatch | None:
        return IndexedBatch.of(slots, self._device)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return act_and_mul(gate_up, activation)

    def local_attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        length: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        if not serves_local(qkv, length, num_heads, num_kv_heads):
            return super().local_attention(qkv, rotary, length, num_heads, num_kv_heads)
        return local_attention(qkv, rotary, length, num_heads, num_kv_heads)

    def apply_penalties(self, logits: Tensor, penalties: Penalties) -> None:
        self._penalties.apply(logits, penalties)

    def choose(self, logits: Tensor, draws: Draws) -> Choice:
        return choose(logits, draws)

    def depthwise_conv(
        self, x: Tensor, conv: DepthwiseConv, history: Tensor, slots: Tensor
    ) -> Tensor:
        if not serves_audio(conv.pad):
            return super().depthwise_conv(x, conv, history, slots)
        return depthwise_conv(x, conv, history, slots)

    def causal_windows(
        self,
        x: Tensor,
        snake: Tensor | None,
        history: Tensor,
        slots: Tensor,
        width: int,
        stride: int,
    ) -> Tensor:
        if not serves_audio(history.shape[1]):
            return super().causal_windows(x, snake, history, slots, width, stride)
        return causal_windows(x, snake, history, slots, width, stride)
