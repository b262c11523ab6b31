"""Tensor parallelism (Shoeybi et al. 2019, section 3): what the ranks of one model exchange."""

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch._C import _distributed_c10d as c10d

from nanovllm.errors import RankDiedError

TIMEOUT = timedelta(minutes=30)
"""For a rank that lives and does nothing; one that dies is noticed at once."""

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"

UNITS = (128, 64, 32, 16, 8, 4, 2, 1)
"""What a range is cut at multiples of: groups of quantized weights end there, and rows that begin
there are aligned for the kernels."""
LEAST_UNITS = 8
"""Units a rank has on average at least where they cannot be shared out evenly: none has more than
an eighth too much to do."""


def part_of(total: int, rank: int, size: int) -> range:
    """The part of `range(total)` that is a rank's; the parts differ in length by little."""
    unit = next(
        unit
        for unit in UNITS
        if total % (unit * size) == 0 or total // unit >= LEAST_UNITS * size or unit == 1
    )
    num_units = -(-total // unit)
    first, end = (min(num_units * r // size * unit, total) for r in (rank, rank + 1))
    return range(first, end)


class TensorParallel:
    """One of the ranks that run a model together, and its way to the others.

    All of them call the same methods in the same order. Nothing of this is global: several engines
    may run in one process.

    Args:
        rank: Number of this rank, from 0.
        size: How many there are.
        group: Sends tensors, `torch.distributed.ProcessGroupGloo` or `ProcessGroupNCCL`.
        device: Where they are.
        ordered: Whether sums are added up in the order of the ranks, so that a row's bits do not
            depend on the rows beside it. On a CPU that is also the faster way.
    """

    def __init__(
        self, rank: int, size: int, group: Any, device: torch.device, ordered: bool
    ) -> None:
        self.rank, self.size = rank, size
        self._group, self._device, self._ordered = group, device, ordered
        self._given_up = threading.Event()

    @classmethod
    def connect(
        cls, rank: int, size: int, meeting: Path, device: torch.device, ordered: bool = False
    ) -> "TensorParallel":
        """Meet the other ranks of this machine.

        Args:
            rank: See above.
            size: See above.
            meeting: A file of ours alone, in a private directory, that all ranks can write.
            device: This rank's.
            ordered: See above.

        Raises:
            RankDiedError: One of them does not come.
        """
        store = c10d.FileStore(str(meeting), size)
        gloo: Any = distributed.ProcessGroupGloo
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
                group = _nccl(store, rank, size)
                parallel = cls(rank, size, group, device, ordered)
                # Started by now, as none can be any more at the end of a program.
                waiting = (group, parallel._given_up)
                threading.Thread(target=_abort_once, args=waiting, daemon=True).start()
            else:
                options = gloo._Options()
                # Not by the host's name, which need not have an address.
                options._devices = [gloo.create_device(hostname="127.0.0.1")]
                options._timeout = TIMEOUT
                parallel = cls(rank, size, gloo(store, rank, size, options), device, True)
            parallel.wait_for_all()  # NCCL connects at the first call, too late for a graph
        except RuntimeError as e:
            raise RankDiedError(f"tensor-parallel rank {rank} finds no others: {e}") from e
        return parallel

    def part(self, total: int) -> range:
        """This rank's part of so many."""
        return part_of(total, self.rank, self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each; `x` is spent."""
        if not self._ordered:
            options = c10d.AllreduceOptions()
            options.asyncOp = False
            self._wait(self._group.allreduce, [x], options)
            return x
        parts = self._gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def all_gather_columns(self, x: Tensor, width: int) -> Tensor:
        """Put the ranks' columns beside each other.

        Args:
            x: This rank's, `[num_rows, len(self.part(width))]`.
            width: Of all of them together.

        Returns:
            `[num_rows, width]`.
        """
        parts = [part_of(width, rank, self.size) for rank in range(self.size)]
        widest = max(map(len, parts))
        gathered = self._gather(F.pad(x, (0, widest - x.shape[1])))
        columns = zip(gathered, parts, strict=True)
        return torch.cat([part[:, : len(ids)] for part, ids in columns], dim=1)

    def minimum(self, *values: int) -> list[int]:
        """The least that any rank has of each value; waits for all of them."""
        ours = torch.tensor(values, dtype=torch.int64, device=self._device)
        least: list[int] = self._gather(ours).amin(0).tolist()
        return least

    def wait_for_all(self) -> None:
        """Return once all ranks are here."""
        self.minimum(0)

    def abort(self) -> None:
        """Give up what is under way, from any thread: a rank will not answer any more."""
        self._given_up.set()

    def _gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`: `[size, *x.shape]`."""
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        options = c10d.AllgatherOptions()
        options.asyncOp = False
        self._wait(self._group._allgather_base, out.view(-1), x.contiguous().view(-1), options)
        return out

    def _wait(self, call: Any, *args: Any) -> None:
        """Have the group do something; on a GPU only the stream waits for it.

        Raises:
            RankDiedError: A rank is gone.
        """
        try:
            work = call(*args)
            if work is not None:
                work.wait()
        except RuntimeError as e:
            raise RankDiedError(f"tensor-parallel rank {self.rank} lost another one: {e}") from e


def _abort_once(group: Any, given_up: threading.Event) -> None:
    """Abort an NCCL group when it is given up.

    Its kernels end at once, but the call returns only when no CUDA graph is left that holds one of
    them (github.com/vllm-project/vllm/pull/39846); so would the group's destructor. Nobody waits.
    """
    given_up.wait()
    group.abort()


def _nccl(store: Any, rank: int, size: int) -> Any:
    """A group whose own thread does not end the process when a rank is lost."""
    nccl: Any = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = TIMEOUT
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = "0"  # read only where the group is made
    try:
        return nccl(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before
