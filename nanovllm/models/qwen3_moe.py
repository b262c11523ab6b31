"""Qwen3 with mixtures of experts (Yang et al. 2025), in the layers that the config says."""

from nanovllm.models.decoder import CausalLM


class Qwen3MoeForCausalLM(CausalLM):
    """`Qwen3MoeForCausalLM` of transformers."""

    qk_norm = True
