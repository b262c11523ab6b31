"""`VoxCPM.from_pretrained`: speech as nanovllm-voxcpm offers it, with and without an event loop."""

import asyncio
from collections.abc import Generator
from typing import Any
from weakref import finalize

from nanovllm.async_voxcpm import AsyncVoxCPMServerPool, with_arguments_of
from nanovllm.audio.files import Samples
from nanovllm.long_speech import LongSpeech
from nanovllm.loop_thread import LoopThread
from nanovllm.lora_config import LoRAConfig
from nanovllm.speech_stream import SpeechStream

__all__ = ["AsyncVoxCPMServerPool", "SyncVoxCPMServerPool", "VoxCPM"]


class VoxCPM:
    """Loads a VoxCPM model, which speaks; see `from_pretrained`."""

    @staticmethod
    def from_pretrained(
        model: str,
        inference_timesteps: int = 10,
        max_num_batched_tokens: int = 16384,
        max_num_seqs: int = 512,
        max_model_len: int = 4096,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        devices: list[int] | None = None,
        lora_config: LoRAConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model for speech, in a process of its own on each device.

        Args:
            model: Directory of a checkpoint, or id of a hub repository.
            inference_timesteps: Steps of the sampler for requests that do not say, 2 to 100.
            max_num_batched_tokens: Positions computed in one step.
            max_num_seqs: Requests that run at the same time.
            max_model_len: Longest prompt plus speech, in positions; a model made for less has its
                own.
            gpu_memory_utilization: Share of a GPU's memory that may be used, in (0, 1].
            enforce_eager: Whether to run without captured graphs, or replayed kernels.
            devices: CUDA devices; None is the first. Without a GPU it runs on the CPU.
            lora_config: Room for LoRA adapters.
            **kwargs: More options of `EngineConfig` and `PoolConfig`.

        Returns:
            `AsyncVoxCPMServerPool` if an event loop is running, else `SyncVoxCPMServerPool`, which
            is ready. It depends on the caller, so its type is not said here.

        Raises:
            ValueError: An option or the checkpoint cannot be used; the message says why.
            FileNotFoundError: There is no such model.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pool_class: Any = SyncVoxCPMServerPool
        else:
            pool_class = AsyncVoxCPMServerPool
        return pool_class(
            model,
            inference_timesteps=inference_timesteps,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            devices=devices,
            lora_config=lora_config,
            **kwargs,
        )


class SyncVoxCPMServerPool:
    """A speech model in worker processes, for programs and notebooks without `await`.

    Its methods may be called from any thread. It is ready once it is built, and stopped if it is
    dropped or the program ends.

    Args:
        model_path: Directory of a checkpoint, or id of a hub repository.
        *args: See `AsyncVoxCPMServerPool`.
        **kwargs: See `AsyncVoxCPMServerPool`.

    Raises:
        ValueError: An option or the checkpoint cannot be used; the message says why.
        FileNotFoundError: There is no such model, or a file of it is missing.
        RuntimeError: A process died, or the model does not fit the memory.
    """

    def __init__(self, model_path: str, *args: Any, **kwargs: Any) -> None:
        self._pool = AsyncVoxCPMServerPool(model_path, *args, **kwargs)
        self._loop = LoopThread()
        # At exit, too: the processes end with this one, but not without being asked to.
        self._dropped = finalize(self, _stop, self._loop, self._pool)
        try:
            self._loop.call(self._pool.wait_for_ready())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes and every open request; without effect if that is done."""
        self._dropped.detach()
        _stop(self._loop, self._pool)

    def __enter__(self) -> "SyncVoxCPMServerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def get_model_info(self) -> dict[str, Any]:
        """What the model takes and gives: `sample_rate`, `channels`, `feat_dim` and so on."""
        return self._loop.call(self._pool.get_model_info())

    def encode_latents(self, wav: bytes, wav_format: str | None = None) -> bytes:
        """See `AsyncVoxCPMServerPool`, also for the others."""
        return self._loop.call(self._pool.encode_latents(wav, wav_format))

    def add_prompt(self, wav: bytes, wav_format: str | None, prompt_text: str) -> str:
        """Keep a recording and what is said in it; returns its id."""
        return self._loop.call(self._pool.add_prompt(wav, wav_format, prompt_text))

    def remove_prompt(self, prompt_id: str) -> None:
        """Forget a recording."""
        self._loop.call(self._pool.remove_prompt(prompt_id))

    def register_lora(self, name: str, path: str) -> dict[str, str]:
        """Load a LoRA adapter from a directory into all processes."""
        return self._loop.call(self._pool.register_lora(name, path))

    def unregister_lora(self, name: str) -> dict[str, str]:
        """Forget an adapter, once the last request that uses it has ended."""
        return self._loop.call(self._pool.unregister_lora(name))

    def list_loras(self) -> list[dict[str, str]]:
        """The adapters that requests may name."""
        return self._loop.call(self._pool.list_loras())

    def load_lora(self, path: str) -> dict[str, Any]:
        """Load the adapter of all requests that name none, in place of the one before."""
        return self._loop.call(self._pool.load_lora(path))

    def set_lora_enabled(self, enabled: bool) -> dict[str, Any]:
        """Use the adapter of `load_lora`, or leave it be."""
        return self._loop.call(self._pool.set_lora_enabled(enabled))

    def reset_lora(self) -> dict[str, Any]:
        """Forget the adapter of `load_lora`."""
        return self._loop.call(self._pool.reset_lora())

    @with_arguments_of(AsyncVoxCPMServerPool.open_stream)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[Samples, None, None]:
        """Speak a text; yields float32 mono samples, a patch at a time.

        Closing the generator ends the request. See `AsyncVoxCPMServerPool.open_stream` for the
        arguments and what is raised.
        """
        stream = self._loop.call(self._pool.open_stream(*args, **kwargs))
        try:
            while (chunk := self._loop.call(_next(stream))) is not None:
                yield chunk
        finally:
            self._loop.finish(stream.aclose())


def _stop(loop: LoopThread, pool: AsyncVoxCPMServerPool) -> None:
    loop.close(pool.stop())


async def _next(stream: SpeechStream | LongSpeech) -> Samples | None:
    """The next chunk; None at the end."""
    return await anext(stream, None)
