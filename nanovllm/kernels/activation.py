"""What gates an MLP; plain data, so that reading a config takes no torch."""

from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
"""SiLU, or GELU by its approximation with tanh (Hendrycks & Gimpel 2016)."""
