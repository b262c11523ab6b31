"""`nanovllm bench`: figures of the engine on this machine."""

import json as json_format
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanovllm.bench.offline import make_workload, run_offline
from nanovllm.cli.options import DEFAULT_CONFIG, Engine, open_llm

if TYPE_CHECKING:
    from nanovllm.bench.offline import OfflineResult

RATES = ("prefill_rate", "decode_rate", "output_rate", "total_rate")


def offline(*, small: bool = False, json: bool = False, engine: Engine = DEFAULT_CONFIG) -> None:
    """Tokens per second over 256 queued requests of 100 to 1024 tokens in and out.

    Args:
        small: Whether to run 16 requests of 50 to 256 tokens in and 32 to 64 out instead.
        json: Whether to print one JSON object.
        engine: The engine.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    with open_llm(engine) as llm:
        workload = make_workload(llm.model_config.vocab_size, small)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("Output tokens", total=workload.num_output_tokens)
            result = run_offline(
                llm, workload, lambda num_output: progress.update(task, completed=num_output)
            )
    if json:
        rates = {name: round(getattr(result, name), 2) for name in RATES}
        sys.stdout.write(json_format.dumps(rates | asdict(result), indent=2) + "\n")
    else:
        _show(result)


def _show(result: "OfflineResult") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = (
        ("prefill", result.prefill_tokens, result.prefill_time, result.prefill_rate),
        ("decode", result.decode_tokens, result.decode_time, result.decode_rate),
        ("output", result.num_output_tokens, result.wall_time, result.output_rate),
        (
            "total (in and out)",
            result.num_prompt_tokens + result.num_output_tokens,
            result.wall_time,
            result.total_rate,
        ),
    )
    table = Table("", "tokens", "seconds", "tokens/s", title=f"{result.num_seqs} requests")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tokens, seconds, rate in rows:
        table.add_row(name, f"{tokens:,}", f"{seconds:.2f}", f"{rate:,.1f}")
    console.print(table)
    machine = result.machine
    device = ", ".join(gpu.name for gpu in machine.gpus)
    facts = {
        "hardware": f"{machine.cpu_model}, {machine.num_cores} cores"
        + (f"; {device}" if device else ""),
        "engine": f"{result.num_steps} steps, {result.num_preemptions} preemptions, "
        f"{result.num_cached_tokens} cached tokens",
        "settings": ", ".join(f"{name}={value}" for name, value in result.settings.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in machine.versions.items()),
    }
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
