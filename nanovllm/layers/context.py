"""What a forward pass needs besides its inputs."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nanovllm.kernels.attention_backend import AttentionBackend
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.lora import LoRABatch
from nanovllm.layers.parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Passed as an argument through a model, so that no layer reads global state.

    Args:
        kernels: Computes everything but attention.
        backend: Computes attention.
        kv_caches: Each attention layer's cache, by layer index.
        cache_slots: Where the step's keys and values go, `[num_tokens]`.
        attention: What the backend planned for the step.
        lora: Which rows of the step go through which adapter; None if none goes through one.
        parallel: The ranks that have a part of the model each; None if all of it is here.
    """

    kernels: Kernels
    backend: AttentionBackend
    kv_caches: list[Tensor]
    cache_slots: Tensor
    attention: Any
    lora: LoRABatch | None = None
    parallel: TensorParallel | None = None

    def of_rows(self, rows: Tensor, repeats: int = 1) -> "ForwardContext":
        """The context of other rows than the step's; see `LoRABatch.take`."""
        return self if self.lora is None else replace(self, lora=self.lora.take(rows, repeats))
