"""What of a model fits this machine, worked out without loading its weights."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.config import EngineConfig
from nanovllm.kernels.attention_select import default_block_size
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.select import select_kernels
from nanovllm.models.checkpoint import weight_files
from nanovllm.models.hub import resolve_model
from nanovllm.models.model_config import ModelConfig, read_json, stored_quantization
from nanovllm.models.quantization import weight_bits
from nanovllm.models.registry import CLASSES
from nanovllm.models.sharding import Sharding
from nanovllm.models.voxcpm import vae
from nanovllm.models.voxcpm.config import VoxCPMConfig, is_speech
from nanovllm.models.voxcpm.model import VoxCPM
from nanovllm.models.weights import expected_tensors
from nanovllm.runners.memory import (
    ModelShape,
    attention_config,
    fit_kv_cache,
    kv_cache_bytes,
    select_dtype,
)
from nanovllm.worker.loading import check_parallel, rank_device


@dataclass(frozen=True, slots=True)
class Fit:
    """A model's demands on memory, and what this machine has for its KV cache.

    Of a model that several devices share (`tensor_parallel_size`), all but the number of parameters
    is what one of them has.

    Args:
        model: Directory of the checkpoint.
        architecture: Class name in the checkpoint.
        device: Where it would run.
        kernels: What it would run on: "torch", "triton" or an instruction set of `cpu_isa`.
        dtype: Dtype it would run in.
        num_parameters: Parameters, shared ones counted once; those of a speech model's autoencoder
            are apart.
        weight_bytes: Memory for all of them.
        kv_bytes_per_token: Memory for the keys and values of one token.
        kv_cache_bytes: Memory the KV cache may take once the weights are loaded.
        num_kv_tokens: Tokens for which it has room and use.
        max_model_len: Longest prompt plus output.
        num_vae_parameters: Parameters of a speech model's autoencoder, as its file has them; its
            state of each running sequence is counted nowhere.
    """

    model: str
    architecture: str
    device: str
    kernels: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    num_kv_tokens: int
    max_model_len: int
    num_vae_parameters: int = 0


def work_out_fit(config: EngineConfig) -> Fit:
    """Work out what fits, as `LLM` would decide it.

    Raises:
        InvalidRequestError: The model or an option cannot be used.
        FileNotFoundError: There is no such model.
        NotEnoughMemoryError: The KV cache has no room for a single block.
    """
    directory = resolve_model(config)
    size = config.tensor_parallel_size
    if size > 1:
        check_parallel(config, directory)
    device = rank_device(config, 0)
    default = default_block_size(config.attention_backend, device)
    config = config.resolved_for(device.type, default)
    model = (VoxCPMConfig if is_speech(directory) else ModelConfig).from_directory(directory)
    dtype = select_dtype(config, model, device)
    kernels = select_kernels(config, device, dtype)
    num_parameters, num_vae_parameters = count_parameters(model)
    bits = 8.0 * dtype.itemsize
    if isinstance(kernels, CpuKernels):  # others compute with weights that are not quantized
        bits = weight_bits(config) or _stored_bits(config, directory, num_parameters) or bits
    shape: ModelShape = model
    num_local_parameters = num_parameters
    if size > 1 and isinstance(model, ModelConfig):
        sharding = Sharding(model, 0, size)
        shape = sharding.local
        num_local_parameters, _ = count_parameters(model, sharding)
    weight_bytes = int(num_local_parameters * bits / 8)
    weight_bytes += num_vae_parameters * torch.float32.itemsize
    still_to_load = weight_bytes * (size if device.type == "cpu" else 1)
    cache_bytes = kv_cache_bytes(config, shape, device, still_to_load)
    backend = kernels.attention(attention_config(config, shape, dtype))
    block_bytes = backend.cache_spec(1).num_bytes * shape.num_layers
    num_blocks, max_model_len = fit_kv_cache(config, shape, block_bytes, cache_bytes)
    return Fit(
        model=str(directory),
        architecture=model.architecture,
        device=str(device),
        kernels=kernels.name,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=block_bytes // config.block_size,
        kv_cache_bytes=cache_bytes,
        num_kv_tokens=num_blocks * config.block_size,
        max_model_len=max_model_len,
        num_vae_parameters=num_vae_parameters,
    )


def _stored_bits(config: EngineConfig, directory: Path, num_parameters: int) -> float | None:
    """Bits a parameter of a checkpoint that is quantized, by its files; None if there are none."""
    if config.dummy_weights or not stored_quantization(read_json(directory / "config.json")):
        return None
    try:
        num_bytes = sum(path.stat().st_size for path in weight_files(directory))
    except FileNotFoundError:
        return None
    return 8 * num_bytes / num_parameters


def count_parameters(
    model: ModelConfig | VoxCPMConfig, sharding: Sharding | None = None
) -> tuple[int, int]:
    """Parameters of a model's networks, and of its autoencoder if it is one of speech.

    Args:
        model: The model.
        sharding: The part of a text model to count; None is all of it.
    """
    vae_shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        if isinstance(model, VoxCPMConfig):
            shapes = expected_tensors(VoxCPM(model))
            vae_shapes = vae.expected_tensors(model.vae)
        else:
            shapes = expected_tensors(CLASSES[model.architecture](model, sharding))
    num_parameters, num_vae_parameters = (
        sum(math.prod(shape) for shape in of.values()) for of in (shapes, vae_shapes)
    )
    return num_parameters, num_vae_parameters
