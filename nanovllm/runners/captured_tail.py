"""The tail of speech behind hidden states at fixed addresses, captured."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.batch import SpeechRequest
from nanovllm.kernels.attention_backend import IntArray
from nanovllm.kernels.lora import NO_ADAPTER, IndexedBatch
from nanovllm.models.voxcpm.cfm import Guidance
from nanovllm.runners.decode_graphs import RowOutputs
from nanovllm.runners.graphs import Capture, GraphLadder
from nanovllm.runners.speech_tail import Generated, SpeechTail, TailRows
from nanovllm.runners.transfers import StepInputs

DEFAULT_TIMESTEPS = SpeechRequest().inference_timesteps
MAX_TIMESTEPS = 64
"""Sum of the different numbers of timesteps that are captured: bounds the memory of their graphs.

The default and half a dozen others fit; what does not runs without graphs.
"""


class CapturedTail:
    """A `SpeechTail` whose graphs go by number of rows, number of timesteps and adapters or none.

    Rows of several numbers of timesteps take a graph each, which finds its rows by their indices.
    All rows are guided: to leave out those that need not be would take looking at the values.

    Args:
        capture: Captures them.
        sizes: Numbers of rows to capture, ascending.
        tail: What is captured.
        outputs: Where the hidden states are, each `[sizes[-1], hidden_size]`.
        samples_per_patch: Samples of a patch's sound.
    """

    def __init__(
        self,
        capture: Capture,
        sizes: Sequence[int],
        tail: SpeechTail,
        outputs: RowOutputs,
        samples_per_patch: int,
    ) -> None:
        self._tail, self._outputs = tail, outputs
        num_slots, *patch_shape = tail.last_patches.shape
        device, capacity = tail.last_patches.device, sizes[-1]
        self._inputs = StepInputs(
            {
                "rows": (np.int64, capacity),
                "slots": (np.int64, num_slots - 1),
                "adapters": (np.int64, NO_ADAPTER),
                "cfg_value": (np.float32, 1.0),
                "noise": (np.dtype((np.float32, tuple(patch_shape))), 0.0),
            },
            capacity,
            device,
        )
        # The last row is that of all rows that only pad.
        self._results = Generated(
            torch.zeros(capacity + 1, *patch_shape, device=device),
            torch.zeros(capacity + 1, samples_per_patch, device=device),
            torch.zeros(capacity + 1, dtype=torch.bool, device=device),
            torch.zeros(capacity + 1, dtype=torch.bool, device=device),
        )
        self._ladder = GraphLadder(capture, sizes, self._blank, self._run)
        self._captured = {DEFAULT_TIMESTEPS}

    def capture(self) -> None:
        """Capture the graphs of the default number of timesteps, without adapters."""
        self._ladder.capture((DEFAULT_TIMESTEPS, False))

    def generate(self, outputs: RowOutputs, rows: TailRows) -> Generated:
        """See `SpeechTail.generate`; what returns lasts until the next step.

        `outputs` lie where they are read from, if they fit there.
        """
        num_rows, groups = len(rows.slots), list(rows.groups())
        if num_rows > self._ladder.max_rows or not self._take(num for num, _ in groups):
            return self._tail.generate(outputs, rows)
        for num_timesteps, of_group in groups:
            self._replay(rows, of_group, num_timesteps)
        return Generated(*(result[:num_rows] for result in self._results))

    def _take(self, numbers: Iterable[int]) -> bool:
        """Whether these numbers of timesteps are captured, or may be."""
        captured = self._captured.union(numbers)
        if captured != self._captured and sum(captured) > MAX_TIMESTEPS:
            return False
        self._captured = captured
        return True

    def _replay(self, rows: TailRows, of_group: IntArray, num_timesteps: int) -> None:
        values: dict[str, npt.NDArray[Any]] = {
            "rows": of_group,
            "slots": rows.slots[of_group],
            "cfg_value": rows.cfg_value[of_group],
            "noise": rows.noise[of_group],
        }
        if rows.adapters is not None and (rows.adapters[of_group] != NO_ADAPTER).any():
            values["adapters"] = rows.adapters[of_group]
        size = self._ladder.size_for(len(of_group))
        graph = self._ladder.graph(size, (num_timesteps, "adapters" in values))
        self._inputs.fill(values)
        graph()

    def _blank(self, size: int, variant: Hashable) -> None:  # noqa: ARG002
        self._inputs.fill({})

    def _run(self, size: int, variant: Hashable) -> None:
        num_timesteps, with_adapters = cast(tuple[int, bool], variant)
        columns = {name: column[:size] for name, column in self._inputs.columns.items()}
        rows, slots = columns["rows"], columns["slots"]
        present = rows.clamp(max=len(self._outputs[0]) - 1)
        lm, residual = (output[present] for output in self._outputs)
        lora = IndexedBatch(columns["adapters"]) if with_adapters else None
        guidance = Guidance.of_all(columns["cfg_value"][:, None, None])
        patches = self._tail.denoise(
            (lm, residual), slots, columns["noise"], guidance, num_timesteps, lora
        )
        generated = self._tail.finish(lm, patches, slots, lora)
        for result, made in zip(self._results, generated, strict=True):
            result[rows] = made
