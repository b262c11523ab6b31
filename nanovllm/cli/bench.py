"""`nanovllm bench`: figures of the engine on this machine."""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.bench.offline import make_workload, run_offline
from nanovllm.bench.quality import quality_options, reference_config, run_quality
from nanovllm.cli.options import DEFAULT_CONFIG, Engine, open_llm
from nanovllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from rich.console import Console

    from nanovllm.bench.machine import Machine
    from nanovllm.bench.offline import OfflineResult
    from nanovllm.bench.quality import QualityResult

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


def quality(
    text: Path,
    *,
    context: int = 1024,
    max_windows: int | None = None,
    reference: str | None = None,
    json: bool = False,
    engine: Engine = DEFAULT_CONFIG,
) -> None:
    """What quantization costs: how a model predicts a text, beside the same one unquantized.

    Args:
        text: UTF-8 file to predict.
        context: Tokens of a window; windows do not overlap.
        max_windows: Windows to read at most.
        reference: Checkpoint to compare with; needed where the model's is quantized.
        json: Whether to print one JSON object.
        engine: The engine.
    """
    from rich.console import Console
    from rich.progress import Progress

    for name, value in (("context", context), ("max_windows", max_windows)):
        if value is not None and value < (least := 2 if name == "context" else 1):
            raise InvalidRequestError(f"{name} must be at least {least}, got {value}", name)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InvalidRequestError(f"{text} is not UTF-8 text: {e}", "text") from e
    options = quality_options(engine, context)
    with (
        open_llm(reference_config(options, reference)) as expected,
        open_llm(options) as llm,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("Windows", total=None)
        result = run_quality(
            llm,
            expected,
            content,
            context=context,
            max_windows=max_windows,
            on_window=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json:
        figures = {
            "perplexity": result.perplexity,
            "reference_perplexity": result.reference_perplexity,
        }
        sys.stdout.write(json_format.dumps(figures | asdict(result), indent=2) + "\n")
    else:
        _show_quality(result)


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
    facts = {
        "engine": f"{result.num_steps} steps, {result.num_preemptions} preemptions, "
        f"{result.num_cached_tokens} cached tokens",
        "settings": _listed(result.settings),
    }
    _show_facts(console, _hardware(result.machine) | facts | _versions(result.machine))


def _show_quality(result: "QualityResult") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{result.num_tokens:,} tokens in {result.num_windows} windows"
    table = Table("", "reference", "model", "difference", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before, after in (
        ("bits per token", result.reference_bits, result.bits),
        ("perplexity", result.reference_perplexity, result.perplexity),
    ):
        change = f"{after - before:+.4f} ({after / before - 1:+.2%})"
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", change)
    table.add_row("same most likely token", "", f"{result.agreement:.2%}", "")
    table.add_row("KL divergence, nats", "", f"{result.kl_divergence:.5f}", "")
    console.print(table)
    facts = {"reference": _listed(result.reference), "model": _listed(result.settings)}
    _show_facts(console, _hardware(result.machine) | facts | _versions(result.machine))


def _hardware(machine: "Machine") -> dict[str, str]:
    parts = [f"{machine.cpu_model}, {machine.num_cores} cores", *(g.name for g in machine.gpus)]
    return {"hardware": "; ".join(parts)}


def _versions(machine: "Machine") -> dict[str, str]:
    return {"versions": ", ".join(f"{name} {value}" for name, value in machine.versions.items())}


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _show_facts(console: "Console", facts: dict[str, str]) -> None:
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
