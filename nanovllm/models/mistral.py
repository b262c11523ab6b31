"""Mistral (Jiang et al. 2023): Llama with a sliding window, which the config carries."""

from nanovllm.models.decoder import CausalLM


class MistralForCausalLM(CausalLM):
    """`MistralForCausalLM` of transformers."""
