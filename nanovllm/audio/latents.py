"""What may come from outside as a recording that has been encoded."""

import numpy as np

MAX_LATENT = 1e4
"""Beyond all that an autoencoder makes of a recording, and far from what overflows."""


def latents_fault(latents: bytes, patch_size: int, feat_dim: int) -> str:
    """Say what is wrong with latents.

    Args:
        latents: What should be float32 `[num_patches, patch_size, feat_dim]`, at least one patch.
        patch_size: Frames of a patch.
        feat_dim: Values of a frame.

    Returns:
        A sentence; empty if nothing is.
    """
    patch_bytes = 4 * patch_size * feat_dim
    if not latents or len(latents) % patch_bytes:
        return (
            f"{len(latents)} bytes are no patches of {patch_size} x {feat_dim} float32 values, "
            f"{patch_bytes} bytes each"
        )
    values = np.frombuffer(latents, "<f4")
    if not np.isfinite(values).all():
        return "it has values that are NaN or infinite"
    if np.abs(values).max() > MAX_LATENT:
        return "it has values that no recording has"
    return ""
