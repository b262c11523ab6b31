"""Where nanovllm-voxcpm has `LoRAConfig`."""

from nanovllm.lora_config import LoRAConfig

__all__ = ["LoRAConfig"]
