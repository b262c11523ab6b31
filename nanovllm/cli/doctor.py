"""`nanovllm doctor`: what this machine has, and what of a model fits on it."""

import json as json_format
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanovllm.bench.machine import inspect_machine
from nanovllm.cli.options import DEFAULT_CONFIG, Engine

if TYPE_CHECKING:
    from nanovllm.bench.fit import Fit
    from nanovllm.bench.machine import Machine

MIB = 1 << 20
GIB = 1 << 30


def doctor(*, json: bool = False, engine: Engine = DEFAULT_CONFIG) -> None:
    """Show what this machine has, and what of a model fits on it.

    Args:
        json: Whether to print one JSON object.
        engine: The model in question, and the options it would run with.
    """
    from nanovllm.bench.fit import work_out_fit

    machine = inspect_machine()
    if json:
        facts = {"machine": asdict(machine), "fit": asdict(work_out_fit(engine))}
        sys.stdout.write(json_format.dumps(facts, indent=2) + "\n")
        return
    _show("This machine", _describe_machine(machine))
    _show("What fits", _describe_fit(work_out_fit(engine)))


def _show(title: str, facts: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(value or "none", overflow="fold"))
    Console().print(table)


def _describe_machine(machine: "Machine") -> dict[str, str]:
    gpus = [
        f"{gpu.name}, {gpu.memory_free / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB free"
        for gpu in machine.gpus
    ]
    return {
        "system": machine.system,
        "CPU": machine.cpu_model,
        "cores": f"{machine.num_cores} usable, {machine.num_threads} torch threads",
        "instruction sets": ", ".join(machine.instruction_sets),
        "memory": f"{machine.memory_available / GIB:.1f} of {machine.memory_total / GIB:.1f} GiB "
        "available",
        "CUDA devices": "\n".join(gpus),
        "OpenMP": "\n".join(machine.openmp),
        "compilers": "\n".join(f"{name}: {says}" for name, says in machine.compilers.items()),
        "versions": "\n".join(f"{name} {value}" for name, value in machine.versions.items()),
    }


def _describe_fit(fit: "Fit") -> dict[str, str]:
    num_vae = fit.num_vae_parameters
    autoencoder = f", and {num_vae / 1e6:,.1f} M of the autoencoder" if num_vae else ""
    return {
        "model": fit.model,
        "architecture": fit.architecture,
        "device, kernels, dtype": f"{fit.device}, {fit.kernels}, {fit.dtype}",
        "parameters": f"{fit.num_parameters / 1e6:,.1f} M{autoencoder}",
        "weights": f"{fit.weight_bytes / MIB:,.1f} MiB",
        "KV cache": f"{fit.kv_bytes_per_token / 1024:,.1f} KiB a token, "
        f"up to {fit.kv_cache_bytes / MIB:,.0f} MiB",
        "tokens in the KV cache": f"{fit.num_kv_tokens:,}",
        "longest prompt plus output": f"{fit.max_model_len:,}",
    }
