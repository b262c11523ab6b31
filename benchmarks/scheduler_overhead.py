"""What the engine costs per step beside the model: scheduling, blocks, bookkeeping, outputs.

A runner without a model stands in, and the time spent in it is subtracted. Two workloads: *decode*,
where every sequence gets one position in every step, and *churn*, where sequences end at random and
newcomers with prompts of 100 to 1024 ids take their place, some sharing a prefix.

    python benchmarks/scheduler_overhead.py [--num-seqs 256] [--steps 1000] [--json]
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

from nanovllm.batch import Batch, Key, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
MAX_NUM_BATCHED_TOKENS = 8192
NUM_WARMUP_STEPS = 50
SHARED_PREFIX: list[Key] = list(range(64))


class InstantRunner:
    """Answers every row with the same id at once, and keeps the time that takes.

    Attributes:
        seconds: Time spent in here since it was last set to 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def launch(self, batch: Batch) -> list[StepResult]:
        start = time.perf_counter()
        rows = zip(batch.slots, batch.emits, strict=True)
        results = [StepResult(slot, 7) for slot, emits in rows if emits]
        self.seconds += time.perf_counter() - start
        return results

    def collect(self, handle: list[StepResult]) -> list[StepResult]:
        return handle


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds per step of one workload, the runner's subtracted.

    Args:
        workload: "decode" or "churn".
        depth: Steps in flight while the next is scheduled.
        median: Half of the steps take less.
        p99: 99 in 100 take less.
        mean: Over all steps.
        mean_positions: Positions per step.
    """

    workload: str
    depth: int
    median: float
    p99: float
    mean: float
    mean_positions: float


def measure(workload: str, depth: int, num_seqs: int, num_steps: int) -> Overhead:
    """Run `num_steps` steps of a workload at `num_seqs` running sequences."""
    draws = random.Random(0)
    runner = InstantRunner()
    num_blocks = num_seqs * MAX_MODEL_LEN // BLOCK_SIZE
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE), num_seqs, max(MAX_NUM_BATCHED_TOKENS, num_seqs)
    )
    engine = LLMEngine(runner, scheduler, max_model_len=MAX_MODEL_LEN, async_scheduling=bool(depth))

    def add() -> None:
        churns = workload == "churn"
        length = draws.randint(100, 1024) if churns else draws.randint(16, 128)
        prompt: list[Key] = [draws.randrange(10_000) for _ in range(length)]
        if churns and draws.random() < 0.5:
            prompt = SHARED_PREFIX + prompt
        engine.add(prompt, SamplingParams(max_tokens=draws.randint(100, 1024) if churns else None))

    seconds, positions = [], []
    for step in range(-NUM_WARMUP_STEPS, num_steps):
        while len(scheduler.running) + len(scheduler.waiting) < num_seqs:
            add()
        num_computed = engine.stats().num_computed_tokens
        runner.seconds = 0.0
        start = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - start
        if step >= 0:
            seconds.append(elapsed - runner.seconds)
            positions.append(engine.stats().num_computed_tokens - num_computed)
    ordered = sorted(seconds)
    return Overhead(
        workload=workload,
        depth=depth,
        median=statistics.median(ordered) * 1e3,
        p99=ordered[int(len(ordered) * 0.99)] * 1e3,
        mean=statistics.fmean(ordered) * 1e3,
        mean_positions=statistics.fmean(positions),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all workloads and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-seqs", type=int, default=256, help="running sequences")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured for each workload")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    settings = {
        "num_seqs": options.num_seqs,
        "steps": options.steps,
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "seed": 0,
    }
    results = [
        measure(workload, depth, options.num_seqs, options.steps)
        for workload in ("decode", "churn")
        for depth in (0, 1)
    ]
    if options.json:
        figures = [asdict(result) for result in results]
        document = {"machine": machine(), "settings": settings, "ms_per_step": figures}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    console = Console(highlight=False)
    for name, value in (machine() | settings).items():
        console.print(f"{name}: {value}")
    table = Table("workload", "depth", "median ms", "p99 ms", "mean ms", "positions a step")
    for r in results:
        figures_of = (f"{value:.3f}" for value in (r.median, r.p99, r.mean))
        table.add_row(r.workload, str(r.depth), *figures_of, f"{r.mean_positions:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
