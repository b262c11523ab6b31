"""Where nanovllm-voxcpm has `VoxCPM`."""

from nanovllm.voxcpm import VoxCPM

__all__ = ["VoxCPM"]
