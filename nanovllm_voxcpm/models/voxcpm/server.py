"""Where nanovllm-voxcpm has the pools."""

from nanovllm.voxcpm import AsyncVoxCPMServerPool, SyncVoxCPMServerPool

__all__ = ["AsyncVoxCPMServerPool", "SyncVoxCPMServerPool"]
