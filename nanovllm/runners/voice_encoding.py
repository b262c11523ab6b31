"""A recording on its way through the VAE's encoder."""

import numpy as np
import torch

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import Kernels
from nanovllm.models.voxcpm.vae import AudioEncoder, AudioVAE


class VoiceEncoding:
    """Encodes a recording slice by slice, so that other work can go on in between.

    Args:
        vae: The autoencoder.
        kernels: What it runs on.
        device: Where it is.
        patch_size: Frames of a patch.
        audio: float32 mono samples at the encoder's rate, padded to whole patches.

    Raises:
        InvalidRequestError: The recording is empty, not padded or not finite.
    """

    def __init__(
        self, vae: AudioVAE, kernels: Kernels, device: torch.device, patch_size: int, audio: bytes
    ) -> None:
        self._hop = vae.config.hop
        samples_per_patch = patch_size * self._hop
        if not audio or len(audio) % (4 * samples_per_patch):
            raise InvalidRequestError(
                f"a recording of {len(audio) / 4:g} samples is not padded to a multiple of "
                f"{samples_per_patch}",
                "audio",
            )
        self._samples = np.frombuffer(audio, dtype=np.float32)
        if not np.isfinite(self._samples).all():
            raise InvalidRequestError("the recording has samples that are NaN or infinite", "audio")
        self._kernels, self._device = kernels, device
        # On a GPU it runs beside the steps: waiting for a slice is not waiting for them.
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):  # which does not wait for what others clear
            self._encoder = AudioEncoder(vae)
        self._latents: list[bytes] = []
        self._num_done = 0

    @property
    def num_frames_left(self) -> int:
        """Frames that are still to be encoded."""
        return len(self._samples) // self._hop - self._num_done

    def advance(self, num_frames: int) -> None:
        """Encode so many frames more, and wait for them."""
        first, self._num_done = self._num_done, self._num_done + num_frames
        # A copy of the slice alone: torch wants memory that it could write to.
        part = self._samples[first * self._hop : self._num_done * self._hop].copy()
        with torch.inference_mode(), self._kernels.running(), torch.cuda.stream(self._stream):
            frames = self._encoder.push(torch.from_numpy(part).to(self._device))
            self._latents.append(frames.float().cpu().numpy().tobytes())

    def latents(self) -> bytes:
        """What has been encoded, float32 `[num_frames, feat_dim]`."""
        return b"".join(self._latents)
