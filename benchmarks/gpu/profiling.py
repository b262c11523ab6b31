"""Where the device's time of a step goes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.world import World

MAX_ROWS = 10


def record_profile(
    world: World, name: str, step: Callable[[], Any], num_steps: int, seconds: float
) -> None:
    """Profile some steps.

    Args:
        world: Takes the figures: how long the device is busy, and with which kernels most.
        name: What the steps are of.
        step: Runs one.
        num_steps: How many to run.
        seconds: What one takes when nobody looks.
    """
    activities = [ProfilerActivity.CPU]
    if world.on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for _ in range(num_steps):
            step()
        if world.on_cuda:
            torch.cuda.synchronize()
    rows = kernel_rows(profiled, world.on_cuda, num_steps)
    busy = sum(row["us_a_step"] for row in rows)
    world.record(
        f"{name}, device busy, us a step",
        busy,
        note=f"{busy / (1e6 * seconds):.0%} of a step's time",
        detail=rows[:MAX_ROWS],
    )


def kernel_rows(profiled: profile, on_cuda: bool, num_steps: int) -> list[dict[str, Any]]:
    """Kernels, or operators of a CPU, by the time they take."""
    rows = []
    for event in profiled.key_averages():
        if on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # an operator, whose kernels have rows of their own
        micros = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        rows.append(
            {"name": event.key, "calls": event.count / num_steps, "us_a_step": micros / num_steps}
        )
    return sorted(rows, key=lambda row: -row["us_a_step"])
