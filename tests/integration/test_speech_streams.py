"""Many streams at once through `AsyncSpeech`: each is what it would be alone, and all is freed."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import AsyncSpeech, SpeechOutput, SpeechParams
from nanovllm.audio.files import Samples
from nanovllm.models.voxcpm.config import VoxCPMConfig
from tests.lora_oracle import write_adapter
from tests.unit.test_async_speech import recording, settled

NUM_STREAMS = 32
TEXTS = (
    "Once upon a time.",
    "A king had three sons, and the youngest of them went away one day.",
    "你好，世界。",
    "(A calm voice) No.",
)
CLOSE = 1e-4
"""Relative, of latents: what other shapes of the same sums come to over a dozen patches."""


class Request:
    """What one of the speakers asks for."""

    def __init__(self, index: int, options: dict[str, Any]) -> None:
        self.text = TEXTS[index % len(TEXTS)]
        self.params = SpeechParams(
            seed=index,
            cfg_value=(2.0, 1.0, 3.5)[index % 3],
            inference_timesteps=(4, 10, 6, 4, 7)[index % 5],
            temperature=(1.0, 0.7)[index % 2],
            max_generate_length=4 + 5 * index % 21,
        )
        self.options = options

    async def say(self, speech: AsyncSpeech) -> tuple[Samples, SpeechOutput]:
        stream = await speech.generate(self.text, self.params, keep_latents=True, **self.options)
        return await stream.read(), stream.output


async def requests(speech: AsyncSpeech, adapters: list[str], num_streams: int) -> list[Request]:
    """Requests of all modes, with and without adapters."""
    voice = await speech.add_prompt(recording(1.3), "wav", "The other day. ")
    latents = await speech.encode(recording(0.7), "wav")
    reference = await speech.encode(recording(0.9), "wav", "right")
    modes: list[dict[str, Any]] = [
        {},
        {"voice": voice},
        {"prompt_latents": latents, "prompt_text": "Well, "},
    ]
    if speech.info.supports_reference:
        modes += [
            {"ref_audio_latents": reference},
            {"voice": voice, "ref_audio_latents": reference},
        ]
    names = itertools.cycle([None, *adapters])
    return [
        Request(index, modes[index % len(modes)] | {"lora_name": next(names)})
        for index in range(num_streams)
    ]


async def run(
    model: Path, adapters: list[Path], num_streams: int
) -> list[tuple[Samples, SpeechOutput, Samples, Any]]:
    """Speak all of it together, with half as many interrupted on the way, and then one by one."""
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_queued_reqs": 2 * num_streams,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "block_size": 4,
        "num_kv_blocks": 48,  # so few that of many sequences some are preempted
        "enable_lora": True,
        "max_loras": 2,
        "cpu_threads": 1,
    }
    async with AsyncSpeech(str(model), **options) as speech:
        names = [path.name for path in adapters]
        for path in adapters:
            await speech.register_lora(path.name, str(path))
        asked = await requests(speech, names, num_streams)
        longer = [Request(index, request.options) for index, request in enumerate(asked)]
        together, _ = await asyncio.gather(
            asyncio.gather(*(request.say(speech) for request in asked)),
            asyncio.gather(*(interrupt(speech, request) for request in longer[::2])),
        )
        assert await settled(speech)
        worker = speech.stats().workers[0]
        assert worker.num_restarts == 0
        assert worker.engine.num_preemptions > 0 or num_streams < NUM_STREAMS
        alone = [await request.say(speech) for request in asked]
        assert await settled(speech)
        for name in names:
            await asyncio.wait_for(speech.unregister_lora(name), 5)
        assert speech.list_loras() == []
    return [(*a, *b) for a, b in zip(together, alone, strict=True)]


async def interrupt(speech: AsyncSpeech, request: Request) -> None:
    """Begin to listen, and leave."""
    params = replace(request.params, max_generate_length=60, min_len=60)
    stream = await speech.generate(request.text, params, **request.options)
    async for _ in stream:
        if stream.output.num_patches >= 1 + (params.seed or 0) % 5:
            break
    await stream.aclose()
    assert stream.output.finish_reason in ("abort", "length")


@pytest.mark.parametrize(
    ("kind", "num_streams"),
    [
        ("v2", 6),
        pytest.param("v1", NUM_STREAMS, marks=pytest.mark.slow),
        pytest.param("v2", NUM_STREAMS, marks=pytest.mark.slow),
    ],
)
def test_streams_of_all_kinds_are_what_they_are_alone_and_leave_nothing_behind(
    kind: str, num_streams: int, speech_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = speech_checkpoint(kind, stop_bias=-1.0)
    shape = VoxCPMConfig.from_directory(model)
    adapters = [
        write_adapter(model, tmp_path / f"lora-{i}", seed=i, r=2 + 2 * i) for i in (1, 2, 3)
    ]
    for audio, output, alone, output_alone in asyncio.run(run(model, adapters, num_streams)):
        assert output.num_patches == output_alone.num_patches > 0
        assert len(audio) == output.num_patches * shape.samples_per_patch
        patches, expected = latents_of(output), latents_of(output_alone)
        error = np.abs(patches - expected).max(axis=1) / np.abs(expected).max()
        # A difference can only begin where a value lies on a boundary of FSQ.
        assert error.max() < CLOSE, f"patch {error.argmax()} of {output}: {error.max():.1e}"
        assert np.abs(audio - alone).max() < CLOSE


def latents_of(output: SpeechOutput) -> Samples:
    """A patch a row."""
    latents = output.latents or []
    return np.frombuffer(b"".join(latents), np.float32).reshape(len(latents), -1)
