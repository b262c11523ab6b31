"""Speech of the VoxCPM2 shape: how much faster than it sounds, and how soon."""

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu.profiling import record_profile
from gpu.world import World, random_ids
from nanovllm.batch import Key, SpeechPayload, SpeechRequest
from nanovllm.bench.speech_shapes import RELEASES, write_release
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.loading import load_engine

AUDIO_START = 101
NUM_TEXT_TOKENS = 32
NUM_STREAMS = (1, 8, 32, 64)
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "without graphs": {"enforce_eager": True},
    "with compile_model": {"compile_model": True},
}


class Spoken(NamedTuple):
    """Times of a round, in seconds: to each stream's first sound and to its end; and of sound."""

    first: list[float]
    ends: list[float]
    sound: float


def run(world: World) -> None:
    num_patches, streams = (3, (1, 2)) if world.tiny else (40, NUM_STREAMS)
    for variant, options in VARIANTS.items():
        name = f"speech {variant}" if variant else "speech"
        if reason := world.missing_option(**options):
            world.record.skip(f"{name}, 1 stream, RTF", reason)
            continue
        with world.record.guard(name):
            given = speech_options(world, max_num_seqs=max(streams), **options)
            engine, runner, _ = load_engine(EngineConfig(**given), Path(given["model"]))
            rate = runner.model.config.vae.out_sample_rate
            for num_streams in streams[:1] if variant else streams:
                _speak(engine, num_streams, num_patches, rate)  # compiles and captures
                spoken = _speak(engine, num_streams, num_patches, rate)
                _record(world, name, spoken)
                if not variant and num_streams in (streams[0], streams[-1]):
                    _profile(world, engine, num_streams, max(spoken.ends) / num_patches)
            del engine, runner
            world.free()


def _record(world: World, name: str, spoken: Spoken) -> None:
    title = _title(name, len(spoken.ends))
    factors = [end / spoken.sound for end in spoken.ends]
    first = 1e3 * statistics.median(spoken.first)
    note = f"{spoken.sound:.1f} s of sound each"
    world.record(f"{title}, RTF", statistics.mean(factors), note=note)
    world.record(
        f"{title}, first audio, ms", first, note=f"the last one {1e3 * max(spoken.first):.3g}"
    )


def _title(name: str, num_streams: int) -> str:
    return f"{name}, {num_streams} stream{'s' if num_streams > 1 else ''}"


def _profile(world: World, engine: LLMEngine, num_streams: int, seconds: float) -> None:
    """Where the device's time of a step goes."""
    num_steps = 2 if world.tiny else 10
    _add(engine, num_streams, 2 * num_steps)
    for _ in range(num_steps // 2):
        engine.step()
    title = _title("speech", num_streams)
    with world.record.guard(f"{title}, profile"):
        record_profile(world, title, engine.step, num_steps, seconds)
    while engine.has_unfinished:
        engine.step()


def _add(engine: LLMEngine, num_streams: int, num_patches: int) -> None:
    """Ask for so many texts that nobody has asked for before."""
    params = SamplingParams(max_tokens=num_patches, seed=0)
    seed = engine.stats().num_steps
    for number in range(num_streams):
        keys: list[Key] = [*random_ids(NUM_TEXT_TOKENS, 450, seed + number), AUDIO_START]
        # Random weights would stop anywhere.
        engine.add(keys, params, payload=SpeechRequest(min_len=num_patches))


def _speak(engine: LLMEngine, num_streams: int, num_patches: int, rate: int) -> Spoken:
    """Say so many texts at once."""
    start = time.perf_counter()
    first: dict[int, float] = {}
    ends: dict[int, float] = {}
    num_samples = 0
    _add(engine, num_streams, num_patches)
    while engine.has_unfinished:
        for news in engine.step():
            now = time.perf_counter() - start
            if isinstance(news.payload, SpeechPayload):
                num_samples += len(news.payload.audio) // 4
                first.setdefault(news.seq_id, now)
            if news.finish_reason is not None:
                ends[news.seq_id] = now
            if news.finish_reason == "error":
                raise RuntimeError(f"the speech failed: {news.stop_reason}")
    return Spoken(list(first.values()), list(ends.values()), num_samples / rate / num_streams)


def speech_options(world: World, **more: Any) -> dict[str, Any]:
    """Options of an engine of the VoxCPM2 shape with random weights, or of a toy like it."""
    directory = write_release(world.directory / "voxcpm2", "2")
    given = {"model": str(directory), "dummy_weights": True, "device": world.device.type}
    if world.tiny:
        (directory / "config.json").write_text(json.dumps(_toy()))
        given |= {"num_kv_blocks": 64, "cpu_threads": 1}
    return given | more


def _toy() -> dict[str, Any]:
    release = json.loads(json.dumps(RELEASES["2"]))
    local = {"hidden_dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 1, "kv_channels": 16}
    release["lm_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "vocab_size": 512,
    }
    release["lm_config"]["rope_scaling"] |= {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    release |= {"residual_lm_num_layers": 1, "scalar_quantization_latent_dim": 16}
    release["encoder_config"] |= local
    release["dit_config"] |= local
    release["audio_vae_config"] |= {"encoder_dim": 8, "decoder_dim": 64}
    return release
