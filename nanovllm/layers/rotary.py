"""Rotary position embedding (Su et al. 2021) and the ways to stretch it."""

import math
from typing import Any

import torch
from torch import Tensor

from nanovllm.errors import UnsupportedModelError
from nanovllm.layers.rope_config import RopeConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each float32 `[num_tokens, 1, head_dim / 2]`."""


class RotaryEmbedding:
    """Cosines and sines by position. They depend on the position alone, so cached keys stay valid.

    For `dynamic` (NTK) scaling, a position past the original context uses the frequencies of a
    sequence that ends there, as transformers does while it decodes.

    Raises:
        UnsupportedModelError: The scaling is of a kind we do not know.
    """

    def __init__(self, config: RopeConfig) -> None:
        self._config = config
        self._inv_freq, self._magnitude = inverse_frequencies(config)

    def __call__(self, positions: Tensor) -> Rotary:
        """Return cosines and sines of positions `[num_tokens]`."""
        if self._inv_freq.device != positions.device:
            self._inv_freq = self._inv_freq.to(positions.device)
        inv_freq = self._inv_freq
        if self._config.rope_type == "dynamic":
            inv_freq = self._dynamic_frequencies(positions)
        angles = positions[:, None].float() * inv_freq
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        if self._magnitude == 1.0:
            return cos, sin
        return cos * self._magnitude, sin * self._magnitude

    def _dynamic_frequencies(self, positions: Tensor) -> Tensor:
        """Frequencies of each position, `[num_tokens, head_dim / 2]`."""
        config = self._config
        dim, factor = config.head_dim, float(config.scaling["factor"])
        seq_len = (positions + 1).clamp(min=config.max_position).float()
        stretch = 1.0 + factor * (seq_len - config.max_position) / config.max_position
        theta = config.theta * stretch ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        inv_freq: Tensor = 1.0 / theta[:, None] ** exponent
        return inv_freq


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Frequencies `[head_dim / 2]` in radians per position, and the factor on cos and sin.

    Raises:
        UnsupportedModelError: The scaling is of a kind we do not know.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.theta ** (exponent / config.head_dim)
    match config.rope_type:
        case "default" | "dynamic":
            return inv_freq, 1.0
        case "factors":
            factors = torch.tensor(config.scaling["factors"], device="cpu")
            return inv_freq / factors, float(config.scaling["magnitude"])
        case "linear":
            return inv_freq / float(config.scaling["factor"]), 1.0
        case "llama3":
            return _llama3_frequencies(inv_freq, config.scaling), 1.0
        case "yarn":
            return _yarn_frequencies(inv_freq, config)
        case other:
            raise UnsupportedModelError(
                f"rope scaling {other!r} is not supported; supported: default, linear, dynamic, "
                "yarn, llama3",
                "rope_scaling",
            )


def _llama3_frequencies(inv_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Stretch long wavelengths, keep short ones, blend between (Llama 3.1)."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    stretched: Tensor = inv_freq * (blend + (1.0 - blend) / factor)
    return stretched


def _yarn_frequencies(inv_freq: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    """NTK by parts with a temperature (Peng et al. 2023, sections 3.2 and 3.4)."""
    scaling, dim = config.scaling, config.head_dim
    original = scaling.get("original_max_position_embeddings") or config.max_position
    factor = float(scaling.get("factor") or config.max_position / original)

    def dim_of(num_turns: float) -> float:
        """The dimension that turns this often over the original context."""
        return dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((steps - low) / (high - low)).clamp(0.0, 1.0)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            magnitude = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all)
        else:
            magnitude = _yarn_magnitude(factor, 1.0)
    return inv_freq / factor * ramp + inv_freq * (1.0 - ramp), float(magnitude)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
