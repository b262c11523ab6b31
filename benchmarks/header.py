"""What the benchmarks print above their figures: the machine, the versions and the settings."""

import platform

from nanovllm import __version__
from nanovllm.bench.machine import cpu_model
from nanovllm.kernels.cpu.threads import num_usable_cores


def machine() -> dict[str, str | int]:
    """Hardware and versions by name; `inspect_machine` knows more, and imports torch for it."""
    return {
        "cpu": cpu_model(),
        "cores": num_usable_cores(),
        "python": platform.python_version(),
        "nanovllm": __version__,
    }


def headline(*settings: str) -> str:
    """The same in a line that ends with the settings."""
    has = machine()
    hardware = f"{has['cpu']}, {has['cores']} cores"
    versions = f"nanovllm {has['nanovllm']}, Python {has['python']}"
    return "; ".join([hardware, versions, ", ".join(settings)])
