"""Dispatch over two engines: requests find their prefix, and no engine gets them all."""

import asyncio
import json
import random
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanovllm import SamplingParams
from nanovllm.async_llm import AsyncLLM
from nanovllm.config import DEMO_MODEL

pytestmark = pytest.mark.accept

PREFIX_LEN = 512
NUM_KV_BLOCKS = 340
"""Of 16 tokens: room for ten prefixes of sixteen, and for what runs."""
NUM_REQUESTS, NUM_WARM_UP, NUM_CLIENTS = 150, 30, 4
LARGER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
"""Than the demo model, so that to compute a prefix takes longer than the machine's whims."""
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0)


@dataclass
class Run:
    """What one policy achieved.

    Args:
        ttft: Mean seconds to the first token, those of the first requests left out.
        num_computed: Positions that each engine computed.
    """

    ttft: float
    num_computed: list[int]


def draw(draws: random.Random, length: int) -> list[int]:
    return [draws.randrange(3, 1000) for _ in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    for file in DEMO_MODEL.glob("*token*.json"):
        shutil.copy(file, directory)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | LARGER))
    return directory


async def dispatch(model: Path, policy: str, num_prefixes: int) -> Run:
    """Let a few clients send requests that begin with one of some prefixes."""
    draws = random.Random(0)
    prefixes = [draw(draws, PREFIX_LEN) for _ in range(num_prefixes)]
    prompts = [draws.choice(prefixes) + draw(draws, 16) for _ in range(NUM_REQUESTS)]
    times: list[float] = []

    async def client(llm: AsyncLLM) -> None:
        while prompts:
            prompt, first_token = prompts.pop(), 0.0
            start = time.monotonic()
            async for output in llm.generate(prompt, PARAMS):
                if not first_token and output.outputs[0].token_ids:
                    first_token = time.monotonic() - start
            times.append(first_token)

    async with AsyncLLM(
        str(model),
        dummy_weights=True,
        replicas=2,
        dispatch_policy=policy,
        num_kv_blocks=NUM_KV_BLOCKS,
        max_model_len=1024,
        cpu_threads=1,
    ) as llm:
        await asyncio.gather(*(client(llm) for _ in range(NUM_CLIENTS)))
        num_computed = [worker.engine.num_computed_tokens for worker in llm.stats().workers]
    return Run(statistics.fmean(times[NUM_WARM_UP:]), num_computed)


def test_cache_aware_brings_the_first_token_sooner(model: Path) -> None:
    """16 prefixes of 512 tokens: at most 0.6 of round robin's mean time, in one run."""
    turns = asyncio.run(dispatch(model, "round_robin", 16))
    aware = asyncio.run(dispatch(model, "cache_aware", 16))
    assert sum(aware.num_computed) < 0.6 * sum(turns.num_computed)
    assert aware.ttft <= 0.6 * turns.ttft


def test_cache_aware_does_not_send_everything_to_one_engine(model: Path) -> None:
    """All requests have the same prefix; both engines compute it, and both work."""
    run = asyncio.run(dispatch(model, "cache_aware", 1))
    assert min(run.num_computed) > 0.3 * sum(run.num_computed)
