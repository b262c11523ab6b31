"""What a pool and its engines are doing, as plain data."""

from dataclasses import dataclass

from nanovllm.engine.llm_engine import EngineStats


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker as of now.

    Args:
        index: Its place in the pool.
        state: "starting", "ready" or "dead".
        pid: Of its process.
        num_restarts: Times it was started anew.
        num_inflight: Requests it has.
        num_open_sequences: Their completions that have not ended.
        outstanding_tokens: Positions it has still to compute for them, outputs as far as expected.
        engine: Its engine's counters.
    """

    index: int
    state: str
    pid: int | None
    num_restarts: int
    num_inflight: int
    num_open_sequences: int
    outstanding_tokens: int
    engine: EngineStats

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run: waiting in the engine, or on their way to it."""
        return max(self.num_open_sequences - self.engine.num_running, 0)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool as of now; the averages are over the last `metric_window` finished requests.

    Args:
        dispatch_policy: Who gets the next request.
        workers: One a place.
        num_inflight: Requests taken and not ended, those in line included.
        num_open_sequences: Their completions that have not ended.
        avg_latency_s: Seconds from a request's arrival to its end.
        avg_throughput_tok_s: Output tokens a second of one request.
    """

    dispatch_policy: str
    workers: list[WorkerStats]
    num_inflight: int
    num_open_sequences: int
    avg_latency_s: float
    avg_throughput_tok_s: float

    @property
    def num_running(self) -> int:
        return sum(worker.engine.num_running for worker in self.workers)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run: in line, on their way to an engine, or waiting there."""
        return max(self.num_open_sequences - self.num_running, 0)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that sequences hold."""
        blocks = sum(worker.engine.num_kv_blocks for worker in self.workers)
        return sum(worker.engine.num_used_blocks for worker in self.workers) / max(blocks, 1)
