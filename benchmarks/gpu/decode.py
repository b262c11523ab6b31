"""Decode: how near a step comes to the time that reading weights and cache takes."""

import statistics
import time
from itertools import pairwise
from typing import Any

from gpu.profiling import record_profile
from gpu.roofline import Ceilings, decode_seconds, measure_ceilings
from gpu.timer import Timer
from gpu.world import World, random_ids
from nanovllm import LLM, SamplingParams

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "without graphs": {"enforce_eager": True},
    "without overlap": {"async_scheduling": False},
    "without either": {"enforce_eager": True, "async_scheduling": False},
    "deterministic": {"deterministic": True},
}


FULL_BATCH = 256


def run(world: World) -> None:
    timer = Timer(world.device, *((2, 1) if world.tiny else (10, 2)))
    ceilings = measure_ceilings(timer, world.device, world.tiny)
    del timer
    world.free()
    # What matters most comes first.
    for name in ("0.6b", "8b"):
        _measure(world, ceilings, name, 1, "")
    _measure(world, ceilings, "0.6b", 3 if world.tiny else FULL_BATCH, "")
    for variant in [*VARIANTS][1:]:
        _measure(world, ceilings, "0.6b", 1, variant)
    _measure(world, ceilings, "8b", 1, "without graphs")


def _measure(world: World, ceilings: Ceilings, name: str, num_streams: int, variant: str) -> None:
    """Decode so many streams on an engine of its own."""
    prompt_len, num_tokens = (16, 8) if world.tiny else (512, 256)
    title = f"{name} decode, {num_streams} stream{'s' if num_streams > 1 else ''}"
    figure = f"{title}{f' {variant}' if variant else ''}, ms a token"
    options = {"max_num_seqs": max(8, num_streams), **VARIANTS[variant]}
    if reason := world.missing_option(**options):
        world.record.skip(figure, reason)
        return
    contexts = [prompt_len + num_tokens // 2] * num_streams
    floor = decode_seconds(world.model(name), contexts, ceilings)
    with world.record.guard(figure), world.engine(name, **options) as llm:
        seconds = statistics.median(token_gaps(llm, num_streams, prompt_len, num_tokens))
        world.record(
            figure, 1e3 * seconds, share=floor / seconds, note=f"bound {1e3 * floor:.3f} ms"
        )
        if not variant:
            world.record(f"{title}, share of the HBM bound", floor / seconds)
            with world.record.guard(f"{title}, profile"):
                _profile(world, llm, title, num_streams, seconds)


def token_gaps(llm: LLM, num_streams: int, prompt_len: int, num_tokens: int) -> list[float]:
    """Seconds between steps that gave every stream a token, the first few left out."""
    times: list[float] = []
    for round_ in range(2):  # the first warms up
        times.clear()
        _add(llm, num_streams, prompt_len, num_tokens, seed=round_ * num_streams)
        while llm.has_unfinished():
            if len(llm.step()) == num_streams:
                times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)][2:]


def _add(llm: LLM, num_streams: int, prompt_len: int, num_tokens: int, seed: int) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)
    for number in range(num_streams):
        prompt = random_ids(prompt_len, llm.model_config.vocab_size, seed + number)
        llm.add_request(prompt, params)


def _profile(world: World, llm: LLM, title: str, num_streams: int, seconds: float) -> None:
    """Where the device's time of a step goes."""
    num_steps = 4 if world.tiny else 20
    _add(llm, num_streams, 16, 2 * num_steps, seed=2 * num_streams)
    for _ in range(num_steps // 2):
        llm.step()
    record_profile(world, title, llm.step, num_steps, seconds)
    while llm.has_unfinished():
        llm.step()
