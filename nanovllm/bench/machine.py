"""What this machine has, as figures are published with and as `nanovllm doctor` shows it."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanovllm import __version__

PACKAGES = (
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "transformers",
)
COMPILERS = ("cc", "c++", "g++", "clang", "clang++")
OPENMP_LIBRARIES = ("libgomp", "libiomp5", "libomp")
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "NEON I8MM",
    "bf16": "NEON BF16",
    "sve": "SVE",
}
"""Flags of /proc/cpuinfo that matter to matrix products, by the name people know."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device; memory in bytes."""

    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware and software of this machine, as far as this process may use it.

    Args:
        system: Operating system, release and architecture.
        cpu_model: Name of the CPU.
        num_cores: Logical cores this process may use, by affinity and by its cgroup's quota.
        instruction_sets: Those that speed up matrix products.
        memory_total: Bytes of memory, or of the cgroup's limit if that is less.
        memory_available: Bytes still to be had.
        gpus: CUDA devices.
        num_threads: Threads torch computes with.
        openmp: OpenMP runtimes in this process; more than one compete for the cores.
        compilers: Compilers on the path, with what they say of their version.
        versions: Versions of Python and of the packages that figures depend on.
    """

    system: str
    cpu_model: str
    num_cores: int
    instruction_sets: list[str]
    memory_total: int
    memory_available: int
    gpus: list[Gpu]
    num_threads: int
    openmp: list[str]
    compilers: dict[str, str]
    versions: dict[str, str]


def inspect_machine() -> Machine:
    """Look at this machine. Imports torch, for its devices, threads and OpenMP runtime."""
    import torch

    from nanovllm.kernels.cpu.threads import num_usable_cores
    from nanovllm.runners.memory import available_cpu_memory

    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_model=cpu_model(),
        num_cores=num_usable_cores(),
        instruction_sets=instruction_sets(),
        memory_total=total_memory(),
        memory_available=available_cpu_memory(),
        gpus=_gpus(),
        num_threads=torch.get_num_threads(),
        openmp=_openmp_runtimes(),
        compilers=_compilers(),
        versions=_versions(),
    )


def cpu_model() -> str:
    """The CPU's name, from /proc/cpuinfo, sysctl or `platform`, whichever knows it."""
    for line in _cpuinfo().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    if platform.system() == "Darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or platform.machine()


def total_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory, or the cgroup's limit if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = cgroup / "memory.max"
    if limit_file.is_file() and (limit := limit_file.read_text().strip()) != "max":
        total = min(total, int(limit))
    return total


def instruction_sets() -> list[str]:
    """Names of the instruction sets in `INSTRUCTION_SETS` that this CPU has."""
    for line in _cpuinfo().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    return ["NEON"] if platform.machine() in ("arm64", "aarch64") else []


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _gpus() -> list[Gpu]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return gpus


def _openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries that are mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(OPENMP_LIBRARIES))


def _compilers() -> dict[str, str]:
    return {name: _first_line([name, "--version"]) for name in COMPILERS if shutil.which(name)}


def _first_line(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        return f"does not run: {e}"
    return next(iter(run.stdout.splitlines()), "")


def _versions() -> dict[str, str]:
    versions = {"nanovllm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
