"""`AsyncSpeech`: a speech model in worker processes, for one event loop."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from nanovllm.adapted_engine import AdaptedEngine
from nanovllm.adapter_registry import AdapterLease
from nanovllm.async_engine import Observer, in_thread_if
from nanovllm.audio.encoded_recordings import EncodedRecordings
from nanovllm.audio.files import Samples, Side, pad, read_audio
from nanovllm.audio.frontend import SpeechFrontend, SpeechInput, check_types
from nanovllm.audio.voices import VoicePrompt, VoiceStore
from nanovllm.cluster.admission import Admission
from nanovllm.cluster.worker import Worker
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.long_speech import LongSpeech, Sentences
from nanovllm.models.hub import resolve_model
from nanovllm.models.voxcpm.config import is_speech
from nanovllm.outputs import RequestMetrics, SpeechOutput
from nanovllm.sampling_params import MAX_SEED
from nanovllm.single_adapter import SingleAdapter
from nanovllm.speech_params import SpeechParams
from nanovllm.speech_stream import Backlog, SpeechOutputs, SpeechStream
from nanovllm.validation import check_type, conformed
from nanovllm.worker.messages import EncodeAudio, Started

LONG_TEXT = 4096
"""Characters from which tokenising goes to a thread."""
LARGE_LATENTS = 128 << 10
"""Bytes from which hashing patches, 5 ms each MB, goes to a thread."""


@dataclass(frozen=True, slots=True)
class SpeechInfo:
    """What a speech model takes and gives.

    Args:
        sample_rate: Of the speech it makes, in Hz.
        encoder_sample_rate: Of the recordings it reads, in Hz; `encode` resamples.
        feat_dim: Values of a latent frame.
        patch_size: Frames of a patch.
        samples_per_patch: Samples that a patch is decoded to.
        supports_reference: Whether a voice may be given apart from a text that it speaks.
        model_path: Directory of the checkpoint.
    """

    sample_rate: int
    encoder_sample_rate: int
    feat_dim: int
    patch_size: int
    samples_per_patch: int
    supports_reference: bool
    model_path: str


class Speech(NamedTuple):
    """Speech from beginning to end: float32 mono samples, and the request as it ended."""

    audio: Samples
    output: SpeechOutput


class AsyncSpeech(AdaptedEngine[SpeechOutput]):
    """A speech model in one or more engine processes.

    It starts with the first use, `await start()` or `async with`, and ends with `await close()`.

    Args:
        model: Directory of a checkpoint or id of a hub repository.
        **options: Fields of `EngineConfig` and `PoolConfig`, by their names or aliases.

    Attributes:
        voices: Recordings that requests may name.
        single_lora: The adapter of requests that name none.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)

    def _init(
        self,
        engine: EngineConfig,
        pool: PoolConfig,
        observer: Observer[SpeechOutput] | None,
    ) -> None:
        super()._init(engine, pool, observer)
        self.voices = VoiceStore(self.encode)
        self._recordings = EncodedRecordings(
            self._encode, num_at_once=2 * len(pool.device_groups(1))
        )
        self.single_lora = SingleAdapter(self)
        self._frontend: SpeechFrontend | None = None
        self._info: SpeechInfo | None = None
        self._open = SpeechOutputs()

    def _load(self) -> Path:
        directory = resolve_model(self.config)
        if not is_speech(directory):
            raise UnsupportedModelError(
                f"{self.model_id} is no speech model: its config.json names no architecture of "
                "VoxCPM",
                "model",
            )
        self._frontend = frontend = SpeechFrontend(directory, self.config)
        config = frontend.model_config
        self._info = SpeechInfo(
            config.vae.out_sample_rate,
            config.vae.sample_rate,
            config.feat_dim,
            config.patch_size,
            config.samples_per_patch,
            config.supports_reference,
            str(directory),
        )
        return directory

    def _make_outputs(self, started: Started) -> SpeechOutputs:  # noqa: ARG002
        return self._open

    async def _warm_up(self, worker: Worker) -> None:
        """There is nothing that all requests begin with."""

    @property
    def info(self) -> SpeechInfo:
        """What the model takes and gives.

        Raises:
            RuntimeError: It has not been loaded yet.
        """
        if self._info is None:
            raise RuntimeError("the model is not loaded: await start() first")
        return self._info

    async def generate(
        self,
        text: str,
        params: SpeechParams | None = None,
        *,
        voice: str | None = None,
        prompt_latents: bytes | None = None,
        prompt_text: str = "",
        ref_audio_latents: bytes | None = None,
        lora_name: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
        keep_latents: bool = False,
        admission: Admission | None = None,
    ) -> SpeechStream:
        """Speak a text; returns once the request is queued, and its speech comes by the stream.

        Closing or dropping the stream aborts the request. One whose speech nobody reads is held
        back after a while, and ended in the end.

        Args:
            text: What to say.
            params: How.
            voice: Id or name of a voice in `voices`, in place of `prompt_latents`.
            prompt_latents: A recording that the speech continues, as `encode` returns it.
            prompt_text: What is said in it.
            ref_audio_latents: A recording whose voice is taken, whatever it says; VoxCPM2 only.
            lora_name: A registered adapter; None is `single_lora`, if there is one.
            request_id: A name for `abort`, not that of another open request; None makes one.
            priority: Lower runs first.
            keep_latents: Whether the output keeps the latents of what was generated.
            admission: What it is a part of, so that it gets in if the part before it did; then
                None is no adapter.

        Raises:
            InvalidRequestError: An argument cannot be used; the message says why.
            UnavailableError: The queue is full, or no engine runs; try again later.
        """
        arrival_time = time.monotonic()
        prompt = VoicePrompt(prompt_latents, prompt_text, ref_audio_latents)
        check_types(text, params, prompt)
        await self.start()
        if voice is not None:
            prompt = await self.voices.resolve(voice, prompt)
        params = params or SpeechParams()
        num_bytes = len(prompt.prompt_latents or b"") + len(prompt.ref_audio_latents or b"")
        item = await in_thread_if(
            len(text) >= LONG_TEXT or num_bytes >= LARGE_LATENTS,
            lambda: self._require_frontend().process(
                text, params, self.max_model_len, **prompt._asdict()
            ),
        )
        output = SpeechOutput(
            self._new_id() if request_id is None else request_id,
            text,
            self.info.sample_rate,
            len(item.keys),
            RequestMetrics(arrival_time),
            item.num_target_tokens,
            latents=[] if keep_latents else None,
        )
        if lora_name is None and admission is None:
            lora_name = self.single_lora.name
        return self._submit(output, item, lora_name, priority, admission)

    def _submit(
        self,
        output: SpeechOutput,
        item: SpeechInput,
        lora_name: str | None,
        priority: int,
        admission: Admission | None,
    ) -> SpeechStream:
        """Queue a request that has been checked."""
        name = output.request_id
        self._admit([name], 1, len(item.keys), admission)
        held = admission is not None
        with self._leased([name], lora_name, held) as adapter_id:
            request = self._pack(
                item.keys, item.params, item.payload, priority, adapter_id=adapter_id
            )
        self._open.add(request.message.first_seq_id, output)
        stream = SpeechStream(output, self._abort, self._backlog)
        self._watch(stream, request.message.params)
        self._parts.pool.submit(request)
        return stream

    async def generate_long(
        self, text: str, params: SpeechParams | None = None, **options: Any
    ) -> LongSpeech:
        """Speak a long text sentence by sentence, in one voice; see `LongSpeech`.

        It keeps its voice and its adapter, even if they are removed meanwhile.

        Args:
            text: What to say.
            params: How; each sentence has its own cap.
            **options: See `generate`.

        Raises:
            InvalidRequestError: An argument cannot be used; the message says why.
            UnavailableError: The queue is full, or no engine runs; try again later.
        """
        check_types(text, params)
        options, lease = await self._hold(options)
        has_design = self.info.supports_reference
        sentences = await in_thread_if(
            len(text) >= LONG_TEXT,
            lambda: Sentences(text, params or SpeechParams(), options, has_design),
        )
        admission = self._parts.pool.admission()

        def last_begun() -> None:
            admission.close()
            lease.close()

        speech = LongSpeech(sentences, partial(self.generate, admission=admission), last_begun)
        await speech.start()
        return speech

    async def _hold(self, options: dict[str, Any]) -> tuple[dict[str, Any], AdapterLease]:
        """Take hold of the voice and the adapter of requests that follow one another.

        Returns:
            Their options with both, and the lease, to be closed once the last one is queued.
        """
        await self.start()
        if (voice := options.get("voice")) is not None:
            given = {name: options[name] for name in VoicePrompt._fields if name in options}
            prompt = await self.voices.resolve(voice, VoicePrompt(**given))
            options = options | prompt._asdict() | {"voice": None}
        if (lora_name := options.get("lora_name")) is None:
            lora_name = self.single_lora.name
        return options | {"lora_name": lora_name}, self._adapters.lease(lora_name)

    async def speak(self, text: str, params: SpeechParams | None = None, **options: Any) -> Speech:
        """Speak a text and return it as a whole; with `retry_badcase`, again if it went astray.

        Args:
            text: What to say.
            params: How.
            **options: See `generate`.

        Raises:
            InvalidRequestError: An argument cannot be used; the message says why.
            UnavailableError: The queue is full, or the engine died; try again later.
            RuntimeError: The engine failed.
        """
        check_types(text, params)
        options, lease = await self._hold(options)
        params = params or SpeechParams()
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        num_attempts = params.retry_badcase_max_times if params.retry_badcase else 1
        closing = contextlib.closing
        with closing(lease), closing(self._parts.pool.admission()) as admission:
            for attempt in range(num_attempts):
                tried = replace(params, seed=(seed + attempt) % MAX_SEED)
                stream = await self.generate(text, tried, **options, admission=admission)
                audio = await stream.read()
                output = stream.output
                is_bad = params.is_bad_case(output.num_patches, output.num_target_tokens)
                if not is_bad or output.finish_reason == "abort":
                    break
        return Speech(audio, output)

    async def encode(
        self, audio: bytes, wav_format: str | None = None, side: Side = "left"
    ) -> bytes:
        """Encode a recording for `generate`; those used last are remembered.

        Args:
            audio: A file, such as WAV, FLAC, MP3 or Ogg.
            wav_format: What it is said to be.
            side: Where silence is added to fill the last patch: "left" of what speech continues,
                "right" of a reference.

        Returns:
            Latents, float32 `[num_patches, patch_size, feat_dim]`.

        Raises:
            InvalidRequestError: It cannot be decoded, or is too long or too short.
            UnavailableError: Too many recordings wait, no engine runs, or it died; try again later.
        """
        check_type("audio", audio, bytes, "the bytes of a file, as Path.read_bytes() has them")
        wav_format = conformed("wav_format", wav_format, str | None)
        if side not in get_args(Side):
            raise InvalidRequestError(f"side must be 'left' or 'right', got {side!r:.80}", "side")
        await self.start()
        return await self._recordings(audio, wav_format, side)

    async def _encode(self, audio: bytes, wav_format: str | None, side: Side) -> bytes:
        pool = self._parts.pool
        pool.check_ready()
        reading = asyncio.ensure_future(asyncio.to_thread(self._read, audio, wav_format, side))
        try:
            samples = await asyncio.shield(reading)
        except asyncio.CancelledError:
            # A thread cannot be stopped: it counts among those at work until it has ended.
            await asyncio.gather(reading, return_exceptions=True)
            raise
        return await pool.call_any(lambda call_id: EncodeAudio(call_id, samples))

    def _read(self, audio: bytes, wav_format: str | None, side: Side) -> bytes:
        samples = read_audio(audio, wav_format, self.info.encoder_sample_rate)
        return pad(samples, self._require_frontend().samples_per_patch, side).tobytes()

    async def add_prompt(self, wav: bytes, wav_format: str | None, prompt_text: str) -> str:
        """Keep a recording for `generate(voice=)`; returns its id.

        Args:
            wav: A file; see `encode`.
            wav_format: What it is said to be.
            prompt_text: What is said in it; without that it is a reference, for VoxCPM2 only.

        Raises:
            InvalidRequestError: It cannot be decoded, or has no text and the model needs one.
            OverloadedError: There are too many; remove one first.
            UnavailableError: No engine runs; try again later.
        """
        check_type("prompt_text", prompt_text, str, "a string")
        await self.start()
        if not prompt_text.strip() and not self.info.supports_reference:
            raise InvalidRequestError("wav prompt requires non-empty prompt_text", "prompt_text")
        return await self.voices.add_prompt(wav, wav_format, prompt_text)

    def remove_prompt(self, prompt_id: str) -> None:
        """Forget a recording.

        Raises:
            InvalidRequestError: There is none of this id.
        """
        self.voices.remove_prompt(prompt_id)

    @property
    def _backlog(self) -> Backlog:
        config, info = self.pool_config, self.info
        patches_a_second = info.sample_rate / info.samples_per_patch
        most = max(int(config.max_unread_seconds * patches_a_second), 1)
        return Backlog(most, config.unread_timeout, self._pause)

    def _pause(self, output: SpeechOutput, paused: bool) -> None:
        seq_id = self._open.seq_id(output.request_id)
        if seq_id is not None and not self._closed:
            self._parts.pool.pause([seq_id], paused)

    def _require_frontend(self) -> SpeechFrontend:
        if self._frontend is None:
            raise RuntimeError("the model is not loaded: await start() first")
        return self._frontend
