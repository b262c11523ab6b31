"""Where the time of a step goes: each stage's share of a batch of equal requests.

python benchmarks/step_breakdown.py --num-seqs 64 --output-len 128

`--kernels` tells the kernels of a CPU apart. They are then called one by one from Python and not
replayed, so the step as a whole takes longer.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.bench.machine import inspect_machine
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.replay import REPLAYABLE

STAGES = (
    ("schedule", "engine.scheduler", "schedule"),
    ("lay rows out", "_runner", "_lay_out"),
    ("plan attention", "_runner", "_rows_context"),
    ("rest of the model", "_runner", "_compute"),
    ("sampling", "_runner", "_tail"),
    ("collect", "_runner", "collect"),
    ("commit", "engine.scheduler", "commit"),
    ("detokenise", "_outputs", "process"),
)
PARTS = (
    ("layers", "_runner.model.model", "run"),
    ("logits", "_runner.model", "compute_logits"),
)
KERNELS = tuple((name, "_runner.kernels._library", name) for name in REPLAYABLE)
IN_MODEL = ("layers", "logits", *REPLAYABLE)
"""Stages inside "rest of the model", whose time is theirs alone."""


class Stopwatch:
    """Sums the time spent in methods it has wrapped."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - start

        object.__setattr__(owner, method, timed)


def measure(
    llm: LLM, num_seqs: int, prompt_len: int, output_len: int, kernels: bool = False
) -> dict[str, Any]:
    """Run the requests and return milliseconds per step by stage."""
    watch = Stopwatch()
    for stage, path, method in (*STAGES, *(KERNELS if kernels else PARTS)):
        owner: Any = llm
        for name in path.split("."):
            owner = getattr(owner, name)
        watch.wrap(owner, method, stage)
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output_len)
    prompts = [[1 + i] * prompt_len for i in range(num_seqs)]
    llm.generate(prompts[:2], params, use_tqdm=False)
    watch.seconds.clear()
    steps = llm.engine.stats().num_steps
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    wall = time.perf_counter() - start
    steps = llm.engine.stats().num_steps - steps
    seconds = dict(watch.seconds)
    seconds["rest of the model"] -= sum(seconds.get(stage, 0.0) for stage in IN_MODEL)
    seconds["everything else"] = wall - sum(seconds.values())
    return {
        "num_steps": steps,
        "tokens_per_second": num_seqs * output_len / wall,
        "ms_per_step": {stage: 1e3 * value / steps for stage, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--num-seqs", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with LLM(args.model, max_num_seqs=args.num_seqs, enforce_eager=args.kernels) as llm:
        if args.kernels and not isinstance(llm._runner.kernels, CpuKernels):
            parser.error("--kernels needs our CPU kernels")
        result = measure(llm, args.num_seqs, args.prompt_len, args.output_len, args.kernels)
    result["machine"] = asdict(inspect_machine())
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    machine = result["machine"]
    sys.stdout.write(f"{machine['cpu_model']}, {machine['num_cores']} cores\n")
    total = sum(result["ms_per_step"].values())
    for stage, value in result["ms_per_step"].items():
        sys.stdout.write(f"{stage:20} {value:8.3f} ms {value / total:6.1%}\n")
    sys.stdout.write(f"{'step':20} {total:8.3f} ms, {result['tokens_per_second']:.0f} tokens/s\n")


if __name__ == "__main__":
    main()
