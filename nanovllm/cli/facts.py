"""What the benchmarks' commands print besides their tables."""

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from nanovllm.bench.machine import Machine
    from nanovllm.bench.stats import Distribution


def milliseconds(figures: "Distribution | None") -> list[str]:
    """Mean, p50, p90, p99 and most, as cells of a table."""
    return ["-"] * 5 if figures is None else [f"{value * 1e3:.1f}" for value in astuple(figures)]


def hardware(machine: "Machine") -> dict[str, str]:
    """What the figures were measured on."""
    parts = [f"{machine.cpu_model}, {machine.num_cores} cores", *(g.name for g in machine.gpus)]
    return {"hardware": "; ".join(parts)}


def versions(machine: "Machine") -> dict[str, str]:
    """What they were measured with."""
    return {"versions": ", ".join(f"{name} {value}" for name, value in machine.versions.items())}


def listed(settings: dict[str, Any]) -> str:
    """Settings in one line, without those that are not given."""
    given = {name: value for name, value in settings.items() if value is not None}
    return ", ".join(f"{name}={value}" for name, value in given.items())


def show_facts(console: "Console", facts: dict[str, str]) -> None:
    """Print what stands below a table, a line each."""
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
