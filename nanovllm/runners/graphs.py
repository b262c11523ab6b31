"""Steps that are captured once and replayed: CUDA graphs, by the number of rows."""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import NotEnoughMemoryError
from nanovllm.kernels.attention_select import triton_problem

Replay = Callable[[], Any]
"""Runs what was captured once more, on what its inputs hold by now."""
Capture = Callable[[Callable[[], None]], Replay]
"""Captures what a function does on the device. The function runs more than once for that."""

MAX_CAPTURE_SIZE = 512
"""Most rows that are captured unless told otherwise: beyond, launching costs little beside them."""


class CudaGraphs:
    """A `Capture`: CUDA graphs that share one pool of memory, as no two of them run at a time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Replay:
        try:
            return self._captured(run)
        except torch.OutOfMemoryError as e:
            raise NotEnoughMemoryError(
                "no memory is left to capture a CUDA graph: lower gpu_memory_utilization or "
                "max_cudagraph_capture_size, or set enforce_eager"
            ) from e

    def _captured(self, run: Callable[[], None]) -> Replay:
        # What runs the first time compiles kernels and makes workspaces: that cannot be captured.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, one that encodes a voice for instance, may use the device meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
            run()
        return graph.replay


def graph_capture(config: EngineConfig, device: torch.device) -> Capture | None:
    """What captures graphs on a device; None where there are none, or none are wanted.

    Torch's operators alone are not captured: adapters go through them by groups that change.
    """
    if device.type != "cuda" or config.enforce_eager or triton_problem(device):
        return None
    return CudaGraphs(device)


class GraphLadder:
    """One piece of a step, captured for a few numbers of rows; fewer rows are padded.

    Args:
        capture: Captures them.
        sizes: The numbers of rows, ascending.
        blank: Prepares a size and a variant for being captured: all rows of the inputs only pad.
        run: The piece, for a size and a variant; it reads its inputs from fixed places on the
            device, leaves its results in others, and waits for nothing.
    """

    def __init__(
        self,
        capture: Capture,
        sizes: Sequence[int],
        blank: Callable[[int, Hashable], None],
        run: Callable[[int, Hashable], None],
    ) -> None:
        self._capture, self._sizes, self._blank, self._run = capture, sizes, blank, run
        self._graphs: dict[tuple[int, Hashable], Replay] = {}

    @property
    def max_rows(self) -> int:
        return self._sizes[-1]

    def size_for(self, num_rows: int) -> int:
        """The least size that so many rows fit, at most `max_rows`."""
        return next(size for size in self._sizes if size >= num_rows)

    def graph(self, size: int, variant: Hashable = None) -> Replay:
        """What replays the piece for a size. It is captured if need be, so call before filling."""
        key = size, variant
        if key not in self._graphs:
            self._blank(size, variant)
            self._graphs[key] = self._capture(lambda: self._run(size, variant))
        return self._graphs[key]

    def capture(self, variant: Hashable = None) -> None:
        """Capture all sizes, the largest first: the others then fit into its memory."""
        for size in reversed(self._sizes):
            self.graph(size, variant)


def capture_sizes(max_size: int | None, num_slots: int) -> list[int]:
    """The sizes of a ladder, ascending: powers of two up to 16, multiples of 16, and the largest.

    Args:
        max_size: The largest, 0 for no sizes at all; None is `MAX_CAPTURE_SIZE`.
        num_slots: Sequences that run at a time: more rows there are not.
    """
    largest = min(MAX_CAPTURE_SIZE if max_size is None else max_size, num_slots)
    smaller = itertools.chain((1, 2, 4, 8), range(16, largest, 16))
    return [*(size for size in smaller if size < largest), largest] if largest else []
