"""Speech engines in tests: requests in the engine's terms, and what became of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm import EngineConfig, SamplingParams
from nanovllm.batch import EngineOutput, Key, SpeechPayload, SpeechRequest, patch_key
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.runners.speech import SpeechRunner
from nanovllm.worker.loading import load_engine

AUDIO_START, REFERENCE_START, REFERENCE_END = 101, 103, 104

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ask:
    """A request.

    Args:
        keys: The prompt's keys.
        latents: What stands at its audio positions, `[num_patches, P, D]`.
        seed: Of its noise.
        max_patches: Patches to generate at most.
        options: More of `SpeechRequest`'s own.
        adapter_id: LoRA adapter.
    """

    keys: list[Key]
    latents: Tensor | None = None
    seed: int = 0
    max_patches: int = 6
    options: dict[str, Any] = field(default_factory=dict)
    adapter_id: int | None = None

    @property
    def identity(self) -> object:
        """What decides what becomes of it."""
        return tuple(self.keys), self.seed, self.max_patches, repr(self.options)

    def add_to(self, engine: LLMEngine) -> int:
        """Queue it; returns the id of its sequence."""
        latents = b"" if self.latents is None else self.latents.numpy().tobytes()
        params = SamplingParams(max_tokens=self.max_patches, seed=self.seed)
        request = SpeechRequest(latents, **self.options)
        return engine.add(self.keys, params, adapter_id=self.adapter_id, payload=request)[0]


class Spoken(NamedTuple):
    """What became of a request: patches `[num_patches, P, D]`, sound, and how it ended."""

    patches: FloatArray
    audio: FloatArray
    finish_reason: str | None
    stop_reason: int | str | None


def keys_of(
    token_ids: Sequence[int], prompt: Tensor | None = None, reference: Tensor | None = None
) -> tuple[list[Key], Tensor | None]:
    """A prompt's keys and patches: what is to be spoken, and patches `[num_patches, P, D]`."""
    keys: list[Key] = [*token_ids, AUDIO_START]
    if reference is not None:
        keys = [REFERENCE_START, *patch_keys(reference), REFERENCE_END, *keys]
    if prompt is not None:
        keys += patch_keys(prompt)
    patches = [part for part in (reference, prompt) if part is not None]
    return keys, torch.cat(patches) if patches else None


def patch_keys(patches: Tensor) -> list[bytes]:
    return [patch_key(patch.numpy().tobytes()) for patch in patches]


def make_engine(directory: Path, **options: Any) -> tuple[LLMEngine, SpeechRunner]:
    """An engine of a tiny checkpoint, on one thread of a CPU unless options say otherwise."""
    defaults: dict[str, Any] = {"max_num_seqs": 8, "num_kv_blocks": 128, "device": "cpu"}
    config = EngineConfig(model=str(directory), cpu_threads=1, **defaults | options)
    engine, runner, _ = load_engine(config, directory)
    assert isinstance(runner, SpeechRunner)
    return engine, runner


def speak(engine: LLMEngine, asks: Iterable[Ask], shape: VoxCPMConfig) -> list[Spoken]:
    """Run requests together until all have ended."""
    seq_ids = [ask.add_to(engine) for ask in asks]
    news: dict[int, list[EngineOutput]] = {seq_id: [] for seq_id in seq_ids}
    while engine.has_unfinished:
        for output in engine.step():
            news[output.seq_id].append(output)
    return [spoken(news[seq_id], shape) for seq_id in seq_ids]


def spoken(news: Sequence[EngineOutput], shape: VoxCPMConfig) -> Spoken:
    """What the news of one sequence say."""
    payloads = [output.payload for output in news if output.key is not None]
    patches, audio = bytearray(), bytearray()
    for output, payload in zip(news, payloads, strict=False):
        assert isinstance(payload, SpeechPayload)
        assert output.key == patch_key(payload.latents)
        assert len(payload.audio) == 4 * shape.samples_per_patch
        patches += payload.latents
        audio += payload.audio
    return Spoken(
        np.frombuffer(patches, np.float32).reshape(-1, shape.patch_size, shape.feat_dim),
        np.frombuffer(audio, np.float32),
        news[-1].finish_reason,
        news[-1].stop_reason,
    )


def error(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> float:
    """The greatest difference, relative to the greatest value."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
