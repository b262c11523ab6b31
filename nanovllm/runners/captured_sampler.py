"""Sampling from logits that lie at a fixed address, captured by the number of rows."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.kernels import Choice, Draws, Kernels
from nanovllm.runners.graphs import Capture, GraphLadder
from nanovllm.runners.transfers import StepInputs


class CapturedSampler:
    """Samples rows that need neither masks nor penalties nor scores.

    Args:
        capture: Captures it.
        sizes: Numbers of rows to capture, ascending.
        logits: float32 `[sizes[-1], vocab_size]`; changed in place.
        token_ids: Where sampled ids go, by slot and position; the last slot is of rows that only
            pad.
        kernels: Choose.
    """

    def __init__(
        self,
        capture: Capture,
        sizes: Sequence[int],
        logits: Tensor,
        token_ids: Tensor,
        kernels: Kernels,
    ) -> None:
        self._logits, self._token_ids, self._kernels = logits, token_ids, kernels
        self._inputs = StepInputs(
            {
                "slots": (np.int64, len(token_ids) - 1),
                "ends": (np.int64, 0),
                "temperature": (np.float32, 0.0),
                "uniforms": (np.float32, 0.0),
                "top_k": (np.int64, logits.shape[1]),
                "top_p": (np.float32, 1.0),
                "min_p": (np.float32, 0.0),
            },
            sizes[-1],
            logits.device,
        )
        self._sampled = torch.zeros(sizes[-1], dtype=torch.int64, device=logits.device)
        self._ladder = GraphLadder(capture, sizes, self._blank, self._run)

    @property
    def max_rows(self) -> int:
        return self._ladder.max_rows

    def capture(self) -> None:
        """Capture all sizes."""
        self._ladder.capture()

    def sample(self, rows: Mapping[str, npt.NDArray[Any]]) -> Tensor:
        """Sample the first rows of the logits.

        Args:
            rows: Where their ids go, "slots" and "ends", and what `SamplingTable.draws` says of
                them, each `[num_rows]`.

        Returns:
            What `keep_tokens` does, until the next step.
        """
        num_rows = len(rows["slots"])
        graph = self._ladder.graph(self._ladder.size_for(num_rows))
        self._inputs.fill(rows)
        graph()
        return self._sampled[:num_rows]

    def _blank(self, size: int, variant: Hashable) -> None:  # noqa: ARG002
        self._inputs.fill({})

    def _run(self, size: int, variant: Hashable) -> None:  # noqa: ARG002
        columns = {name: column[:size] for name, column in self._inputs.columns.items()}
        slots, ends = columns.pop("slots"), columns.pop("ends")
        choice = self._kernels.choose(self._logits[:size], Draws(any_sampled=True, **columns))
        self._sampled[:size] = keep_tokens(choice, self._token_ids, slots, ends)


def keep_tokens(choice: Choice, token_ids: Tensor, slots: Tensor, ends: Tensor) -> Tensor:
    """Write chosen ids to where the next step reads them.

    The sequence of an invalid row ends when the step is collected; until then any id will do.

    Args:
        choice: The ids, and which of them are valid.
        token_ids: int32, by slot and position.
        slots: int64 `[num_rows]`.
        ends: Position of each id, int64 `[num_rows]`.

    Returns:
        The ids, -1 in invalid rows, int64 `[num_rows]`.
    """
    chosen = torch.where(choice.valid, choice.token_ids, -1)
    token_ids[slots, ends] = chosen.clamp(min=0).to(token_ids.dtype)
    return chosen
