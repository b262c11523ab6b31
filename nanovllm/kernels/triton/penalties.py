"""Penalties at the cost of the tokens they are for, not of the vocabulary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.kernels import Penalties

BLOCK = 1024
"""Tokens of a history that a program reads at a time."""


class PenaltyKernel:
    """Counts each row's tokens in a table that is zero from one call to the next.

    Args:
        device: Where the table is; it grows with the rows that have penalties.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(0, 0, dtype=torch.int32, device=device)

    def apply(self, logits: Tensor, penalties: Penalties) -> None:
        """See `Kernels.apply_penalties`."""
        num_rows, max_len = penalties.history.shape
        if not num_rows or not max_len:
            return
        if num_rows > len(self._counts) or logits.shape[1] != self._counts.shape[1]:
            self._counts = self._counts.new_zeros(num_rows, logits.shape[1])
        _penalties_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            logits.stride(1),
            penalties.rows,
            penalties.history,
            penalties.history.stride(0),
            penalties.history.stride(1),
            penalties.lengths,
            penalties.prompt_lengths,
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
            self._counts,
            self._counts.stride(0),
            BLOCK=BLOCK,
            num_warps=8,
        )


@triton.jit
def _penalties_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    rows_ptr,
    history_ptr,
    history_stride,
    position_stride,
    lengths_ptr,
    prompt_lengths_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    counts_stride,
    BLOCK: tl.constexpr,
):
    """Penalise a row.

    Its counts hold 1 for a token of the prompt, and 2 more for each time it was generated. Whoever
    takes a count and leaves 0 applies the penalties, so that each token has them once.
    """
    index = tl.program_id(0).to(tl.int64)
    logits_ptr += tl.load(rows_ptr + index) * row_stride
    history_ptr += index * history_stride
    counts_ptr += index * counts_stride
    length = tl.load(lengths_ptr + index).to(tl.int32)
    prompt_length = tl.load(prompt_lengths_ptr + index).to(tl.int32)
    repetition = tl.load(repetition_ptr + index)
    presence = tl.load(presence_ptr + index)
    frequency = tl.load(frequency_ptr + index)
    lane = tl.arange(0, BLOCK)
    for first in range(0, length, BLOCK):
        position = first + lane
        known = position < length
        token = tl.load(history_ptr + position * position_stride, mask=known, other=0)
        in_prompt = known & (position < prompt_length)
        generated = known & (position >= prompt_length)
        tl.atomic_or(counts_ptr + token, 1, mask=in_prompt, sem="relaxed")
        tl.atomic_add(counts_ptr + token, 2, mask=generated, sem="relaxed")
    # The counts are complete, and each is read where the atomics above have left it.
    tl.debug_barrier()
    for first in range(0, length, BLOCK):
        position = first + lane
        known = position < length
        token = tl.load(history_ptr + position * position_stride, mask=known, other=0)
        count = tl.atomic_xchg(counts_ptr + token, 0, mask=known, sem="relaxed")
        ours = known & (count > 0)
        place = logits_ptr + token.to(tl.int64) * column_stride
        x = tl.load(place, mask=ours, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        times = count >> 1
        x -= frequency * times.to(tl.float32)
        x -= tl.where(times > 0, presence, 0.0)
        tl.store(place, x, mask=ours)
