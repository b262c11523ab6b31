"""The family's offline workload, beside its roofline and beside transformers."""

import time
from typing import Any

import torch

from gpu.roofline import measure_ceilings, offline_seconds
from gpu.timer import Timer
from gpu.world import World
from nanovllm.bench.offline import (
    TEMPERATURE,
    OfflineResult,
    Workload,
    draw_workload,
    make_workload,
    run_offline,
)

NAME = "0.6b"
PEER_SECONDS = 60
"""What transformers may take before it is stopped."""


def run(world: World) -> None:
    timer = Timer(world.device, *((2, 1) if world.tiny else (10, 2)))
    ceilings = measure_ceilings(timer, world.device, world.tiny)
    del timer
    world.free()
    vocab_size = world.model(NAME).shape.vocab_size
    workload, shared = make_workload(vocab_size), _shared_workload(vocab_size, world.tiny)
    if world.tiny:
        workload = draw_workload(vocab_size, 4, (8, 16), (4, 8))
    ours = 0.0
    with world.engine(NAME) as llm:
        # Kernels are compiled and graphs captured here, not in what is measured.
        warm_up = draw_workload(vocab_size, 4, (8, 16), (4, 8), seed=1)
        if not world.tiny:
            warm_up = draw_workload(vocab_size, 64, (100, 1024), (32, 64), seed=1)
        run_offline(llm, warm_up)
        result = run_offline(llm, workload)
        floor = offline_seconds(world.model(NAME), workload, ceilings)
        _record(world, result, workload, floor)
        ours = run_offline(llm, shared).output_rate
    _beside_transformers(world, shared, ours)


def _record(world: World, result: OfflineResult, workload: Workload, floor: float) -> None:
    num_tokens = workload.num_output_tokens
    world.record(
        f"{NAME} offline, output tokens/s",
        result.output_rate,
        share=floor / result.wall_time,
        note=f"roofline {num_tokens / floor:,.0f} tokens/s",
        detail={"settings": result.settings, "num_steps": result.num_steps},
    )
    world.record(f"{NAME} offline, prefill, tokens/s", result.prefill_rate)
    world.record(f"{NAME} offline, decode, tokens/s", result.decode_rate)
    world.record(f"{NAME} offline, preemptions", result.num_preemptions)


def _shared_workload(vocab_size: int, tiny: bool) -> Workload:
    """What both engines run: the family's prompts, and a quarter of its outputs, for time."""
    if tiny:
        return draw_workload(vocab_size, 3, (8, 16), (4, 8), seed=2)
    return draw_workload(vocab_size, 256, (100, 1024), (25, 256), seed=2)


def _beside_transformers(world: World, workload: Workload, ours: float) -> None:
    ratio = f"{NAME} offline, times transformers' continuous batching"
    with world.record.guard(ratio):
        model = _peer(world)
        theirs, is_whole = _peer_rate(world, model, workload)
        note = "a quarter of the output lengths"
        if not is_whole:
            note += "; transformers was stopped, and is credited with all of its work"
        world.record(f"{NAME} quarter offline, ours, output tokens/s", ours, note=note)
        world.record(f"{NAME} quarter offline, transformers, output tokens/s", theirs, note=note)
        world.record(ratio, ours / theirs, note=note)


def _peer(world: World) -> Any:
    """Transformers' model of the same shape, with random weights."""
    import transformers

    directory = world.options(NAME)["model"]
    config = transformers.AutoConfig.from_pretrained(directory)
    with world.device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def _peer_rate(world: World, model: Any, workload: Workload) -> tuple[float, bool]:
    """Output tokens per second, at most, and whether all requests ended in time."""
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        eos_token_id=-1,
        pad_token_id=0,
        max_new_tokens=max(workload.output_lens),
    )
    # On a GPU it sizes itself by the memory there is.
    size = {"num_blocks": 16, "max_batch_tokens": 64} if world.tiny else {}
    with model.continuous_batching_context_manager(
        generation_config=config,
        timeout=5,
        continuous_batching_config=ContinuousBatchingConfig(**size),
    ) as manager:
        manager.add_request(workload.prompts[0][:8], max_new_tokens=4)
        if not _finish(manager, 1, time.perf_counter() + PEER_SECONDS):
            raise RuntimeError("transformers' warm-up did not end")
        start = time.perf_counter()
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
            manager.add_request(prompt, max_new_tokens=output_len)
        ended = _finish(manager, len(workload.prompts), start + PEER_SECONDS)
        seconds = time.perf_counter() - start
    # Tokens of requests that did not end are not known.
    return workload.num_output_tokens / seconds, len(ended) == len(workload.prompts)


def _finish(manager: Any, num_requests: int, deadline: float) -> list[Any]:
    """The outputs of requests that ended before the deadline."""
    ended: list[Any] = []
    while len(ended) < num_requests and time.perf_counter() < deadline:
        output = manager.get_result(timeout=1)
        if output is None and not manager.is_running():
            raise RuntimeError("transformers' batching ended by itself")
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(f"transformers: {output.error}")
            ended.append(output)
    return ended
