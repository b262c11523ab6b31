"""Qwen3 (Yang et al. 2025): queries and keys are normed by head."""

from nanovllm.models.decoder import CausalLM


class Qwen3ForCausalLM(CausalLM):
    """`Qwen3ForCausalLM` of transformers."""

    qk_norm = True
