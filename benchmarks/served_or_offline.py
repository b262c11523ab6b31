"""What serving costs: the same requests through HTTP and in the engine's own process.

    python benchmarks/served_or_offline.py --model DIR

The requests are workload W2 of the peers' benchmark, 32 mixed ones that come at once: 5296 tokens
in, 2482 out. Server, engine and load test share the machine's cores, in turns with `LLM.generate`,
which has them for itself; with new ids each time, so that no prefix cache knows them.
"""

import argparse
import json
import statistics
import tempfile
import time

from header import headline
from local_server import put_under_load, serving
from peers.workloads import WORKLOADS, Request
from rich.console import Console
from rich.table import Table

from nanovllm import LLM, SamplingParams


def run_offline(llm: LLM, requests: list[Request]) -> float:
    """Seconds it takes in this process."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
    begun = time.perf_counter()
    llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    return time.perf_counter() - begun


def run_served(requests: list[Request]) -> float:
    """Seconds it takes through the server."""
    lines = [json.dumps({"prompt": prompt, "max_tokens": n}) for prompt, n in requests]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as prompts:
        prompts.write("\n".join(lines))
        prompts.flush()
        load = ("--prompts", prompts.name, "--num-requests", len(lines), "--num-warmups", 0)
        figures = put_under_load(*load, "--temperature", 0)
    if figures["errors"]:
        raise RuntimeError(f"requests failed: {figures['errors']}")
    duration: float = figures["duration"]
    return duration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    options = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 30))
    offline, served = [], []
    with (
        LLM(args.model, max_model_len=4096, kv_cache_memory_bytes=1 << 30) as llm,
        serving(args.model, *options),
    ):
        for number in range(args.rounds + 1):
            requests = WORKLOADS["W2"].requests(number)
            times = run_offline(llm, requests), run_served(requests)
            if number:  # the first one warms up
                offline.append(times[0])
                served.append(times[1])
    num_tokens = sum(n for _, n in requests)
    console = Console()
    console.print(headline(f"{args.rounds} rounds"))
    table = Table("", "median [s]", "least", "most", "output tokens/s")
    for name, seconds in (("offline", offline), ("served", served)):
        median = statistics.median(seconds)
        cells = (median, min(seconds), max(seconds), num_tokens / median)
        table.add_row(name, *(f"{value:.2f}" for value in cells))
    console.print(table)
    ratio = statistics.median(a / b for a, b in zip(offline, served, strict=True))
    console.print(f"served at {ratio:.2f} of the offline throughput, median of the rounds")


if __name__ == "__main__":
    main()
