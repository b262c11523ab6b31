"""How long a call keeps the device busy."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 1 << 30
"""Written before every call. More than any cache holds, and it keeps the device busy while the host
launches what is measured."""


class Timer:
    """Medians of repeated calls, with cold caches.

    On CUDA the time is taken by events on the device, elsewhere on the host.

    Args:
        device: Where calls run.
        repeats: How often each is measured.
        warm_ups: How often it is called before.
    """

    def __init__(self, device: torch.device, repeats: int = 30, warm_ups: int = 3) -> None:
        self._device, self._repeats, self._warm_ups = device, repeats, warm_ups
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median time of a call."""
        for _ in range(self._warm_ups):
            run()
        if self._flush is None:
            return statistics.median(self._on_host(run) for _ in range(self._repeats))
        events = [self._on_device(run, self._flush) for _ in range(self._repeats)]
        torch.cuda.synchronize(self._device)
        return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)

    @staticmethod
    def _on_host(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    @staticmethod
    def _on_device(
        run: Callable[[], Any], flush: torch.Tensor
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        return start, end
