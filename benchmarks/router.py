"""What dispatch alone costs: picking one of 100 workers, and noting what it was sent.

The workers are stand-ins with a load and nothing behind it. Half of a prompt is one of 64 shared
prefixes. At most 64 requests a worker are open; past that a random one ends when the next comes.

    python benchmarks/router.py [--targets 100] [--requests 2000] [--json]
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from header import machine
from rich.console import Console
from rich.table import Table

from nanovllm.cluster.router import POLICIES, make_router
from nanovllm.engine.block_manager import root_hash

BLOCK_SIZE = 16
NUM_KV_BLOCKS = 16_384
NUM_PREFIXES = 64
NUM_OUTPUT_TOKENS = 256
PROMPT_LENS = (128, 1024, 4096, 32_768)


@dataclass(slots=True)
class StubTarget:
    """A worker of which only the load is there."""

    index: int
    num_inflight: int = 0
    outstanding_tokens: int = 0
    num_kv_blocks: int = NUM_KV_BLOCKS
    block_size: int = BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Cost:
    """Latency that a policy adds to a request, in microseconds.

    Args:
        policy: The policy.
        prompt_len: Tokens of a prompt.
        p50: Half of the requests take less.
        p99: 99 in 100 take less.
        requests_per_second: Dispatched one after the other.
        hit_rate: Share of the prompts' tokens that the worker is thought to have cached.
    """

    policy: str
    prompt_len: int
    p50: float
    p99: float
    requests_per_second: float
    hit_rate: float


def measure(policy: str, prompt_len: int, num_targets: int, num_requests: int) -> Cost:
    """Dispatch `num_requests` requests, after half as many to warm up."""
    draws = random.Random(0)
    router = make_router(policy, seed=0)
    targets = [StubTarget(index) for index in range(num_targets)]
    half = prompt_len // 2
    prefixes = [[draws.randrange(150_000) for _ in range(half)] for _ in range(NUM_PREFIXES)]
    root = root_hash("benchmark", None, None)
    running: list[tuple[StubTarget, int]] = []
    seconds, num_cached = [], 0
    for request in range(-num_requests // 2, num_requests):
        rest = [draws.randrange(150_000) for _ in range(prompt_len - half)]
        prompt = draws.choice(prefixes) + rest
        start = time.perf_counter()
        target = router.pick(targets, prompt, root)
        num_hits = router.sent(target, prompt, root)
        elapsed = time.perf_counter() - start
        if request >= 0:
            seconds.append(elapsed)
            num_cached += num_hits
        positions = prompt_len - num_hits + NUM_OUTPUT_TOKENS
        _add(target, positions, 1)
        running.append((target, positions))
        if len(running) > 64 * num_targets:
            index = draws.randrange(len(running))
            running[index], running[-1] = running[-1], running[index]
            ended, positions = running.pop()
            _add(ended, -positions, -1)
    return Cost(
        policy=policy,
        prompt_len=prompt_len,
        p50=statistics.median(seconds) * 1e6,
        p99=sorted(seconds)[int(len(seconds) * 0.99)] * 1e6,
        requests_per_second=num_requests / sum(seconds),
        hit_rate=num_cached / (prompt_len * num_requests),
    )


def _add(target: StubTarget, num_positions: int, num_requests: int) -> None:
    target.outstanding_tokens += num_positions
    target.num_inflight += num_requests


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every policy and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, default=100, help="workers to choose from")
    parser.add_argument("--requests", type=int, default=2000, help="requests measured each")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    settings = {
        "targets": options.targets,
        "requests": options.requests,
        "block_size": BLOCK_SIZE,
        "num_kv_blocks": NUM_KV_BLOCKS,
        "seed": 0,
    }
    costs = [
        measure(policy, prompt_len, options.targets, options.requests)
        for policy in POLICIES
        for prompt_len in PROMPT_LENS
    ]
    if options.json:
        figures = [asdict(cost) for cost in costs]
        document = {"machine": machine(), "settings": settings, "added_latency_us": figures}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    console = Console(highlight=False)
    for name, value in (machine() | settings).items():
        console.print(f"{name}: {value}")
    table = Table("policy", "prompt", "p50 us", "p99 us", "requests/s", "cached")
    for cost in costs:
        latencies = (f"{value:.1f}" for value in (cost.p50, cost.p99))
        rate, hits = f"{cost.requests_per_second:,.0f}", f"{cost.hit_rate:.0%}"
        table.add_row(cost.policy, str(cost.prompt_len), *latencies, rate, hits)
    console.print(table)


if __name__ == "__main__":
    main()
