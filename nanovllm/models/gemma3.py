"""Gemma 3 (Gemma Team 2025), what it writes: norms on both sides, and windows in most layers."""

from nanovllm.models.decoder import CausalLM


class Gemma3ForCausalLM(CausalLM):
    """`Gemma3ForCausalLM` of transformers."""

    qk_norm = True
    output_norms = True
    norm_offset = 1.0
