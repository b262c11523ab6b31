"""`AsyncVoxCPMServerPool`: speech with the interface of nanovllm-voxcpm, for an event loop."""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Callable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from nanovllm.async_speech import AsyncSpeech
from nanovllm.audio.files import Samples
from nanovllm.config import ALIASES, EngineConfig, PoolConfig, split_options
from nanovllm.errors import InvalidRequestError
from nanovllm.long_speech import LongSpeech
from nanovllm.lora_config import LoRAConfig
from nanovllm.models.hub import resolve_model
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.speech_params import SpeechParams
from nanovllm.speech_stream import SpeechStream
from nanovllm.validation import check_type

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

MAX_MODEL_LEN = 4096
GPU_DEFAULTS = {"max_num_batched_tokens": 16384, "max_num_seqs": 512}
"""Meant for a GPU: where there is none, who leaves them alone gets the engine's own."""


def with_arguments_of(
    model: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, P], Result]]:
    """Give a method that passes its arguments on the signature of the one that takes them."""

    def decorate(method: Callable[..., Result]) -> Callable[Concatenate[Any, P], Result]:
        returned = inspect.signature(method).return_annotation
        signature = inspect.signature(model).replace(return_annotation=returned)
        method.__signature__ = signature  # type: ignore[attr-defined]
        return method

    return decorate


class AsyncVoxCPMServerPool:
    """A speech model in worker processes, for one event loop.

    Args:
        model_path: Directory of a checkpoint, or id of a hub repository.
        inference_timesteps: See `VoxCPM.from_pretrained`, also for the others.
        devices: CUDA devices; None is the first.
        lora_config: Room for LoRA adapters.
        **options: The other arguments of `VoxCPM.from_pretrained`.

    Raises:
        ValueError: An option or the checkpoint cannot be used; the message says why.
        FileNotFoundError: There is no such model.
    """

    def __init__(
        self,
        model_path: str,
        inference_timesteps: int = 10,
        *,
        devices: list[int] | None = None,
        lora_config: LoRAConfig | None = None,
        **options: Any,
    ) -> None:
        model_path = _model_name(model_path)
        known = {*EngineConfig.names(), *PoolConfig.names(), *ALIASES}
        if unknown := sorted(options.keys() - known):
            raise ValueError(f"Unknown kwargs: {', '.join(unknown)}")
        SpeechParams(inference_timesteps=inference_timesteps)
        self._inference_timesteps = inference_timesteps
        options = {ALIASES.get(name, name): value for name, value in options.items()}
        defaults = {"max_model_len": MAX_MODEL_LEN} | GPU_DEFAULTS
        self._options = defaults | options | {"model": model_path}
        if lora_config is not None:
            check_type(
                "lora_config",
                lora_config,
                LoRAConfig,
                "a LoRAConfig, such as LoRAConfig(max_loras=4)",
            )
            self._options |= lora_config.engine_options()
        self._devices = list(devices) if devices else [0]
        split_options(self._options | {"devices": self._devices}, EngineConfig, PoolConfig)
        _check_model(model_path)
        self._speech: AsyncSpeech | None = None
        self._starting: asyncio.Future[None] | None = None
        self._stopped = False

    async def wait_for_ready(self) -> None:
        """Start the processes, and wait until they have loaded the model.

        Raises:
            ValueError: The checkpoint cannot be used; the message says why.
            FileNotFoundError: There is no such model, or a file of it is missing.
            RuntimeError: A process died, or the model does not fit the memory.
        """
        if self._stopped:
            raise RuntimeError("this pool has been stopped")
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        options = await asyncio.to_thread(_placed, self._options, self._devices)
        self._speech = AsyncSpeech(**options)
        await self._speech.start()

    async def _ready(self) -> AsyncSpeech:
        await self.wait_for_ready()
        if self._speech is None:
            raise RuntimeError("the model is not loaded")
        return self._speech

    async def stop(self) -> None:
        """End the processes and every open request; the pool cannot be used afterwards."""
        self._stopped = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._speech is not None:
            await self._speech.close()

    async def __aenter__(self) -> "AsyncVoxCPMServerPool":
        await self.wait_for_ready()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def get_model_info(self) -> dict[str, Any]:
        """What the model takes and gives: `sample_rate`, `channels`, `feat_dim` and so on."""
        info = (await self._ready()).info
        described = {
            "sample_rate": info.sample_rate,
            "encoder_sample_rate": info.encoder_sample_rate,
            "channels": 1,
            "feat_dim": info.feat_dim,
            "patch_size": info.patch_size,
            "model_path": info.model_path,
        }
        return described | (
            {"output_sample_rate": info.sample_rate} if info.supports_reference else {}
        )

    async def encode_latents(self, wav: bytes, wav_format: str | None = None) -> bytes:
        """Encode a recording: latents, float32 `[frames, feat_dim]`, as `generate` takes them.

        Raises:
            ValueError: It cannot be decoded, or is too long or too short.
        """
        return await (await self._ready()).encode(wav, wav_format)

    async def add_prompt(self, wav: bytes, wav_format: str | None, prompt_text: str) -> str:
        """Keep a recording and what is said in it; returns its id."""
        return await (await self._ready()).add_prompt(wav, wav_format, prompt_text)

    async def remove_prompt(self, prompt_id: str) -> None:
        """Forget a recording.

        Raises:
            ValueError: There is none of this id.
        """
        (await self._ready()).remove_prompt(prompt_id)

    async def register_lora(self, name: str, path: str) -> dict[str, str]:
        """Load a LoRA adapter from a directory into all processes.

        Raises:
            ValueError: The name is taken, or the directory holds no adapter that fits.
        """
        await (await self._ready()).register_lora(name, path)
        return {"name": name}

    async def unregister_lora(self, name: str) -> dict[str, str]:
        """Forget an adapter, once the last request that uses it has ended.

        Raises:
            ValueError: There is none of this name.
        """
        await (await self._ready()).unregister_lora(name)
        return {"name": name}

    async def list_loras(self) -> list[dict[str, str]]:
        """The adapters that requests may name."""
        return [{"name": name} for name in (await self._ready()).list_loras()]

    async def load_lora(self, path: str) -> dict[str, Any]:
        """Load the adapter of all requests that name none, in place of the one before.

        Raises:
            ValueError: The directory holds no adapter that fits.
        """
        keys = await (await self._ready()).single_lora.load(path)
        return {"status": "ok", "loaded_keys": keys, "skipped_keys": []}

    async def set_lora_enabled(self, enabled: bool) -> dict[str, Any]:
        """Use the adapter of `load_lora`, or leave it be.

        Raises:
            ValueError: There is none.
        """
        (await self._ready()).single_lora.enable(enabled)
        return {"status": "ok", "lora_enabled": enabled}

    async def reset_lora(self) -> dict[str, Any]:
        """Forget the adapter of `load_lora`."""
        await (await self._ready()).single_lora.reset()
        return {"status": "ok"}

    async def open_stream(
        self,
        target_text: str,
        prompt_latents: bytes | None = None,
        prompt_text: str = "",
        prompt_id: str | None = None,
        max_generate_length: int = 2000,
        temperature: float = 1.0,
        cfg_value: float = 2.0,
        ref_audio_latents: bytes | None = None,
        lora_name: str | None = None,
        seed: int | None = None,
        *,
        inference_timesteps: int | None = None,
        min_len: int = 2,
        split_sentences: bool = False,
    ) -> SpeechStream | LongSpeech:
        """Queue a request; returns where its speech comes out.

        Args:
            target_text: What to say.
            prompt_latents: A recording that the speech continues, as `encode_latents` returns it.
            prompt_text: What is said in it.
            prompt_id: A recording of `add_prompt` instead.
            max_generate_length: Patches at most.
            temperature: Factor on the sampler's noise.
            cfg_value: Weight of classifier-free guidance.
            ref_audio_latents: A recording whose voice is taken; VoxCPM2 only.
            lora_name: An adapter of `register_lora`.
            seed: Makes the speech reproducible.
            inference_timesteps: Steps of the sampler; None is the pool's.
            min_len: The speech has two patches more than this at least.
            split_sentences: Whether a long text is spoken sentence by sentence.

        Raises:
            ValueError: An argument cannot be used; the message says why.
            RuntimeError: The queue is full, or the process died.
        """
        speech = await self._ready()
        timesteps = inference_timesteps
        params = SpeechParams(
            cfg_value=cfg_value,
            inference_timesteps=self._inference_timesteps if timesteps is None else timesteps,
            temperature=temperature,
            seed=seed,
            min_len=min_len,
            max_generate_length=max_generate_length,
        )
        speak = speech.generate_long if split_sentences else speech.generate
        return await speak(
            target_text,
            params,
            voice=prompt_id,
            prompt_latents=prompt_latents,
            prompt_text=prompt_text,
            ref_audio_latents=ref_audio_latents,
            lora_name=lora_name,
        )

    @with_arguments_of(open_stream)
    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Samples, None]:
        """Speak a text; yields float32 mono samples, a patch at a time.

        Closing the generator ends the request. See `open_stream` for the arguments and what is
        raised.
        """
        stream = await self.open_stream(*args, **kwargs)
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()


