"""What the machine could do at best: measured ceilings, and the times that follow from them.

A step that decodes reads all linear weights once and the keys and values of every row, so it takes
at least `(weight bytes + sum of contexts * KV bytes a position) / bandwidth`; its matrix products
take `2 * weights * rows / rate`, which counts where that is longer than reading the weights. A
prompt of `n` tokens takes `2 * weights * n / rate`, and its attention, two products over the causal
half, `2 * layers * heads * head_dim * n^2 / rate`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from gpu.timer import Timer
from gpu.world import Model
from nanovllm.bench.offline import Workload


class Ceilings(NamedTuple):
    """What was reached by the plainest of operations.

    Args:
        copy: Bytes per second, read and written.
        read: Bytes per second of a sum.
        flops: bf16 operations per second of a matrix product.
    """

    copy: float
    read: float
    flops: float

    @property
    def bandwidth(self) -> float:
        return max(self.copy, self.read)


def measure_ceilings(timer: Timer, device: torch.device, tiny: bool) -> Ceilings:
    """Copy and sum 4 GiB, and multiply matrices of 8192 x 8192, filled with random values."""
    num_values, width = (1 << 16, 64) if tiny else (1 << 31, 8192)
    source = torch.empty(num_values, dtype=torch.bfloat16, device=device).uniform_()
    target = torch.empty_like(source)
    num_bytes = source.nbytes
    copy = 2 * num_bytes / timer.seconds(partial(target.copy_, source))
    # As float32, whose sum is the fastest that torch has.
    values = source.view(torch.float32)
    read = num_bytes / timer.seconds(values.sum)
    del source, target, values
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    flops = 2 * width**3 / timer.seconds(partial(torch.matmul, a, b))
    return Ceilings(copy, read, flops)


def decode_seconds(model: Model, contexts: Sequence[int], ceilings: Ceilings) -> float:
    """A step that decodes rows of these contexts."""
    weights = model.weight_bytes
    product = weights * len(contexts) / ceilings.flops  # 2 operations, 2 bytes a weight
    kv_cache = sum(contexts) * model.shape.kv_bytes_per_token
    return max(weights / ceilings.bandwidth, product) + kv_cache / ceilings.bandwidth


def prefill_seconds(model: Model, num_tokens: int, ceilings: Ceilings) -> float:
    """A prompt of so many tokens."""
    shape = model.shape
    width = shape.num_attention_heads * shape.head_dim
    attention = 2 * shape.num_hidden_layers * width * num_tokens**2
    return (2 * shape.num_layer_weights * num_tokens + attention) / ceilings.flops


def offline_seconds(model: Model, workload: Workload, ceilings: Ceilings) -> float:
    """All prompts, and then all sequences at once, a token a step, until each has its own."""
    prompts = [len(prompt) for prompt in workload.prompts]
    seconds = sum(prefill_seconds(model, length, ceilings) for length in prompts)
    for step in range(1, max(workload.output_lens)):
        contexts = [
            length + step
            for length, output_len in zip(prompts, workload.output_lens, strict=True)
            if output_len > step
        ]
        seconds += decode_seconds(model, contexts, ceilings)
    return seconds
