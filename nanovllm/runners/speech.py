"""Speech: positions hold text tokens or patches, the last one of a row yields a patch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.batch import (
    UNUSABLE_PATCH,
    Batch,
    Key,
    SlotStart,
    SpeechPayload,
    SpeechRequest,
    StepResult,
    Stop,
    patch_key,
)
from nanovllm.config import ResolvedConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import IntArray
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.lora import LoRABatch
from nanovllm.layers.context import ForwardContext
from nanovllm.models.voxcpm.model import VoxCPM
from nanovllm.runners.captured_tail import CapturedTail
from nanovllm.runners.decode_graphs import RowOutputs
from nanovllm.runners.graphs import Capture
from nanovllm.runners.model_runner import ModelRunner, StepRows
from nanovllm.runners.random_draws import gaussians
from nanovllm.runners.speech_tail import SpeechTail, TailRows
from nanovllm.runners.transfers import HostCopies
from nanovllm.runners.voice_encoding import VoiceEncoding

AUDIO = -1
"""Stands for a patch among token ids."""

SETTINGS = np.dtype(
    [
        ("num_prompt", np.int64),
        ("num_known", np.int64),
        ("seed", np.uint64),
        ("cfg_value", np.float32),
        ("num_timesteps", np.int64),
        ("temperature", np.float32),
    ]
)
"""A slot's row in the table of numbers. `num_known` counts the keys when the sequence started."""


@dataclass(frozen=True, slots=True)
class SpeechSlot:
    """What a running sequence owns besides its rows in the tables.

    Args:
        request: What was asked for, and the patches generated so far.
        token_ids: What stood at its positions when it started, `AUDIO` for patches, `[num_known]`.
        patches: These patches, on the device, `[num_patches, patch_size, feat_dim]`.
        patch_numbers: Which of them a position holds, where it holds one, `[num_known]`.
    """

    request: SpeechRequest
    token_ids: IntArray
    patches: Tensor
    patch_numbers: IntArray


class SpeechStep(NamedTuple):
    """A step in flight: the rows that emit, and what they yield."""

    slots: list[int]
    states: list[SpeechSlot]
    patch_indices: list[int]
    generated: HostCopies


