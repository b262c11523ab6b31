"""What the benchmarks under the family's names share: how they run and what they print."""

import argparse
from functools import partial

from rich.console import Console

from nanovllm import LLM
from nanovllm.bench.offline import OfflineResult, Workload, run_offline

MAX_MODEL_LEN = 4096
MAX_NEW_TOKENS = 512
PREVIEW_LEN = 120

say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--model`; the description is the first line of a docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--model", help="checkpoint or hub id; default: the bundled model")
    return parser


def prompt_parser(description: str | None, prompt: str) -> argparse.ArgumentParser:
    """A parser with a prompt and a number of tokens besides."""
    parser = model_parser(description)
    parser.add_argument("prompt", nargs="?", default=prompt)
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    return parser


def open_model(model: str | None) -> LLM:
    """The model as the family's benchmarks open it."""
    return LLM(model, enforce_eager=False, max_model_len=MAX_MODEL_LEN)


def show_offline(llm: LLM, workload: Workload) -> OfflineResult:
    """Run a workload and print the line by which the family compares engines."""
    result = run_offline(llm, workload)
    say(
        f"Total: {result.num_output_tokens}tok, Time: {result.wall_time:.2f}s, "
        f"Throughput: {result.output_rate:.2f}tok/s"
    )
    say_where(llm)
    return result


def say_where(llm: LLM) -> None:
    """Print what a figure is worth nothing without: the hardware and the model."""
    from nanovllm.bench.machine import inspect_machine

    machine, config = inspect_machine(), llm.config
    hardware = ", ".join([machine.cpu_model, *(gpu.name for gpu in machine.gpus)])
    say(
        f"Hardware: {hardware}, {machine.num_cores} cores; model: "
        f"{config.model or 'bundled demo model'}, {config.dtype} on {config.device}"
    )
