"""Our engine, with random weights."""

import asyncio
import time
from typing import Any

from nanovllm.async_speech import AsyncSpeech
from nanovllm.speech_params import SpeechParams
from peers.speech_worker import TEXT, Speak, work


def load(settings: dict[str, Any]) -> Speak:
    """Start an engine process."""
    loop = asyncio.new_event_loop()
    speech = AsyncSpeech(
        settings["model"],
        dummy_weights=True,
        quantization=settings["quantization"],
        cpu_threads=settings["num_threads"],
        max_model_len=1024,
        max_num_seqs=32,
    )
    loop.run_until_complete(speech.start())
    num_patches = settings["num_patches"]

    async def one(number: int) -> tuple[float, int]:
        params = SpeechParams(
            min_len=num_patches,
            max_generate_length=num_patches,
            inference_timesteps=settings["inference_timesteps"],
            seed=number,
        )
        first, num_samples = 0.0, 0
        async for chunk in await speech.generate(TEXT, params):
            first = first or time.perf_counter()
            num_samples += len(chunk)
        return first, num_samples

    async def all_of(num_streams: int) -> dict[str, float]:
        start = time.perf_counter()
        results = await asyncio.gather(*(one(number) for number in range(num_streams)))
        return {
            "seconds": time.perf_counter() - start,
            "first": min(first for first, _ in results) - start,
            "audio": sum(num for _, num in results) / speech.info.sample_rate,
        }

    def speak(num_streams: int) -> dict[str, float]:
        return loop.run_until_complete(all_of(num_streams))

    return speak


if __name__ == "__main__":
    work(load)
