"""The seam between the layers and whatever computes on a device."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.attention_backend import AttentionBackend, AttentionConfig
from nanovllm.kernels.audio import DepthwiseConv
from nanovllm.kernels.lora import IntArray, LoRABatch, LoRAWeights


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix in a few bits: row `i`, column `j` is `(codes - zeros) * scales` of its group.

    Args:
        codes: uint8 `[rows, depth]`, below `2 ** bits`.
        scales: float32 `[rows, num_groups]`.
        zeros: uint8 `[rows, num_groups]`; None is the middle, `2 ** (bits - 1)`.
        bits: 4 or 8.
        group_size: Columns of a group; the last one may be short.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The matrix, float32 `[rows, depth]`."""
        depth = self.codes.shape[1]
        middle = float(1 << (self.bits - 1))
        zeros = torch.full_like(self.scales, middle) if self.zeros is None else self.zeros.float()

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.group_size, dim=1)[:, :depth]

        return (self.codes.float() - spread(zeros)) * spread(self.scales.float())


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """What becomes of the parts of a linear layer's weight.

    Args:
        rows: Outputs, of all parts together.
        depth: Inputs.
        activation: If there is one, there are two parts of equal width, `gate` and `up`, of which
            only `activation(gate) * up` is wanted.
        replaceable: Whether `Kernels.repack` may give it another matrix.
    """

    rows: int
    depth: int
    activation: Activation | None = None
    replaceable: bool = False

    @property
    def gated(self) -> bool:
        """Whether half of the outputs gate the others."""
        return self.activation is not None


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens are shared out among experts.

    Args:
        top_k: Experts that a token goes through: those with the best scores.
        normalized: Whether their shares, the softmax of all scores, are scaled to sum to one.
    """

    top_k: int
    normalized: bool


class Choice(NamedTuple):
    """Chosen ids `[num_rows]`, and whether each row's logits were usable."""

    token_ids: Tensor
    valid: Tensor


class Draws(NamedTuple):
    """How to choose a token in each row; None where no row uses a setting.

    Args:
        temperature: float32 `[num_rows]`, 0 for greedy rows.
        uniforms: One draw in [0, 1) for each row, float32 `[num_rows]`.
        any_sampled: Whether a row is not greedy.
        top_k: int64 `[num_rows]`, the vocabulary size for all.
        top_p: float32 `[num_rows]`.
        min_p: float32 `[num_rows]`.
    """

    temperature: Tensor
    uniforms: Tensor
    any_sampled: bool
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None


@dataclass(frozen=True, slots=True)
class Penalties:
    """What the penalties of some rows need.

    Args:
        rows: The rows concerned, `[num_penalised]`.
        history: Ids of prompt and output, `[num_penalised, max_len]`.
        lengths: Valid ids of each history, `[num_penalised]`.
        prompt_lengths: How many of them are the prompt, `[num_penalised]`.
        repetition: `repetition_penalty` of each row, and likewise below.
        presence: See above.
        frequency: See above.
    """

    rows: Tensor
    history: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


