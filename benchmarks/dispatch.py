"""What dispatch by prefix gives: time to first token over replicas, with shared prefixes.

    python benchmarks/dispatch.py --model DIR --dummy-weights

Closed loop: so many clients send one request after the other, each of one of the prefixes at random
and an end of its own. The policies take turns, round after round, each time with new engines and so
with empty caches. In the second part all requests share one prefix; what matters there is that both
replicas work.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from header import headline
from rich.console import Console
from rich.table import Table

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.bench.machine import inspect_machine

POLICIES = ("round_robin", "cache_aware")
LOADS = {"16 prefixes": 16, "one prefix": 1}
PREFIX_LEN, SUFFIX_LEN, OUTPUT_LEN = 512, 32, 16
VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Load:
    """What is sent."""

    num_prefixes: int
    num_requests: int
    num_clients: int

    def prompts(self) -> list[list[int]]:
        draws = random.Random(0)

        def ids(count: int) -> list[int]:
            return [draws.randrange(VOCAB_SIZE) for _ in range(count)]

        prefixes = [ids(PREFIX_LEN) for _ in range(self.num_prefixes)]
        return [draws.choice(prefixes) + ids(SUFFIX_LEN) for _ in range(self.num_requests)]


@dataclass(frozen=True)
class Figures:
    """Of one run: seconds to the first token, share of prompt tokens found, requests by replica."""

    mean_ttft: float
    cached_share: float
    requests: list[int]


async def measure(load: Load, policy: str, options: dict[str, Any]) -> Figures:
    async with AsyncLLM(**options, replicas=2, dispatch_policy=policy) as llm:
        prompts = iter(load.prompts())
        params = SamplingParams(max_tokens=OUTPUT_LEN, ignore_eos=True, temperature=0.0)
        ttfts: list[float] = []

        async def client() -> None:
            for prompt in prompts:
                sent = time.monotonic()
                first = None
                async for _ in llm.generate(prompt, params):
                    first = first or time.monotonic()
                ttfts.append((first or 0) - sent)

        await asyncio.gather(*(client() for _ in range(load.num_clients)))
        engines = [worker.engine for worker in llm.stats().workers]
        return Figures(
            statistics.mean(ttfts),
            sum(e.num_cached_tokens for e in engines) / sum(e.num_prompt_tokens for e in engines),
            [e.num_output_tokens // OUTPUT_LEN for e in engines],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint; by default the bundled one")
    parser.add_argument("--dummy-weights", action="store_true", help="draw its weights")
    parser.add_argument("--num-kv-blocks", type=int, help="of a replica; all prefixes by default")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--num-clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    options = {
        "model": args.model,
        "dummy_weights": args.dummy_weights,
        "num_kv_blocks": args.num_kv_blocks,
        "max_model_len": 1024,
    }
    runs: dict[tuple[str, str], list[Figures]] = {}
    for _ in range(args.rounds):
        for name, num_prefixes in LOADS.items():
            load = Load(num_prefixes, args.num_requests, args.num_clients)
            for policy in POLICIES:
                figures = asyncio.run(measure(load, policy, options))
                runs.setdefault((name, policy), []).append(figures)
    if args.json is not None:
        named = {" ".join(key): [asdict(f) for f in figures] for key, figures in runs.items()}
        machine = asdict(inspect_machine())
        args.json.write_text(json.dumps({"machine": machine, "runs": named}, indent=2))
    show(runs, args.rounds)


def show(runs: dict[tuple[str, str], list[Figures]], rounds: int) -> None:
    """Print the medians of the rounds."""
    console = Console()
    console.print(headline(f"{rounds} rounds"))
    table = Table("load", "dispatch", "mean TTFT [ms]", "prompt cached", "requests by replica")
    for (name, policy), figures in runs.items():
        ttft = statistics.median(f.mean_ttft for f in figures)
        cached = statistics.median(f.cached_share for f in figures)
        split = " / ".join(map(str, figures[-1].requests))
        table.add_row(name, policy, f"{1000 * ttft:.0f}", f"{cached:.0%}", split)
    console.print(table)


if __name__ == "__main__":
    main()
