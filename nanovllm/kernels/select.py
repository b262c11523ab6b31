"""Which kernels serve a device."""

import logging

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_select import triton_problem
from nanovllm.kernels.cpu.build import NoCompilerError
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.packing import TYPES
from nanovllm.kernels.cpu.threads import num_usable_cores
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


def select_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Our Triton or CPU kernels where they can run, torch's operators elsewhere.

    Raises:
        InvalidRequestError: `cpu_isa` names what this machine cannot run, or `deterministic` is
            wanted where it is not to be had.
    """
    names_triton = "triton" in config.attention_backend.split(",")
    may_be_triton = device.type != "cpu" or names_triton
    reason = triton_problem(device) if may_be_triton else ""  # asking imports it on a CPU
    if may_be_triton and not reason:
        from nanovllm.kernels.triton.kernels import TritonKernels

        _say_that_weights_are_expanded(config, "our GPU kernels are of dense weights")
        return TritonKernels(device, dtype, config.deterministic)
    if device.type == "cpu":
        reason = "cpu_isa is 'torch'"
        if config.cpu_isa != "torch":
            kernels = _cpu_kernels(config, dtype)
            if not isinstance(kernels, str):
                return kernels
            reason = kernels
    if config.deterministic:
        raise InvalidRequestError(
            f"deterministic=True needs our CPU or Triton kernels, and {reason}", "deterministic"
        )
    if device.type == "cpu" and config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    if device.type == "cuda" or (device.type == "cpu" and config.cpu_isa != "torch"):
        ours = "CPU" if device.type == "cpu" else "Triton"
        logger.warning(
            "running on torch's operators, several times slower than our %s kernels: %s",
            ours,
            reason,
        )
    _say_that_weights_are_expanded(config, reason)
    return TorchKernels(device, dtype)


def _cpu_kernels(config: EngineConfig, dtype: torch.dtype) -> CpuKernels | str:
    """Our CPU kernels, or the reason why they do not run."""
    if dtype not in TYPES:
        return f"there are no kernels of ours for {dtype}".replace("torch.", "")
    try:
        library = load_library(config.cpu_isa)
    except NoCompilerError as e:
        return str(e)
    library.start_threads(config.cpu_threads or num_usable_cores())
    if config.enforce_eager:
        logger.info("enforce_eager: kernels are called one by one, which takes a CPU longer")
    cascade = not config.disable_cascade_attn
    return CpuKernels(library, dtype, cascade, config.deterministic, config.enforce_eager)


def _say_that_weights_are_expanded(config: EngineConfig, reason: str) -> None:
    if config.quantization:
        logger.warning("quantized weights are expanded when they are loaded: %s", reason)
