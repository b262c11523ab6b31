"""A place in the pool, and its share of the machine."""

from nanovllm.cluster.stats import WorkerStats
from nanovllm.kernels.cpu.threads import usable_cpus
from nanovllm.worker.client import WorkerClient


class Worker:
    """A place in the pool, and the engine process that fills it."""

    def __init__(self, index: int, client: WorkerClient) -> None:
        self.index = index
        self.client = client
        self.state = "starting"
        self.num_restarts = 0

    @property
    def num_inflight(self) -> int:
        return self.client.load.num_inflight

    @property
    def num_open_sequences(self) -> int:
        return len(self.client.load.sequences)

    @property
    def outstanding_tokens(self) -> int:
        return self.client.load.outstanding_tokens

    @property
    def num_kv_blocks(self) -> int:
        return 0 if self.client.started is None else self.client.started.num_kv_blocks

    @property
    def block_size(self) -> int:
        started = self.client.started
        return 1 if started is None else started.config.block_size

    def stats(self) -> WorkerStats:
        return WorkerStats(
            self.index,
            self.state,
            self.client.pid,
            self.num_restarts,
            self.num_inflight,
            self.num_open_sequences,
            self.outstanding_tokens,
            self.client.stats,
        )


def share_of_cpus(index: int, num_shares: int) -> list[int] | None:
    """The CPUs of one of several engines that share this machine; None for a single one.

    With fewer CPUs than engines some engines share one.
    """
    cpus = usable_cpus()
    if num_shares == 1 or not cpus:
        return None
    first, last = (len(cpus) * i // num_shares for i in (index, index + 1))
    return cpus[first:last] or [cpus[index % len(cpus)]]
