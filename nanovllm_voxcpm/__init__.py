"""nanovllm's speech under the names of nanovllm-voxcpm, so that programs written for it run on."""

from nanovllm import __version__
from nanovllm.lora_config import LoRAConfig
from nanovllm.voxcpm import AsyncVoxCPMServerPool, SyncVoxCPMServerPool, VoxCPM

__all__ = [
    "AsyncVoxCPMServerPool",
    "LoRAConfig",
    "SyncVoxCPMServerPool",
    "VoxCPM",
    "__version__",
]
