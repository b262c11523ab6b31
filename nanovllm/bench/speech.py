"""The benchmark of speech: latencies and real-time factors of an engine in a process of its own.

Two definitions of the real-time factor are in use, and they differ where the first chunk is late:
`rtf` is all of a request's time over the duration of its sound, as the model's authors publish it;
`rtf_after_first` leaves out the time to the first chunk, as nanovllm-voxcpm's benchmark does.
"""

import io
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from nanovllm.bench.load import run_load
from nanovllm.bench.machine import Machine, inspect_machine
from nanovllm.bench.serve_config import Load
from nanovllm.bench.speech_config import SpeechBenchConfig
from nanovllm.bench.speech_shapes import write_release
from nanovllm.bench.stats import Distribution
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.speech_params import SpeechParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nanovllm.async_speech import AsyncSpeech

TEXT = "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. "
"""What is spoken; each request gets enough of it for its sound, behind a number of its own."""
PATCHES_PER_TOKEN = 6
"""The reference caps the sound of a text at this and ten patches more."""


@dataclass(slots=True)
class SpeechRecord:
    """One request. Times are seconds of `time.perf_counter`.

    Args:
        intended: When it was to be sent.
        chunks: When each chunk came, and its samples.
        ended: When the last one had come.
        error: What went wrong; None if all is well.
    """

    intended: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None

    @property
    def num_samples(self) -> int:
        return sum(num for _, num in self.chunks)

    @property
    def ttfb(self) -> float:
        """Time to the first sound."""
        return self.chunks[0][0] - self.intended

    @property
    def e2e(self) -> float:
        return self.ended - self.intended

    @property
    def gaps(self) -> list[float]:
        return [b - a for (a, _), (b, _) in pairwise(self.chunks)]


@dataclass(frozen=True, slots=True)
class SpeechResult:
    """Figures of one load. Times are in seconds, of completed requests.

    Args:
        load: What was offered.
        num_requests: Requests sent.
        num_completed: Of these, spoken to the end.
        first_error: What went wrong with one of the others.
        duration: From the first request to the last sound.
        audio_seconds: Duration of all the sound.
        ttfb: Time to the first chunk.
        gap: Time between successive chunks.
        rtf: Time of a request over the duration of its sound.
        rtf_after_first: The same without the time to the first chunk.
    """

    load: Load
    num_requests: int
    num_completed: int
    first_error: str | None
    duration: float
    audio_seconds: float
    ttfb: Distribution | None
    gap: Distribution | None
    rtf: Distribution | None
    rtf_after_first: Distribution | None

    @property
    def audio_rate(self) -> float:
        """Seconds of sound per second."""
        return self.audio_seconds / self.duration


@dataclass(frozen=True, slots=True)
class SpeechBenchResult:
    """Figures of each load, and what was measured with what."""

    loads: list[SpeechResult]
    settings: dict[str, Any]
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        loads = [asdict(load) | {"audio_rate": load.audio_rate} for load in self.loads]
        return {"loads": loads, "settings": self.settings, "machine": asdict(self.machine)}


async def run_speech(
    config: SpeechBenchConfig,
    engine: EngineConfig,
    pool: PoolConfig | None = None,
    on_done: Callable[[int], None] = lambda _: None,
) -> SpeechBenchResult:
    """Start an engine, warm it up and put every load on it in turn.

    Args:
        config: What to do.
        engine: With which engine.
        pool: With how many of them.
        on_done: Called after each request with how many have ended.

    Raises:
        InvalidRequestError: There is no model, or it cannot speak so much.
    """
    if engine.model is None and config.release is None:
        raise InvalidRequestError(
            "no model: give --model, or --release with --dummy-weights", "model"
        )
    num_done = itertools.count(1)
    async with _engine(config, engine, pool) as speech:
        bench = _Bench(config, speech)
        await bench.warm_up()
        loads = []
        for load in config.loads():
            numbers = range(config.num_requests_of(load))
            records, _ = await run_load(
                bench.ask,
                numbers,
                load,
                seed=config.seed,
                on_done=lambda: on_done(next(num_done)),
            )
            loads.append(summarize(records, load, speech.info.sample_rate))
        settings = asdict(config) | {
            "model": speech.model_id,
            "patches": bench.num_patches,
            **{
                name: getattr(speech.config, name)
                for name in ("device", "dtype", "quantization", "max_num_seqs", "cpu_threads")
            },
        }
    return SpeechBenchResult(loads, settings, inspect_machine())


