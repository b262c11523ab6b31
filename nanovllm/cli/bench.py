"""`nanovllm bench`: figures of the engine on this machine."""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nanovllm.bench.offline import make_workload, run_offline
from nanovllm.bench.quality import quality_options, reference_config, run_quality
from nanovllm.bench.serve_config import ServeConfig
from nanovllm.cli.facts import hardware, listed, milliseconds, show_facts, versions
from nanovllm.cli.options import DEFAULT_CONFIG, Engine, open_llm
from nanovllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from rich.console import Console

    from nanovllm.bench.offline import OfflineResult
    from nanovllm.bench.quality import QualityResult
    from nanovllm.bench.serve import ServeResult
    from nanovllm.bench.stats import LoadResult

LoadTest = Annotated[ServeConfig, Parameter(name="*")]
DEFAULT_LOAD = ServeConfig()
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


def serve(
    *,
    json: Annotated[list[Path] | None, Parameter(consume_multiple=(0, 1))] = None,
    plot: Path | None = None,
    load: LoadTest = DEFAULT_LOAD,
) -> None:
    """Put a server with OpenAI's API under load: latencies, throughput, goodput, errors.

    Args:
        json: File to write one JSON object to; without a name it is printed, and no table.
        plot: File to write charts of the latencies to, as SVG.
        load: The load.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from nanovllm.bench.plot import plot_loads
    from nanovllm.bench.serve import run, run_serve

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawing takes time from the loop that measures, so it is done seldom.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("Requests", total=load.num_requests * len(load.loads()))
        result = run(run_serve(load, lambda done: progress.update(task, completed=done)))
    figures = json_format.dumps(result.to_dict(), indent=2) + "\n"
    if plot is not None:
        plot.write_text(plot_loads(result.loads), encoding="utf-8")
    if json == []:
        sys.stdout.write(figures)
        return
    if json:
        json[0].write_text(figures, encoding="utf-8")
    _show_serve(result)


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
        "settings": listed(result.settings),
    }
    show_facts(console, hardware(result.machine) | facts | versions(result.machine))


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
    facts = {"reference": listed(result.reference), "model": listed(result.settings)}
    show_facts(console, hardware(result.machine) | facts | versions(result.machine))


def _show_serve(result: "ServeResult") -> None:
    from rich.console import Console

    console = Console()
    if len(result.loads) > 1:
        _show_sweep(console, result.loads)
    for load in result.loads:
        if len(result.loads) == 1:
            _show_load(console, load)
        _show_doubts(console, load)
    facts = {"server": listed(result.server), "settings": listed(result.settings)}
    client = {f"{name} of the client": value for name, value in hardware(result.machine).items()}
    show_facts(console, facts | client | versions(result.machine))


def _show_load(console: "Console", result: "LoadResult") -> None:
    from rich.table import Table

    from nanovllm.bench.stats import LATENCIES

    table = Table("ms", "mean", "p50", "p90", "p99", "max", title=f"Load: {result.load}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, words in LATENCIES.items():
        table.add_row(f"{words} ({name.upper()})", *milliseconds(getattr(result, name)))
    console.print(table)
    facts = {
        "requests": f"{result.num_completed} of {result.num_requests} in {result.duration:.2f} s",
        "tokens": f"{result.num_prompt_tokens} in ({result.num_cached_tokens} cached), "
        f"{result.num_output_tokens} out",
        "throughput": f"{result.request_throughput:.2f} requests/s, {result.output_throughput:.1f} "
        f"output tokens/s, {result.total_throughput:.1f} tokens/s in and out",
    }
    if result.goodput is not None:
        good = f"{result.num_good} of {result.num_requests}"
        facts["goodput"] = f"{result.goodput:.2f} requests/s, {good}"
    show_facts(console, facts)


def _show_sweep(console: "Console", results: "list[LoadResult]") -> None:
    from rich.table import Table

    headings = ["load", "requests/s", "output tokens/s"]
    headings += [f"{name.upper()} {p}" for name in ("ttft", "tpot", "e2e") for p in ("p50", "p99")]
    table = Table(*headings, "goodput", "failed", title="Latencies in ms")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        latencies = []
        for figures in (result.ttft, result.tpot, result.e2e):
            _, p50, _, p99, _ = milliseconds(figures)
            latencies += [p50, p99]
        goodput = "-" if result.goodput is None else f"{result.goodput:.2f}"
        rates = f"{result.request_throughput:.2f}", f"{result.output_throughput:.1f}"
        failed = str(result.num_requests - result.num_completed)
        table.add_row(str(result.load), *rates, *latencies, goodput, failed)
    console.print(table)


def _show_doubts(console: "Console", result: "LoadResult") -> None:
    """Say what went wrong, and whether the client was fit to measure."""
    facts = {}
    if result.errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.errors.items())
        facts[f"failed ({result.load})"] = f"{kinds}; the first: {result.first_error}"
    _, p50, _, p99, most = milliseconds(result.loop_lag)
    _, _, _, _, late = milliseconds(result.late)
    client = (
        f"{result.client_cpu:.0%} of a core, event loop late by p50 {p50} p99 {p99} max {most} ms, "
        f"requests sent up to {late} ms late"
    )
    if result.is_client_slow:
        client += "; TOO SLOW to trust these latencies: give it a core or lower the load"
    facts[f"client ({result.load})"] = client
    show_facts(console, facts)