class Kernels(Protocol):
    """What networks are made of, on one device and in one dtype.

    What `pack` returns is a weight in a form of the implementation's own; only it looks inside.
    """

    @property
    def name(self) -> str:
        """What runs them: "torch", "triton", or the instruction set of our CPU kernels."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of the matrices that are not quantized."""

    def with_dtype(self, dtype: torch.dtype) -> "Kernels":
        """The same in another dtype, float32 or bfloat16."""

    def running(self) -> AbstractContextManager[None]:
        """Entered while a model is loaded or run."""

    def pack(
        self, spec: WeightSpec, parts: Iterable[Tensor | QuantizedWeight], bias: Tensor | None
    ) -> Any:
        """Take over a linear layer's weight, part by part `[part_rows, depth]`, and its bias."""

    def pack_experts(
        self, spec: WeightSpec, num_experts: int, parts: Iterable[Tensor | QuantizedWeight]
    ) -> Any:
        """Take over the weights of many layers of one shape, the parts of each after the other's.

        What becomes of them is for `mixture`.
        """

    def repack(self, weight: Any, matrix: Tensor) -> None:
        """Replace a weight that was packed of a dense matrix, in its place, by another one.

        Its spec says that it is `replaceable`.
        """

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """Map `[num_tokens, depth]` to `[num_tokens, rows]`, or half of them if gated."""

    def linear_add(self, x: Tensor, weight: Any, total: Tensor) -> Tensor:
        """Return `total` `[num_tokens, rows]` plus that, which may be in `total`'s place."""

    def logits(self, x: Tensor, weight: Any) -> Tensor:
        """The same, in float32."""

    def mixture(
        self, x: Tensor, scores: Tensor, routing: Routing, gate_up: Any, down: Any
    ) -> Tensor:
        """Take each token through a few of many MLPs, and sum what they make by their shares.

        Args:
            x: `[num_tokens, depth]`.
            scores: Of each expert for each token, float32 `[num_tokens, num_experts]`. Among equals
                any may be chosen.
            routing: What becomes of them.
            gate_up: The experts' first weights, which are gated.
            down: Their second ones.

        Returns:
            `[num_tokens, rows of down]`.
        """

    def lora_weights(self, spec: WeightSpec, rank: int, num_slots: int) -> LoRAWeights:
        """Take the memory for adapters of a layer: its own shape, their rank, their number."""

    def lora_batch(self, slots: IntArray) -> LoRABatch | None:
        """Rows by their adapter slots `[num_rows]`, for these adapters; None if no row has one."""

    def embed(self, token_ids: Tensor, weight: Any) -> Tensor:
        """Look up rows: int64 `[num_tokens]` to `[num_tokens, depth]`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension (Zhang & Sennrich 2019), by float32 weights."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of `x + residual`, and the sum, which may be in `residual`'s place."""

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """`activation(gate) * up` of `[num_tokens, 2 * width]` (Shazeer 2020)."""

    def attention(self, config: AttentionConfig) -> AttentionBackend:
        """A backend for some layers."""

    def prefault(self, tensors: Sequence[Tensor], num_bytes: int) -> None:
        """Have the system give so many bytes of tensors before they are used, if it would wait."""

    def replay(
        self,
        key: Hashable,
        compute: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Compute something whose kernels may be written down once and then repeated as they were.

        Where they read and write beyond the inputs (weights, caches, plans) is written down, too:
        all of it has to be there as long as these kernels.

        Args:
            key: Stands for the computation, which is the same each time.
            compute: Calls kernels. From one time to the next, all that they read and write stays at
                its address, but for these inputs; it looks at no values.
            inputs: Its arguments, `[num_rows, ...]`; overwritten by some kernels.

        Returns:
            What `compute` returns.
        """

    def local_attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        length: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        """Attend within short sequences of equal length, in both directions and without a cache.

        Args:
            qkv: Projections, one sequence after the other,
                `[num_seqs * length, (num_heads + 2 * num_kv_heads) * head_dim]`.
            rotary: Cosines and sines of the positions, each float32 `[length, 1, head_dim / 2]`.
            length: Positions of a sequence.
            num_heads: Query heads.
            num_kv_heads: Key and value heads.

        Returns:
            `[num_seqs * length, num_heads * head_dim]`.
        """

    def apply_penalties(self, logits: Tensor, penalties: Penalties) -> None:
        """Apply repetition, presence and frequency penalties to float32 logits, in place.

        Repetition counts tokens of the prompt and the output, the others of the output alone.
        """

    def choose(self, logits: Tensor, draws: Draws) -> Choice:
        """Choose a token in each row of float32 logits, which may be overwritten.

        The temperature comes first, then min-p, then top-k, then top-p over what that leaves.
        """

    def depthwise_conv(
        self, x: Tensor, conv: DepthwiseConv, history: Tensor, slots: Tensor
    ) -> Tensor:
        """Convolve float32 `[num_seqs, num_frames, channels]` along its frames.

        Args:
            x: The next frames of some sequences.
            conv: The convolution and what is around it.
            history: float32 `[num_slots, conv.pad, channels]`; the sequences' rows are updated.
            slots: Slot of each sequence, int64 `[num_seqs]`, no two the same.
        """

    def causal_windows(
        self,
        x: Tensor,
        snake: Tensor | None,
        history: Tensor,
        slots: Tensor,
        width: int,
        stride: int,
    ) -> Tensor:
        """Gather what each output of a strided causal convolution sees, for a `linear`.

        Args:
            x: The next frames, float32 `[num_seqs, num_frames, channels]`; a multiple of `stride`.
            snake: Snake on the way in, see `snake_table`.
            history: As for `depthwise_conv`; as long as `width - stride`, or longer by less than
                `stride`: then windows end that much before their newest frame.
            slots: As for `depthwise_conv`.
            width: Frames of a window.
            stride: Frames from one window to the next.

        Returns:
            `[num_seqs * num_frames / stride, width * channels]`, oldest frame first.
        """