@asynccontextmanager
async def _engine(
    config: SpeechBenchConfig, engine: EngineConfig, pool: PoolConfig | None
) -> "AsyncIterator[AsyncSpeech]":
    """The engine that is measured; it ends with the block."""
    from nanovllm.async_speech import AsyncSpeech

    with tempfile.TemporaryDirectory(prefix="nanovllm-") as directory:
        if config.release is not None:
            if not engine.dummy_weights or engine.model is not None:
                raise InvalidRequestError(
                    "release is a size for random weights: give it with dummy_weights and "
                    "without a model",
                    "release",
                )
            model = write_release(Path(directory, f"voxcpm-{config.release}"), config.release)
            engine = replace(engine, model=str(model))
        async with AsyncSpeech.from_config(engine, pool) as speech:
            yield speech


class _Bench:
    """Makes the requests and records what comes of them."""

    def __init__(self, config: SpeechBenchConfig, speech: "AsyncSpeech") -> None:
        self._speech = speech
        info = speech.info
        samples = config.audio_seconds * info.sample_rate
        self.num_patches = max(2, math.ceil(samples / info.samples_per_patch))
        if self.num_patches >= speech.max_model_len:
            raise InvalidRequestError(
                f"audio_seconds={config.audio_seconds:g} are {self.num_patches} patches, and the "
                f"context has {speech.max_model_len} positions: ask for less, or raise "
                "max_model_len",
                "audio_seconds",
            )
        self._params = SpeechParams(
            cfg_value=config.cfg_value,
            inference_timesteps=config.inference_timesteps,
            min_len=self.num_patches,  # random weights would stop anywhere
            max_generate_length=self.num_patches,
            seed=config.seed,
        )
        self._num_warmups = config.num_warmups
        self._text = TEXT * math.ceil(self.num_patches / PATCHES_PER_TOKEN / len(TEXT.split()))
        self._prompt_seconds = config.prompt_seconds
        self._voice: str | None = None

    async def warm_up(self) -> None:
        """Encode the voice, and speak what does not count.

        Raises:
            InvalidRequestError: It failed.
        """
        if self._prompt_seconds:
            voice = _recording(self._prompt_seconds, self._speech.info.encoder_sample_rate)
            self._voice = await self._speech.add_prompt(voice, "wav", TEXT)
        for number in range(self._num_warmups):
            record = await self.ask(-1 - number, time.perf_counter())
            if record.error is not None:
                raise InvalidRequestError(f"the warm-up failed: {record.error}")

    async def ask(self, number: int, intended: float) -> SpeechRecord:
        """Speak one text and record what comes; it does not raise for what an engine does."""
        record = SpeechRecord(intended)
        params = replace(self._params, seed=(self._params.seed or 0) + number)
        try:
            stream = await self._speech.generate(
                f"{number}. {self._text}", params, voice=self._voice
            )
            async for chunk in stream:
                record.chunks.append((time.perf_counter(), len(chunk)))
        except (ValueError, RuntimeError) as e:
            record.error = str(e)
        record.ended = time.perf_counter()
        if record.error is None and not record.chunks:
            record.error = "no sound"
        return record


def _recording(seconds: float, rate: int) -> bytes:
    """A WAV file of noise, which takes as long to encode as a voice."""
    samples = np.random.default_rng(0).normal(0, 0.1, int(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def summarize(records: list[SpeechRecord], load: Load, sample_rate: int) -> SpeechResult:
    """Work out the figures of a load."""
    done = [record for record in records if record.error is None]
    seconds = [record.num_samples / sample_rate for record in done]
    failed = [record.error for record in records if record.error is not None]
    start = min(record.intended for record in records)
    return SpeechResult(
        load=load,
        num_requests=len(records),
        num_completed=len(done),
        first_error=failed[0] if failed else None,
        duration=max(record.ended for record in records) - start,
        audio_seconds=sum(seconds),
        ttfb=Distribution.of([record.ttfb for record in done]),
        gap=Distribution.of([gap for record in done for gap in record.gaps]),
        rtf=Distribution.of([r.e2e / s for r, s in zip(done, seconds, strict=True)]),
        rtf_after_first=Distribution.of(
            [(r.e2e - r.ttfb) / s for r, s in zip(done, seconds, strict=True)]
        ),
    )
