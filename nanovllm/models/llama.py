"""Llama 2 and 3 (Touvron et al. 2023; Dubey et al. 2024), the plain form of the decoder."""

from nanovllm.models.decoder import CausalLM


class LlamaForCausalLM(CausalLM):
    """`LlamaForCausalLM` of transformers."""
