"""How much memory there is, and how many KV blocks fit into it."""

import logging
import os
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.errors import InvalidRequestError, NotEnoughMemoryError
from nanovllm.kernels.attention_backend import AttentionConfig, CacheSpec
from nanovllm.kernels.cpu.packing import zeroed
from nanovllm.runners.graphs import capture_sizes

logger = logging.getLogger(__name__)

GRAPH_LAYER_BYTES = 128 << 10
"""What a captured layer takes besides: the arguments of a dozen launches, and more for safety."""

CPU_KV_CACHE_BYTES = 4 << 30
"""Most that the KV cache takes on a CPU unless told otherwise; vLLM's default too."""

PREFAULTED_BYTES = 256 << 20
"""Of that, what is taken from the system at once, if the size was not asked for."""


class ModelShape(Protocol):
    """What memory is sized by: what the configs of text and of speech models share."""

    @property
    def num_layers(self) -> int:
        """Layers with a KV cache."""

    @property
    def num_heads(self) -> int:
        """Query heads of such a layer."""

    @property
    def num_kv_heads(self) -> int:
        """Its key and value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_mlp_values(self) -> int:
        """Values that a step holds at most for a token in an MLP."""

    @property
    def num_row_values(self) -> int:
        """Values that a step holds at most for a row that emits, behind its hidden states."""

    @property
    def dtype(self) -> str:
        """Name of the checkpoint's dtype."""

    @property
    def max_model_len(self) -> int:
        """Positions the model was made for."""


def select_device(name: str) -> torch.device:
    """The device an option means.

    Raises:
        InvalidRequestError: This machine does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available[name]:
        present = ", ".join(kind for kind, here in available.items() if here)
        raise InvalidRequestError(f"device {name!r} is not available here; available: {present}")
    return torch.device(name)


def select_dtype(config: EngineConfig, model: ModelShape, device: torch.device) -> torch.dtype:
    """The dtype a model runs in: the checkpoint's own unless an option says otherwise."""
    name = model.dtype if config.dtype == "auto" else config.dtype
    if name == "float16" and config.dtype == "auto" and device.type == "cpu":
        logger.warning("float16 weights run as bfloat16: the CPU kernels have no float16")
        name = "bfloat16"
    return cast(torch.dtype, getattr(torch, name))


def available_cpu_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take, by the kernel's estimate and its cgroup's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        # What was read from files counts as used, but is given back when memory is asked for.
        stat = (cgroup / "memory.stat").read_text().splitlines()
        reclaimable = int(dict(line.split() for line in stat).get("inactive_file", 0))
        free = min(free, int(limit.read_text()) - int(used.read_text()) + reclaimable)
    return max(free, 0)


def kv_cache_bytes(
    config: ResolvedConfig, model: ModelShape, device: torch.device, still_to_load: int = 0
) -> int:
    """Bytes the KV cache may take, once so many bytes of weights have been loaded."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * config.gpu_memory_utilization) - (total - free)
        needed = activation_bytes(config, model) + graph_bytes(config, model)
        return budget - needed - still_to_load
    least = min(CPU_KV_CACHE_BYTES, max(available_cpu_memory() - still_to_load, 0) // 2)
    return least // config.tensor_parallel_size  # the ranks share the machine


def attention_config(
    config: ResolvedConfig, model: ModelShape, dtype: torch.dtype
) -> AttentionConfig:
    """What attention needs to know of a model under some options."""
    return AttentionConfig(
        config.block_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        dtype,
        config.kv_cache_dtype == "int8",
        config.attention_backend,
        not config.disable_cascade_attn,
        config.deterministic,
    )


def allocate_kv_cache(spec: CacheSpec, device: torch.device) -> Tensor:
    """A layer's cache, zeroed; on a CPU the system gives its pages when they are touched."""
    if device.type == "cpu":
        return zeroed(spec.num_bytes).view(spec.dtype).view(spec.shape)
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)


def activation_bytes(config: ResolvedConfig, model: ModelShape) -> int:
    """What one step needs at most beside weights and cache, estimated from above."""
    tokens, seqs = config.max_num_batched_tokens, config.max_num_seqs
    hidden = tokens * (8 * model.hidden_size + model.num_mlp_values) * 4
    return hidden + seqs * model.num_row_values * 4 + (1 << 30)


def graph_bytes(config: ResolvedConfig, model: ModelShape) -> int:
    """What captured graphs hold beside that, estimated from above."""
    sizes = capture_sizes(config.max_cudagraph_capture_size, config.max_num_seqs)
    if config.enforce_eager or not sizes:
        return 0
    # What the tail reads has a place of its own, and the pool holds what the largest graph makes.
    row = 4 * (3 * model.num_row_values + 16 * model.hidden_size + 2 * model.num_mlp_values)
    return sizes[-1] * row + len(sizes) * model.num_layers * GRAPH_LAYER_BYTES


def fit_kv_cache(
    config: ResolvedConfig, model: ModelShape, block_bytes: int, cache_bytes: int
) -> tuple[int, int]:
    """Decide the number of KV blocks and the longest sequence.

    Args:
        config: Options.
        model: Hyper-parameters of the model.
        block_bytes: Size of a block over all layers.
        cache_bytes: Memory the cache may take.

    Returns:
        Number of blocks and `max_model_len`, lowered to what the blocks hold.

    Raises:
        InvalidRequestError: `max_model_len` exceeds the model's context.
        NotEnoughMemoryError: Not even one block fits.
    """
    block_size = config.block_size
    wanted = config.max_model_len or model.max_model_len
    if wanted > model.max_model_len:
        raise InvalidRequestError(
            f"max_model_len={wanted} exceeds the model's context of {model.max_model_len} tokens",
            "max_model_len",
        )
    useful = -(-wanted // block_size) * config.max_num_seqs
    num_blocks = config.num_kv_blocks or min(cache_bytes // block_bytes, useful)
    if num_blocks < 1:
        raise NotEnoughMemoryError(
            f"the KV cache may take {max(cache_bytes, 0) >> 10} KiB and one block needs "
            f"{block_bytes >> 10} KiB: free memory, raise gpu_memory_utilization or "
            "kv_cache_memory_bytes, or set num_kv_blocks"
        )
    fits = num_blocks * block_size
    if fits < wanted:
        logger.warning(
            "max_model_len is lowered from %d to %d, the %d KV blocks of %d positions that fit",
            wanted,
            fits,
            num_blocks,
            block_size,
        )
    return num_blocks, min(wanted, fits)
