"""A stand-in for `AsyncSpeech` that hums a tone, a patch at a time."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nanovllm.async_speech import Speech, SpeechInfo
from nanovllm.audio.files import Side, pad, read_audio
from nanovllm.audio.voices import VoiceStore
from nanovllm.cluster.stats import PoolStats, WorkerStats
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import EngineStats
from nanovllm.errors import EngineDeadError, InvalidRequestError, OverloadedError
from nanovllm.long_speech import LongSpeech, Sentences
from nanovllm.outputs import RequestMetrics, SpeechOutput
from nanovllm.single_adapter import SingleAdapter
from nanovllm.speech_params import SpeechParams

INFO = SpeechInfo(
    sample_rate=16000,
    encoder_sample_rate=16000,
    feat_dim=4,
    patch_size=2,
    samples_per_patch=1280,
    supports_reference=False,
    model_path="/models/voxcpm",
)
V2 = replace(INFO, sample_rate=48000, samples_per_patch=7680, patch_size=4, supports_reference=True)
PATCH_LATENTS = np.arange(8, dtype="<f4").tobytes()
"""Of a patch of `INFO`."""


class FakeSpeech:
    """Speech of a fixed length with the checks that are the model's own.

    Args:
        num_patches: What every request says before it ends.
        info: What the model is.
        enable_lora: Whether adapters can be registered.

    Attributes:
        delay: Seconds a patch takes.
        fail_after: Patches after which a request fails with `failure`; None is never.
        num_made: Patches made so far, of all requests.
        num_open: Requests that have not ended.
        asked: Text, parameters and options of each request.
        encoded: Size, format and side of each recording.
    """

    def __init__(
        self, num_patches: int = 5, info: SpeechInfo = INFO, enable_lora: bool = False
    ) -> None:
        self.config = EngineConfig(model="/models/voxcpm", enable_lora=enable_lora)
        self.model_id = "voxcpm"
        self.max_model_len = 512
        self.is_ready = True
        self.info = info
        self.num_patches = num_patches
        self.delay = 0.0
        self.fail_after: int | None = None
        self.failure: Exception = EngineDeadError("the engine died: try again")
        self.overloaded = False
        self.num_made = 0
        self.num_open = 0
        self.asked: list[tuple[str, SpeechParams, dict[str, Any]]] = []
        self.encoded: list[tuple[int, str | None, Side]] = []
        self.loras: dict[str, str] = {}
        self.single_lora = SingleAdapter(self)
        self.voices = VoiceStore(self.encode)
        self._streams: dict[str, FakeSpeechStream] = {}

    async def generate(
        self, text: str, params: SpeechParams | None = None, **options: Any
    ) -> "FakeSpeechStream":
        if self.overloaded:
            raise OverloadedError("the queue is full: try again")
        if not text.strip():
            raise InvalidRequestError("target text must be a non-empty string", "text")
        if (voice := options.get("voice")) is not None:
            self.voices.text_of(voice)
        if (name := options.get("lora_name")) is None:
            options["lora_name"] = self.single_lora.name
        elif name not in self.loras:
            raise InvalidRequestError(f"LoRA '{name}' is not registered", "lora_name")
        self.asked.append((text, params or SpeechParams(), options))
        request_id = options.get("request_id") or f"request-{len(self.asked)}"
        output = SpeechOutput(
            request_id,
            text,
            self.info.sample_rate,
            num_prompt_tokens=7,
            metrics=RequestMetrics(time.monotonic()),
            latents=[] if options.get("keep_latents") else None,
        )
        self.num_open += 1
        self._streams[request_id] = stream = FakeSpeechStream(self, output)
        return stream

    async def generate_long(
        self, text: str, params: SpeechParams | None = None, **options: Any
    ) -> LongSpeech:
        if (voice := options.pop("voice", None)) is not None:
            options |= (await self.voices.resolve(voice))._asdict()
        params, generate = params or SpeechParams(), cast(Any, self.generate)
        speech = LongSpeech(
            Sentences(text, params, options, self.info.supports_reference), generate
        )
        await speech.start()
        return speech

    async def speak(self, text: str, params: SpeechParams | None = None, **options: Any) -> Speech:
        stream = await self.generate(text, params, **options)
        return Speech(np.concatenate([chunk async for chunk in stream]), stream.output)

    async def encode(
        self, audio: bytes, wav_format: str | None = None, side: Side = "left"
    ) -> bytes:
        samples = read_audio(audio, wav_format, self.info.encoder_sample_rate)
        self.encoded.append((len(audio), wav_format, side))
        per_patch = self.info.samples_per_patch
        num_patches = len(pad(samples, per_patch, side)) // per_patch
        return bytes(4 * num_patches * self.info.patch_size * self.info.feat_dim)

    async def add_prompt(self, wav: bytes, wav_format: str | None, prompt_text: str) -> str:
        if not prompt_text.strip() and not self.info.supports_reference:
            raise InvalidRequestError("wav prompt requires non-empty prompt_text", "prompt_text")
        return await self.voices.add_prompt(wav, wav_format, prompt_text)

    def remove_prompt(self, prompt_id: str) -> None:
        self.voices.remove_prompt(prompt_id)

    async def register_lora(self, name: str, path: str) -> list[str]:
        try:
            is_there = Path(path).is_dir()
        except OSError:
            is_there = False
        if not is_there:
            raise InvalidRequestError(f"LoRA directory not found: {path}", "path")
        if name in self.loras:
            raise InvalidRequestError(f"LoRA '{name}' is already registered", "name")
        self.loras[name] = path
        return ["base_lm.layers.0.self_attn.q_proj.lora_A"]

    async def unregister_lora(self, name: str) -> None:
        if name not in self.loras:
            raise InvalidRequestError(f"LoRA '{name}' is not registered", "lora_name")
        del self.loras[name]

    def list_loras(self) -> list[str]:
        return list(self.loras)

    async def abort(self, request_id: str) -> bool:
        stream = self._streams.get(request_id)
        if stream is None or stream.output.finished:
            return False
        stream.end("abort")
        return True

    async def drain(self, timeout: float | None = None) -> bool:
        return True

    async def close(self, force: bool = False) -> None:
        pass

    def stats(self) -> PoolStats:
        engine = EngineStats(num_running=self.num_open, num_kv_blocks=8)
        worker = WorkerStats(0, "ready", 1, 0, self.num_open, self.num_open, 0, engine)
        return PoolStats("cache_aware", [worker], self.num_open, self.num_open, 0.0, 0.0)


class FakeSpeechStream:
    """Makes a patch whenever it is asked for one."""

    def __init__(self, speech: FakeSpeech, output: SpeechOutput) -> None:
        self.output = output
        self._speech = speech

    def __aiter__(self) -> "FakeSpeechStream":
        return self

    async def __anext__(self) -> NDArray[np.float32]:
        speech, output = self._speech, self.output
        if output.finished:
            raise StopAsyncIteration
        await asyncio.sleep(speech.delay)
        if output.num_patches == speech.fail_after:
            self.end("error")
            raise speech.failure
        if output.finished or output.num_patches == speech.num_patches:
            self.end("stop")
            raise StopAsyncIteration
        times = np.arange(speech.info.samples_per_patch) + output.num_samples
        output.num_patches += 1
        output.num_samples += len(times)
        speech.num_made += 1
        if output.latents is not None:
            output.latents.append(PATCH_LATENTS)
        return (0.5 * np.sin(2 * np.pi * 440 * times / output.sample_rate)).astype(np.float32)

    def abort(self) -> bool:
        goes_on = not self.output.finished
        self.end("abort")
        return goes_on

    def end(self, reason: str) -> None:
        if not self.output.finished:
            self.output.finish_reason = reason
            self._speech.num_open -= 1

    async def aclose(self) -> None:
        self.end("abort")
