"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values."""

from nanovllm.models.decoder import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """`Qwen2ForCausalLM` of transformers."""

    qkv_bias = True
