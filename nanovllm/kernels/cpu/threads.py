"""The cores that this process may use."""

import math
import os
from pathlib import Path


def num_usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Logical cores by affinity, or fewer by the CPU quota of the cgroup, rounded up."""
    cores = len(usable_cpus()) or os.cpu_count() or 1
    quota_file = cgroup / "cpu.max"
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def usable_cpus() -> list[int]:
    """Numbers of the CPUs this process may run on; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
