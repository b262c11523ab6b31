"""The kernels in plain torch: right on every device and dtype, and what the others are held to."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import audio
from nanovllm.kernels.activation import Activation
from nanovllm.kernels.attention_backend import AttentionBackend, AttentionConfig
from nanovllm.kernels.attention_select import select_attention
from nanovllm.kernels.audio import DepthwiseConv
from nanovllm.kernels.elementwise import rms_norm
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
from nanovllm.kernels.sdpa import attend_locally


class DenseWeight(NamedTuple):
    """A weight `[rows, depth]`, its bias, and what is between its halves, if one gates the other.

    Those of experts are `[num_experts, rows, depth]`.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation | None


class TorchKernels:
    """See `Kernels`. Quantized weights are expanded when they are packed.

    Args:
        device: Where weights go.
        dtype: Their dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    @property
    def name(self) -> str:
        return "torch"

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def with_dtype(self, dtype: torch.dtype) -> "TorchKernels":
        return TorchKernels(self._device, dtype)

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pack(
        self, spec: WeightSpec, parts: Iterable[Tensor | QuantizedWeight], bias: Tensor | None
    ) -> DenseWeight:
        weight = torch.empty(spec.rows, spec.depth, dtype=self._dtype, device=self._device)
        first = 0
        for part in parts:
            dense = part.dequantize() if isinstance(part, QuantizedWeight) else part
            weight[first : first + len(dense)] = dense
            first += len(dense)
        if bias is not None:
            bias = bias.to(self._device, self._dtype)
        return DenseWeight(weight, bias, spec.activation)

    def pack_experts(
        self, spec: WeightSpec, num_experts: int, parts: Iterable[Tensor | QuantizedWeight]
    ) -> DenseWeight:
        stacked = self.pack(replace(spec, rows=num_experts * spec.rows), parts, None)
        return stacked._replace(weight=stacked.weight.view(num_experts, spec.rows, spec.depth))

    def repack(self, weight: DenseWeight, matrix: Tensor) -> None:
        weight.weight.copy_(matrix)

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        y = F.linear(x, weight.weight, weight.bias)
        return y if weight.activation is None else self.act_and_mul(y, weight.activation)

    def linear_add(self, x: Tensor, weight: DenseWeight, total: Tensor) -> Tensor:
        return total + self.linear(x, weight)

    def logits(self, x: Tensor, weight: DenseWeight) -> Tensor:
        return self.linear(x, weight).float()

    def mixture(
        self,
        x: Tensor,
        scores: Tensor,
        routing: Routing,
        gate_up: DenseWeight,
        down: DenseWeight,
    ) -> Tensor:
        shares, experts = route(scores, routing)
        out = torch.zeros(len(x), down.weight.shape[1], device=x.device)
        for expert in experts.unique().tolist():  # type: ignore[no-untyped-call]
            rows, rank = (experts == expert).nonzero(as_tuple=True)
            hidden = self.linear(x[rows], gate_up._replace(weight=gate_up.weight[expert]))
            made = F.linear(hidden, down.weight[expert])
            out.index_add_(0, rows, made.float() * shares[rows, rank, None])
        return out.to(x.dtype)

    def lora_weights(self, spec: WeightSpec, rank: int, num_slots: int) -> LoRAWeights:
        return GroupedWeights(self, spec, rank, num_slots)

    def lora_batch(self, slots: IntArray) -> LoRABatch | None:
        return GroupedBatch.of(slots, self._device)

    def embed(self, token_ids: Tensor, weight: DenseWeight) -> Tensor:
        return F.embedding(token_ids, weight.weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        return gate * up

    def attention(self, config: AttentionConfig) -> AttentionBackend:
        return select_attention(config, self._device)

    def prefault(self, tensors: Sequence[Tensor], num_bytes: int) -> None:
        pass

    def replay(
        self,
        key: Hashable,  # noqa: ARG002
        compute: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        return compute(*inputs)

    def local_attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        length: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        return attend_locally(qkv, rotary, length, num_heads, num_kv_heads)

    def apply_penalties(self, logits: Tensor, penalties: Penalties) -> None:
        apply_penalties(logits, penalties)

    def choose(self, logits: Tensor, draws: Draws) -> Choice:
        best, token_ids = logits.max(-1)
        if draws.any_sampled:
            sampled = draws.temperature > 0
            drawn = draw(logits, draws)
            token_ids = torch.where(sampled, drawn, token_ids)
        return Choice(token_ids, best.isfinite())

    def depthwise_conv(
        self, x: Tensor, conv: DepthwiseConv, history: Tensor, slots: Tensor
    ) -> Tensor:
        return audio.depthwise_conv(x, conv, history, slots)

    def causal_windows(
        self,
        x: Tensor,
        snake: Tensor | None,
        history: Tensor,
        slots: Tensor,
        width: int,
        stride: int,
    ) -> Tensor:
        return audio.causal_windows(x, snake, history, slots, width, stride)


def route(scores: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts that tokens go through, and their shares in what becomes of them.

    Args:
        scores: float32 `[num_tokens, num_experts]`.
        routing: See `Kernels.mixture`.

    Returns:
        Shares, float32, and experts, int64, both `[num_tokens, top_k]`.
    """
    experts = scores.topk(routing.top_k, dim=-1).indices
    shares = scores.softmax(-1).gather(-1, experts)
    return shares / shares.sum(-1, keepdim=True) if routing.normalized else shares, experts


def apply_penalties(logits: Tensor, penalties: Penalties) -> None:
    """See `Kernels.apply_penalties`."""
    position = torch.arange(penalties.history.shape[1], device=logits.device)
    known = position < penalties.lengths[:, None]  # [num_penalised, max_len]
    generated = known & (position >= penalties.prompt_lengths[:, None])
    history = penalties.history.long().masked_fill(~known, 0)
    rows = logits[penalties.rows]  # [num_penalised, vocab_size]
    seen = torch.zeros_like(rows).scatter_add_(1, history, known.to(rows.dtype)) > 0
    counts = torch.zeros_like(rows).scatter_add_(1, history, generated.to(rows.dtype))
    factor = penalties.repetition[:, None]
    rows = torch.where(seen, torch.where(rows > 0, rows / factor, rows * factor), rows)
    rows -= penalties.frequency[:, None] * counts
    rows -= penalties.presence[:, None] * (counts > 0)
    logits[penalties.rows] = rows


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """Draw an id for each row by inverting the cumulative distribution."""
    # Greedy rows are drawn too, and dropped: to pick the others would wait for the device.
    temperature = torch.where(draws.temperature > 0, draws.temperature, 1.0)
    logits = logits / temperature[:, None]
    if draws.min_p is not None:
        probs = logits.softmax(-1)
        floor = draws.min_p[:, None] * probs.max(-1, keepdim=True).values
        logits = logits.masked_fill(probs < floor, -torch.inf)
    if draws.top_k is not None or draws.top_p is not None:
        logits = keep_top(logits, draws.top_k, draws.top_p)
    cumulative = logits.softmax(-1).nan_to_num_(0.0).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, draws.uniforms[:, None] * total, right=True)
    # Rounding may take the draw up to the total: then it is the last token with any probability.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last)[:, 0]


def keep_top(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Keep each row's `top_k` best tokens, and of these the fewest that reach `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    if top_k is not None:
        ordered = ordered.masked_fill(rank >= top_k[:, None], -torch.inf)
    if top_p is not None:
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the better tokens
        dropped = (before >= top_p[:, None]) & (rank > 0) & (top_p[:, None] < 1)
        ordered = ordered.masked_fill(dropped, -torch.inf)
    return logits.scatter(1, order, ordered)
