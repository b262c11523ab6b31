"""Thousands of short requests through one engine leave nothing behind."""

import random
import resource

import pytest

from nanovllm import LLM, SamplingParams

NUM_REQUESTS = 10_000
WARM_UP = 2_000
ALLOWED_GROWTH_KIB = 24 << 10


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat() -> None:
    """Peak memory after 10,000 requests is that after the first 2,000, give or take 24 MiB.

    In float32: for bfloat16 on a CPU, oneDNN keeps a compiled kernel for every shape it meets, up
    to some hundred MB, which would hide a leak of ours.
    """
    rng = random.Random(0)
    with LLM(dtype="float32", max_model_len=256, num_kv_blocks=600, max_num_seqs=64) as llm:
        total = llm.engine.scheduler.block_manager.num_blocks
        for done in range(0, NUM_REQUESTS, 500):
            prompts = [[rng.randrange(4096) for _ in range(rng.randint(1, 40))] for _ in range(500)]
            params = [
                SamplingParams(max_tokens=rng.randint(1, 4), stop="the", logprobs=1)
                for _ in prompts
            ]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(output.finished for output in outputs)
            if done + 500 == WARM_UP:
                warm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - warm
        scheduler = llm.engine.scheduler
        assert scheduler.num_free_slots == 64
        assert scheduler.block_manager.num_free == total
        assert len(llm._outputs) == len(scheduler._sequences) == 0
        assert growth < ALLOWED_GROWTH_KIB, f"grew by {growth} KiB"
