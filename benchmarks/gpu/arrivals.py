"""Streams that decode steadily while long prompts arrive: how long anybody waits for a token."""

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

from gpu.world import World, percentile, random_ids
from nanovllm import LLM, SamplingParams

NAME = "0.6b"
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "1024 tokens a step": {"max_num_batched_tokens": 1024},
}
ENDLESS = 100_000


def run(world: World) -> None:
    num_streams, prompt_len = (3, 48) if world.tiny else (32, 8192)
    seconds, interval = (0.2, 0.05) if world.tiny else (4.0, 0.5)
    for variant, options in VARIANTS.items():
        suffix = f", {variant}" if variant else ""
        title = f"{NAME}, p99 between tokens, 8k prompts arriving over none{suffix}"
        if world.tiny:
            options = {**options, "max_model_len": 2048}
        with world.record.guard(title), world.engine(NAME, **options) as llm:
            streams = _start(llm, num_streams)
            _step_for(llm, streams, seconds / 4, [])
            _answer(llm, prompt_len, 0)  # compiles what long prompts need
            alone = _step_for(llm, streams, seconds, [])
            prompts = [
                random_ids(prompt_len, llm.model_config.vocab_size, 100 + number)
                for number in range(int(seconds / interval))
            ]
            mixed = _step_for(llm, streams, seconds, prompts)
            for gaps, name in ((alone, "no prompts"), (mixed, "8k prompts arriving")):
                if not gaps:
                    raise RuntimeError(f"no tokens came with {name}")
                figures = {"p50": 0.5, "p99": 0.99, "max": 1.0}
                shown = {key: 1e3 * percentile(gaps, share) for key, share in figures.items()}
                world.record(
                    f"{NAME}, {num_streams} streams, {name}{suffix}, p99 between tokens, ms",
                    shown["p99"],
                    note=f"p50 {shown['p50']:.3g}, max {shown['max']:.3g}",
                )
            note = f"{len(prompts)} prompts of {prompt_len}, one every {interval} s"
            world.record(title, percentile(mixed, 0.99) / percentile(alone, 0.99), note=note)
            for stream in streams:
                llm.abort(stream)


def _start(llm: LLM, num_streams: int) -> set[str]:
    """Streams that do not end; their ids."""
    room = llm.engine.max_model_len
    params = SamplingParams(
        temperature=0.6, seed=0, ignore_eos=True, max_tokens=min(ENDLESS, room - 64)
    )
    vocab_size = llm.model_config.vocab_size
    prompts = [random_ids(32, vocab_size, seed) for seed in range(num_streams)]
    return {llm.add_request(prompt, params) for prompt in prompts}


def _answer(llm: LLM, prompt_len: int, seed: int) -> None:
    """Take one more prompt in, and go on until it has been answered."""
    prompt = random_ids(prompt_len, llm.model_config.vocab_size, seed)
    wanted = llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    while not any(out.request_id == wanted and out.finished for out in llm.step()):
        pass


def _step_for(llm: LLM, streams: set[str], seconds: float, prompts: list[list[int]]) -> list[float]:
    """Step for a while, prompts arriving evenly; returns the gaps between the streams' tokens."""
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    times: defaultdict[str, list[float]] = defaultdict(list)
    start, waiting = time.perf_counter(), list(prompts)
    arrivals = [seconds * number / max(1, len(prompts)) for number in range(len(prompts))]
    while (now := time.perf_counter() - start) < seconds:
        while waiting and now >= arrivals[len(prompts) - len(waiting)]:
            llm.add_request(waiting.pop(0), params)
        news = llm.step()
        now = time.perf_counter()
        for output in news:
            if output.request_id in streams:
                times[output.request_id].append(now)
    return [after - before for of in times.values() for before, after in pairwise(of)]