class SpeechRunner(ModelRunner[VoxCPM]):
    """Feeds token ids and patches and generates the next patch, with its sound.

    The last patch of each running sequence lies in a table on the device: a step reads it as input
    and as the condition of the next patch, which it writes there; so the next step can start before
    the host has seen it. What the host has seen is kept with the request: a sequence that was
    preempted goes on from there.

    Attributes:
        noise_source: Draws the noise of a patch from (seed, patch index), float32
            `[patch_size, feat_dim]`, in place of our own.
    """

    def __init__(
        self,
        model: VoxCPM,
        kernels: Kernels,
        config: ResolvedConfig,
        capture: Capture | None = None,
    ) -> None:
        num_slots, shape = config.max_num_seqs + 1, model.config
        device = next(model.parameters()).device
        # Before the KV cache, which takes of the memory what is left.
        tail = SpeechTail(model, kernels, num_slots, device, self._tail_context)
        super().__init__(model, kernels, config, capture)
        self._speech_tail, self._captured_tail = tail, None
        if self._graphs is not None and capture is not None:
            self._captured_tail = CapturedTail(
                capture, self._graphs.sizes, tail, self._graphs.outputs, shape.samples_per_patch
            )
        self._patch_shape = (shape.patch_size, shape.feat_dim)
        self._settings = np.zeros(num_slots, SETTINGS)
        self._no_cache = torch.empty(0, dtype=torch.int64, device=self.device)
        self._slots: dict[int, SpeechSlot] = {}
        self.noise_source: Callable[[int, int], Tensor] | None = None

    def _capture(self) -> None:
        super()._capture()
        if self._captured_tail is not None:
            self._captured_tail.capture()

    def check(self, keys: Sequence[Key], payload: object) -> None:
        """See that a sequence can start: in a step it would take others along.

        Args:
            keys: The prompt's keys.
            payload: The `SpeechRequest`.

        Raises:
            InvalidRequestError: It cannot; the message says why.
        """
        if not isinstance(payload, SpeechRequest):
            raise InvalidRequestError("this is a speech model: it takes speech requests alone")
        vocab_size = self.model.config.vocab_size
        if any(isinstance(key, int) and not 0 <= key < vocab_size for key in keys):
            raise InvalidRequestError(f"a token id is not in the vocabulary of {vocab_size}")
        num_patches = sum(isinstance(key, bytes) for key in keys)
        size = 4 * self._patch_shape[0] * self._patch_shape[1]
        if len(payload.latents) != num_patches * size:
            raise InvalidRequestError(
                f"{num_patches} audio positions need {num_patches * size} bytes of latents, got "
                f"{len(payload.latents)}",
                "latents",
            )
        if not np.isfinite(np.frombuffer(payload.latents, dtype=np.float32)).all():
            raise InvalidRequestError("the latents have values that are NaN or infinite", "latents")

    def encode(self, audio: bytes) -> VoiceEncoding:
        """Begin to encode a recording.

        Args:
            audio: float32 mono samples at the encoder's rate, padded to whole patches.

        Raises:
            InvalidRequestError: It is empty, not padded or not finite.
        """
        return VoiceEncoding(self.model.vae, self.kernels, self.device, self._patch_shape[0], audio)

    def _start_slot(self, start: SlotStart) -> None:
        slot, request = start.slot, cast(SpeechRequest, start.payload)
        # Patches of steps that were in flight when it was preempted have not become keys.
        del request.generated[len(start.keys) - start.num_prompt_keys :]
        token_ids = np.array([key if isinstance(key, int) else AUDIO for key in start.keys])
        is_audio = token_ids == AUDIO
        content = np.frombuffer(request.latents + b"".join(request.generated), dtype=np.float32)
        patches = self._to_device(content.reshape(-1, *self._patch_shape).copy())
        if len(patches) != is_audio.sum():
            raise ValueError(f"{len(patches)} patches for {is_audio.sum()} audio positions")
        self._slots[slot] = SpeechSlot(request, token_ids, patches, is_audio.cumsum() - 1)
        self._settings[slot] = (
            start.num_prompt_keys,
            len(start.keys),
            start.seed,
            request.cfg_value,
            request.inference_timesteps,
            request.temperature,
        )
        text = (~is_audio).nonzero()[0]
        num_trailing = len(is_audio) - (int(text[-1]) + 1 if len(text) else 0)
        self._speech_tail.start(slot, patches[len(patches) - num_trailing :])

    def _release_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def _new_outputs(self, num_rows: int) -> RowOutputs:
        shape = num_rows, self.model.config.base.hidden_size
        lm, residual = (
            torch.zeros(shape, dtype=self.model.dtype, device=self.device) for _ in range(2)
        )
        return lm, residual

    def _num_captured(self, batch: Batch) -> int:
        num_decodes = super()._num_captured(batch)
        # The last position of a prompt, computed by itself, may be text.
        num_known = self._settings["num_known"][batch.slots[:num_decodes]]
        return num_decodes if (batch.starts[:num_decodes] >= num_known).all() else 0

    def _compute(self, rows: StepRows, ctx: ForwardContext) -> RowOutputs | None:
        lm, residual = self.model(*self._inputs(rows), rows.positions, ctx, rows.wanted)
        return (lm, residual) if rows.emits.any() else None

    def _compute_decodes(self, slots: Tensor, positions: Tensor, ctx: ForwardContext) -> RowOutputs:
        is_audio = torch.ones_like(slots, dtype=torch.bool)
        patches = self._speech_tail.last_patches[slots]
        lm, residual = self.model(slots, is_audio, patches, positions, ctx)
        return lm, residual

    def _inputs(self, rows: StepRows) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and audio mask by token, and the patches at the audio positions, in order."""
        num_tokens = len(rows.positions)
        token_ids = np.zeros(num_tokens, dtype=np.int64)
        is_audio = np.ones(num_tokens, dtype=np.bool_)
        # What a sequence had when it started is fed from there, all after that as it is made.
        prefills = (rows.starts < self._settings["num_known"][rows.slots]).nonzero()[0]
        pool = [self._speech_tail.last_patches]
        sources = np.repeat(rows.slots, rows.lengths)  # which patch of the pool a token takes
        num_pooled = len(pool[0])
        for row in prefills.tolist():
            state = self._slots[int(rows.slots[row])]
            known = slice(int(rows.starts[row]), int(rows.ends[row]))
            last = int(rows.last_tokens[row]) + 1
            tokens = slice(last - int(rows.lengths[row]), last)
            is_audio[tokens] = state.token_ids[known] == AUDIO
            token_ids[tokens] = state.token_ids[known].clip(0)
            sources[tokens] = num_pooled + state.patch_numbers[known]
            pool.append(state.patches)
            num_pooled += len(state.patches)
        patches = torch.cat(pool)[self._to_device(sources[is_audio])]
        return self._to_device(token_ids), self._to_device(is_audio), patches

    def _tail(
        self, outputs: RowOutputs | None, slots: IntArray, ends: IntArray
    ) -> SpeechStep | None:
        if outputs is None:
            return None
        settings = self._settings[slots]
        indices = ends - settings["num_prompt"]
        rows = TailRows(
            slots,
            settings["num_timesteps"],
            settings["cfg_value"],
            self._noise(settings, indices),
            None if self.adapters is None else self.adapters.slots_of(slots),
        )
        generated = (self._captured_tail or self._speech_tail).generate(outputs, rows)
        states = [self._slots[slot] for slot in slots.tolist()]
        return SpeechStep(slots.tolist(), states, indices.tolist(), HostCopies(generated))

    def _tail_context(self, lora: LoRABatch | None) -> ForwardContext:
        """The context of rows with these adapters; what comes now has no cache."""
        return self._context(self._no_cache, None, lora)

    def _noise(self, settings: npt.NDArray[np.void], indices: IntArray) -> npt.NDArray[np.float32]:
        """Where the sampler starts, float32 `[num_rows, patch_size, feat_dim]`."""
        seeds = settings["seed"]
        if self.noise_source is None:
            size = self._patch_shape[0] * self._patch_shape[1]
            draws = gaussians(seeds, indices.astype(np.uint64), size)
        else:
            pairs = zip(seeds.tolist(), indices.tolist(), strict=True)
            draws = np.stack([self.noise_source(*pair).numpy().ravel() for pair in pairs])
        noise: npt.NDArray[np.float32] = draws * settings["temperature"][:, None]
        return noise.reshape(-1, *self._patch_shape)

    def collect(self, handle: SpeechStep | None) -> list[StepResult]:
        """Wait for a step and return one result for each row that emits, in row order."""
        if handle is None:
            return []
        patches, audio, stops, valid = handle.generated.wait()
        return [
            self._result(slot, state, index, patches[row], audio[row], stops[row])
            if valid[row]
            else StepResult(slot, b"", Stop("error", UNUSABLE_PATCH))
            for row, (slot, state, index) in enumerate(
                zip(handle.slots, handle.states, handle.patch_indices, strict=True)
            )
        ]

    def _result(
        self,
        slot: int,
        state: SpeechSlot,
        patch_index: int,
        patch: npt.NDArray[np.float32],
        audio: npt.NDArray[np.float32],
        stops: bool,
    ) -> StepResult:
        latents = patch.tobytes()
        # A sequence that has left its slot meanwhile goes on from what it had.
        if self._slots.get(slot) is state:
            state.request.generated.append(latents)
        stop = Stop("stop") if stops and patch_index > state.request.min_len else None
        return StepResult(slot, patch_key(latents), stop, SpeechPayload(audio.tobytes(), latents))
