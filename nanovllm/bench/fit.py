"""What of a model fits this machine, worked out without loading its weights."""

from dataclasses import dataclass

import torch

from nanovllm.config import EngineConfig
from nanovllm.models.hub import resolve_model
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.registry import CLASSES
from nanovllm.runners.memory import fit_kv_cache, kv_cache_bytes, select_device


@dataclass(frozen=True, slots=True)
class Fit:
    """A model's demands on memory, and what this machine has for its KV cache.

    Args:
        model: Directory of the checkpoint.
        architecture: Class name in the checkpoint.
        device: Where it would run.
        dtype: Dtype it would run in.
        num_parameters: Parameters, shared ones counted once.
        weight_bytes: Memory for these.
        kv_bytes_per_token: Memory for the keys and values of one token.
        kv_cache_bytes: Memory the KV cache may take once the weights are loaded.
        num_kv_tokens: Tokens for which it has room and use.
        max_model_len: Longest prompt plus output.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    num_kv_tokens: int
    max_model_len: int


def work_out_fit(config: EngineConfig) -> Fit:
    """Work out what fits, as `LLM` would decide it.

    Raises:
        InvalidRequestError: The model or an option cannot be used.
        FileNotFoundError: There is no such model.
        NotEnoughMemoryError: The KV cache has no room for a single block.
    """
    directory = resolve_model(config)
    device = select_device(config.device)
    config = config.resolved_for(device.type)
    model = ModelConfig.from_directory(directory)
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in CLASSES[model.architecture](model).parameters())
    dtype_size = getattr(torch, dtype).itemsize
    weight_bytes = num_parameters * dtype_size
    cache_bytes = kv_cache_bytes(config, model, device, weight_bytes)
    token_bytes = model.kv_bytes_per_position(dtype_size)
    block_size = config.block_size or 1
    num_blocks, max_model_len = fit_kv_cache(config, model, token_bytes * block_size, cache_bytes)
    return Fit(
        model=str(directory),
        architecture=model.architecture,
        device=str(device),
        dtype=dtype,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=token_bytes,
        kv_cache_bytes=cache_bytes,
        num_kv_tokens=num_blocks * block_size,
        max_model_len=max_model_len,
    )
