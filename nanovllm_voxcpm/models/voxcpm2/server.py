"""Where nanovllm-voxcpm has the pools of VoxCPM2; here they are the same for all releases."""

from nanovllm.voxcpm import AsyncVoxCPMServerPool as AsyncVoxCPM2ServerPool
from nanovllm.voxcpm import SyncVoxCPMServerPool as SyncVoxCPM2ServerPool

__all__ = ["AsyncVoxCPM2ServerPool", "SyncVoxCPM2ServerPool"]
