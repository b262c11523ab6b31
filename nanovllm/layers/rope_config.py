"""Rotary parameters as a checkpoint has them; plain data, so that reading them takes no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary parameters of a checkpoint.

    Args:
        head_dim: Width of a head; all of it is rotated.
        theta: Base of the frequencies.
        max_position: `max_position_embeddings` of the checkpoint.
        scaling: The checkpoint's `rope_scaling`, with at least `rope_type`. That may be `factors`,
            which no checkpoint says: `factors` by which frequencies are divided, and `magnitude`.
    """

    head_dim: int
    theta: float
    max_position: int
    scaling: dict[str, Any]

    @property
    def rope_type(self) -> str:
        return str(self.scaling.get("rope_type", "default"))

    @property
    def context_length(self) -> int:
        """Positions the model can use, scaling included."""
        factor = float(self.scaling.get("factor") or 1.0)
        if self.rope_type in ("linear", "dynamic"):
            return int(self.max_position * factor)
        if self.rope_type == "yarn":
            original = self.scaling.get("original_max_position_embeddings") or self.max_position
            return max(self.max_position, int(original * factor))
        return self.max_position
