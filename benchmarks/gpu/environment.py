"""What is measured on."""

import importlib.util
import shutil
import subprocess
from dataclasses import asdict

import torch

from gpu.world import World
from nanovllm.bench.machine import inspect_machine

ATTENTION_PACKAGES = ("triton", "flash_attn", "flash_attn_interface", "flashinfer")
QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def run(world: World) -> None:
    machine = inspect_machine()
    world.record("device", _device_name(world), detail=asdict(machine))
    world.record("cpu", f"{machine.cpu_model}, {machine.num_cores} cores")
    versions = [f"{name} {version}" for name, version in machine.versions.items()]
    world.record("versions", ", ".join(versions))
    found = [name for name in ATTENTION_PACKAGES if importlib.util.find_spec(name) is not None]
    world.record("attention packages", ", ".join(found) or "none")
    if not world.on_cuda:
        world.record.skip("driver and clocks", f"the device is {world.device.type}")
        return
    world.record("CUDA of torch", str(torch.version.cuda))
    with world.record.guard("driver and clocks"):
        world.record("driver and clocks", _query())


def _device_name(world: World) -> str:
    if not world.on_cuda:
        return world.device.type
    of = torch.cuda.get_device_properties(world.device)
    memory = of.total_memory / 2**30
    return f"{of.name}, {of.multi_processor_count} SMs, sm_{of.major}{of.minor}, {memory:.0f} GiB"


def _query() -> str:
    """What nvidia-smi says of the first device; it changes nothing."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not here"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    values = zip(QUERY.split(","), shown.stdout.strip().split(", "), strict=False)
    return ", ".join(f"{name} {value}" for name, value in values)
