"""Which kernels serve a device."""

import logging

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.cpu.build import NoCompilerError
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.packing import TYPES
from nanovllm.kernels.cpu.threads import num_usable_cores
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


def select_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Our CPU kernels where they can run, torch's operators elsewhere.

    Raises:
        InvalidRequestError: `cpu_isa` names what this machine cannot run, or `deterministic` is
            wanted where it is not to be had.
    """
    reason = None
    if device.type != "cpu":
        reason = f"there are no kernels of ours for {device.type} yet"
    elif config.cpu_isa == "torch":
        reason = "cpu_isa is 'torch'"
    elif dtype not in TYPES:
        reason = f"there are no kernels of ours for {dtype}".replace("torch.", "")
    else:
        try:
            library = load_library(config.cpu_isa)
        except NoCompilerError as e:
            reason = str(e)
        else:
            library.start_threads(config.cpu_threads or num_usable_cores())
            return CpuKernels(library, dtype, not config.disable_cascade_attn, config.deterministic)
    if config.deterministic:
        raise InvalidRequestError(
            f"deterministic=True needs our CPU kernels, and {reason}", "deterministic"
        )
    if device.type == "cpu" and config.cpu_isa != "torch":
        logger.warning(
            "running on torch's operators, several times slower than our CPU kernels: %s", reason
        )
    if device.type == "cpu" and config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    if config.quantization:
        logger.warning("quantized weights are expanded when they are loaded: %s", reason)
    return TorchKernels(device, dtype)
