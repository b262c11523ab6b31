"""The tail of a speech model's step: from hidden states to the next patch and its sound."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import IntArray, to_device
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.lora import LoRABatch
from nanovllm.layers.context import ForwardContext
from nanovllm.models.voxcpm.cfm import Guidance
from nanovllm.models.voxcpm.model import VoxCPM
from nanovllm.runners.decode_graphs import RowOutputs


class TailRows(NamedTuple):
    """What the host knows of the rows that emit.

    Args:
        slots: Slot of each, `[num_rows]`.
        num_timesteps: Steps of its sampler, `[num_rows]`.
        cfg_value: Its guidance, float32 `[num_rows]`.
        noise: Where its sampler starts, float32 `[num_rows, patch_size, feat_dim]`.
        adapters: Its adapter slot, `[num_rows]`; None if no row has one.
    """

    slots: IntArray
    num_timesteps: IntArray
    cfg_value: npt.NDArray[np.float32]
    noise: npt.NDArray[np.float32]
    adapters: IntArray | None

    def groups(self) -> Iterator[tuple[int, IntArray]]:
        """The numbers of timesteps that occur, each with the rows that have it."""
        for num_timesteps in np.unique(self.num_timesteps).tolist():
            yield num_timesteps, (self.num_timesteps == num_timesteps).nonzero()[0]


class Generated(NamedTuple):
    """What the tail made of the rows that emit.

    Args:
        patches: float32 `[num_rows, patch_size, feat_dim]`.
        audio: Their sound, float32 `[num_rows, samples_per_patch]`.
        stops: Whether the stop head says that the speech ends here, `[num_rows]`.
        valid: Whether patch and sound are finite, `[num_rows]`.
    """

    patches: Tensor
    audio: Tensor
    stops: Tensor
    valid: Tensor


class SpeechTail:
    """Denoises, decodes and keeps the next patch of each row.

    Args:
        model: The networks.
        kernels: What they run on.
        num_slots: Sequences that there is room for.
        device: Where all of it is.
        context: Makes the context of rows that have these adapters; there is no cache here.

    Attributes:
        last_patches: What each slot's sequence ended with so far, zeros behind a token, float32
            `[num_slots, patch_size, feat_dim]`.
    """

    def __init__(
        self,
        model: VoxCPM,
        kernels: Kernels,
        num_slots: int,
        device: torch.device,
        context: Callable[[LoRABatch | None], ForwardContext],
    ) -> None:
        self._model, self._kernels, self._context = model, kernels, context
        self._vae_state = model.vae.new_decoder_state(num_slots)
        shape = num_slots, model.config.patch_size, model.config.feat_dim
        self.last_patches = torch.zeros(shape, device=device)

    def start(self, slot: int, trailing: Tensor) -> None:
        """Set up what depends on the audio at the end of the prompt, if there is any.

        Args:
            slot: The sequence's.
            trailing: The recording which the speech continues, and what has been said of it,
                `[num_patches, patch_size, feat_dim]`.
        """
        self.last_patches[slot] = trailing[-1] if len(trailing) else 0.0
        self._model.vae.prime(trailing.flatten(0, 1), self._vae_state, slot)

    def generate(self, outputs: RowOutputs, rows: TailRows) -> Generated:
        """Make the next patches of some rows.

        Args:
            outputs: Hidden states of the two language models, each `[num_rows, hidden_size]`.
            rows: The rows.
        """
        lm, residual = outputs
        device = lm.device
        slots, noise = to_device(rows.slots, device), to_device(rows.noise, device)
        patches = torch.empty_like(noise)
        for num_timesteps, of_group in rows.groups():
            here = to_device(of_group, device)
            patches[here] = self.denoise(
                (lm[here], residual[here]),
                slots[here],
                noise[here],
                Guidance.of(rows.cfg_value[of_group], device),
                num_timesteps,
                self._adapters(rows, of_group),
            )
        return self.finish(lm, patches, slots, self._adapters(rows))

    def denoise(
        self,
        outputs: RowOutputs,
        slots: Tensor,
        noise: Tensor,
        guidance: Guidance,
        num_timesteps: int,
        lora: LoRABatch | None,
    ) -> Tensor:
        """Sample patches `[num_rows, patch_size, feat_dim]`; all that it takes is by row."""
        lm, residual = outputs
        cond = self.last_patches[slots]
        ctx = self._context(lora)
        return self._model.sample(lm, residual, cond, noise, guidance, num_timesteps, ctx)

    def finish(
        self, lm: Tensor, patches: Tensor, slots: Tensor, lora: LoRABatch | None
    ) -> Generated:
        """Decide whether patches are the last ones, decode them, and keep them for the next."""
        stops = self._model.stop_logits(lm, self._context(lora)).argmax(-1) == 1
        # The sequence of an invalid row ends when the step is collected; until then it must not
        # leave anything in the state or the cache that others could meet.
        finite = patches.isfinite().flatten(1).all(1)
        patches = torch.where(finite[:, None, None], patches, 0)
        audio = self._model.vae.decode(patches, self._vae_state, slots)
        self.last_patches[slots] = patches
        return Generated(patches, audio, stops, finite & audio.isfinite().all(1))

    def _adapters(self, rows: TailRows, of_group: IntArray | None = None) -> LoRABatch | None:
        if rows.adapters is None:
            return None
        slots = rows.adapters if of_group is None else rows.adapters[of_group]
        return self._kernels.lora_batch(slots)
