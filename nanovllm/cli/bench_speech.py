"""`nanovllm bench speech`: how fast this machine speaks."""

import json as json_format
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nanovllm.bench.speech_config import SpeechBenchConfig
from nanovllm.cli.facts import hardware, listed, show_facts, versions
from nanovllm.cli.options import DEFAULT_CONFIG, Engine, numbers

if TYPE_CHECKING:
    from nanovllm.bench.speech import SpeechBenchResult, SpeechResult
    from nanovllm.bench.stats import Distribution


@dataclass(frozen=True, kw_only=True)
class LoadFlags(SpeechBenchConfig):  # noqa: D101  # SpeechBenchConfig's docstring is the help
    concurrency: Annotated[
        list[int] | None, Parameter(converter=numbers, consume_multiple=True)
    ] = None
    seed: Annotated[int, Parameter(show=False)] = 0  # the engine's flag, which says it all


LoadFlags.__doc__ = SpeechBenchConfig.__doc__
Load = Annotated[LoadFlags, Parameter(name="*")]
DEFAULT_LOAD = LoadFlags()


def speech(
    *, json: bool = False, load: Load = DEFAULT_LOAD, engine: Engine = DEFAULT_CONFIG
) -> None:
    """Real-time factor, time to the first sound and sound per second of an engine that speaks.

    Args:
        json: Whether to print one JSON object.
        load: The load.
        engine: The engine.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from nanovllm.bench.serve import run
    from nanovllm.bench.speech import run_speech

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    total = load.num_warmups + sum(load.num_requests_of(one) for one in load.loads())
    # Drawing takes time from the loop that measures, so it is done seldom.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("Requests", total=total)
        result = run(
            run_speech(load, engine, on_done=lambda done: progress.update(task, completed=done))
        )
    if json:
        sys.stdout.write(json_format.dumps(result.to_dict(), indent=2) + "\n")
    else:
        _show(result)


def _show(result: "SpeechBenchResult") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", *(str(load.load) for load in result.loads), title="Speech")
    for column in table.columns[1:]:
        column.justify = "right"
    columns = [_column(load) for load in result.loads]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    errors = {
        f"failed ({load.load})": load.first_error for load in result.loads if load.first_error
    }
    facts = {"settings": listed(result.settings)}
    show_facts(console, errors | facts | hardware(result.machine) | versions(result.machine))


def _column(load: "SpeechResult") -> dict[str, str]:
    """The figures of a load, by what they are."""
    return {
        "sound per second [s]": f"{load.audio_rate:.2f}",
        "RTF p50, p99": _joined(load.rtf, ("p50", "p99"), 1, 3),
        "RTF after the first chunk p50": _joined(load.rtf_after_first, ("p50",), 1, 3),
        "first sound p50, p90, p99 [ms]": _joined(load.ttfb, ("p50", "p90", "p99"), 1e3, 0),
        "between chunks p50, p90, p99 [ms]": _joined(load.gap, ("p50", "p90", "p99"), 1e3, 0),
        "requests": f"{load.num_completed} of {load.num_requests}",
    }


def _joined(
    figures: "Distribution | None", names: tuple[str, ...], factor: float, digits: int
) -> str:
    if figures is None:
        return "-"
    return " ".join(f"{factor * getattr(figures, name):.{digits}f}" for name in names)