def _model_name(model: object) -> str:
    """What a model is called, wherever it lies.

    Raises:
        InvalidRequestError: It is called nothing.
    """
    name = fspath(model) if isinstance(model, PathLike) else model
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(
            "model must be the directory of a checkpoint or the id of a hub repository, such as "
            f"'openbmb/VoxCPM2', got {model!r:.80}",
            "model",
        )
    return name


def _check_model(model: str) -> None:
    """Find out what is wrong with a checkpoint, as far as its files on this machine tell.

    Raises:
        ValueError: It does not exist, or is none that we read.
        FileNotFoundError: It lacks its `config.json`, or is a path that does not exist.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        VoxCPMConfig.from_directory(path)
    elif "~" in model:
        raise ValueError(f"the model path {model} does not exist (that is {path})")
    elif path.exists() or model.startswith(("/", "./", "../")):
        resolve_model(EngineConfig(model=model))  # says what is wrong with it


def _placed(options: dict[str, Any], devices: list[int]) -> dict[str, Any]:
    """The options on this machine: on a GPU as they are, else without what is meant for one."""
    from nanovllm.runners.memory import select_device

    engine, _ = split_options(options, EngineConfig, PoolConfig)
    longest = VoxCPMConfig.from_directory(resolve_model(engine)).max_model_len
    options = options | {"max_model_len": min(engine.max_model_len or longest, longest)}
    device = select_device(engine.device).type
    if device == "cuda":
        return options | {"devices": devices}
    if engine.device == "auto":
        # A warning, so that it is seen where nobody has set logging up.
        logger.warning("devices=%s: there is no CUDA device here; it runs on %s", devices, device)
    for name, default in GPU_DEFAULTS.items():
        if options[name] == default:
            options[name] = None
    return options | {"replicas": len(devices)}
