"""A pool of engine processes: placed, watched, started anew, and given requests.

One engine is a pool of one. A request goes to an engine once and stays there; if that engine dies
the request ends with an error that says to try again.
"""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import zmq.asyncio

from nanovllm.cluster.router import make_router, policy_name
from nanovllm.cluster.stats import WorkerStats
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.engine.block_manager import root_hash
from nanovllm.errors import (
    EngineDeadError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    UnavailableError,
)
from nanovllm.kernels.cpu.threads import usable_cpus
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.client import WorkerClient
from nanovllm.worker.load import EngineRequest
from nanovllm.worker.messages import News, Start, Started

logger = logging.getLogger(__name__)

QUEUED_PER_RUNNING = 4
MIN_QUEUED_TOKENS = 1 << 20
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
"""Seconds before an engine is started anew; doubled each time it does not come up."""
LEAST_START_TIMEOUT = 120.0
"""Seconds an engine may take to start anew at least; ten times as long as the first one took."""
MAX_DIRECTORY_PATH = 70
"""Characters, so that 107 are enough for the whole path of a socket."""
STABLE_AFTER = 60.0
"""Seconds after which an engine's death no longer counts as the same trouble as the last one."""


class PoolListener(Protocol):
    """Who hears what becomes of the requests."""

    def on_news(self, news: News) -> None:
        """An engine ended a step."""

    def on_lost(self, seq_ids: Iterable[int], error: UnavailableError) -> None:
        """These sequences have ended without a result."""

    def on_restarted(self, worker: "Worker") -> None:
        """An engine that had died runs again, with an empty cache."""


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
        return 1 if started is None else started.config.block_size or 1

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


class EnginePool:
    """The engines of one model, for one event loop.

    Args:
        config: How many there are and whom they serve.
        engine: What each of them is.
        directory: The checkpoint.
        listener: Hears what becomes of the requests.
    """

    def __init__(
        self, config: PoolConfig, engine: EngineConfig, directory: Path, listener: PoolListener
    ) -> None:
        self.config = config
        self.draining = False
        self.policy = policy_name(config.dispatch_policy)
        self._engine_config = engine
        self._directory = directory
        self._listener = listener
        self._router = make_router(self._effective_policy(engine))
        self._workers: list[Worker] = []
        self._line: deque[EngineRequest] = deque()
        self._supervisors: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._context = zmq.asyncio.Context()
        self._sockets = _private_directory()
        self._num_processes = 0
        self._expiry: asyncio.TimerHandle | None = None
        self._start_timeout = LEAST_START_TIMEOUT
        self._next_seq_id = 0

    @property
    def is_ready(self) -> bool:
        return not self.draining and any(worker.state == "ready" for worker in self._workers)

    @property
    def num_inflight(self) -> int:
        return len(self._line) + sum(worker.num_inflight for worker in self._workers)

    @property
    def num_open_sequences(self) -> int:
        """Completions that run, wait in an engine or stand in line."""
        in_line = sum(request.num_open for request in self._line)
        return in_line + sum(worker.num_open_sequences for worker in self._workers)

    @property
    def ready_workers(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.state == "ready"]

    async def start(self) -> Started:
        """Start all engines and wait until they are ready.

        Returns:
            What the first of them tells of itself; they are alike.

        Raises:
            InvalidRequestError: The options or the checkpoint cannot be used.
            NotEnoughMemoryError: The engines do not fit.
            RuntimeError: A process died.
        """
        begun = time.monotonic()
        self._workers = [
            Worker(index, self._make_client(index)) for index in range(self.config.num_engines)
        ]
        starting = [asyncio.ensure_future(worker.client.start()) for worker in self._workers]
        try:
            started = await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await self.close()
            raise
        self._start_timeout = max(LEAST_START_TIMEOUT, 10 * (time.monotonic() - begun))
        for worker in self._workers:
            worker.state = "ready"
            self._supervisors.append(asyncio.ensure_future(self._supervise(worker)))
        return started[0]

    async def close(self, force: bool = False) -> None:
        """End all processes and every open request.

        Args:
            force: Whether to kill the processes without asking them to end.
        """
        self.draining = True
        if self._expiry is not None:
            self._expiry.cancel()
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        lost = [seq_id for request in self._line for seq_id in request.seq_ids]
        self._line.clear()
        for worker in self._workers:
            lost += worker.client.give_up()
        self._lose(lost, NotReadyError("the engines are being shut down"))
        clients = [worker.client for worker in self._workers]
        await asyncio.gather(*(client.kill() if force else client.stop() for client in clients))
        for worker in self._workers:
            worker.state = "dead"
        self._context.term()
        self._sockets.cleanup()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those in flight have ended.

        Returns:
            Whether all have ended within `timeout` seconds.
        """
        self.draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self._idle.is_set()

    def reserve(self, num_sequences: int) -> int:
        """Hand out ids for so many sequences; returns the first."""
        first = self._next_seq_id
        self._next_seq_id += num_sequences
        return first

    def admit(self, num_sequences: int, num_tokens: int) -> None:
        """Check that the queue takes so many more sequences with so many prompt tokens.

        Raises:
            InvalidRequestError: They would not fit an empty queue either.
            OverloadedError: They do not fit it now.
            NotReadyError: No engine runs, or the pool is draining.
        """
        ready = [worker.client.started for worker in self.ready_workers if worker.client.started]
        if self.draining:
            raise NotReadyError("the server is shutting down: send the request to another one")
        if not ready:
            raise NotReadyError("no engine is running: one is being started", 5.0)
        per_engine = ready[0].config.max_num_seqs or 1
        most = self._capacity(per_engine * len(self._workers))
        if num_sequences > most:
            raise InvalidRequestError(
                f"the request asks for {num_sequences} completions and this server takes at most "
                f"{most} at a time: ask for fewer",
                "n",
            )
        if self.num_open_sequences + num_sequences > self._capacity(per_engine * len(ready)):
            raise OverloadedError(
                f"{self.num_open_sequences} completions are running or waiting and the queue is "
                "full: try again later",
                reason="requests",
            )
        waiting = sum(worker.client.load.waiting_tokens for worker in self._workers)
        waiting += sum(len(request.keys) for request in self._line)
        limit = self.config.max_num_queued_tokens
        if limit is None:
            limit = max(MIN_QUEUED_TOKENS, 8 * ready[0].max_model_len)
        if waiting and waiting + num_tokens > limit:
            raise OverloadedError(
                f"{waiting} prompt tokens are waiting and the queue is full: try again later",
                reason="tokens",
            )

    def adapt(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Allow a request less output while many are in flight, if that is wanted."""
        threshold = self.config.adaptive_max_inflight_threshold
        threshold = self.config.num_engines if threshold is None else threshold
        ready = [worker.client.started for worker in self.ready_workers if worker.client.started]
        if not self.config.adaptive_max_new_tokens or self.num_inflight <= threshold or not ready:
            return params
        allowed = params.max_tokens or ready[0].max_model_len - num_prompt_tokens
        shorter = int(allowed * self.config.adaptive_max_new_tokens_factor)
        return replace(params, max_tokens=max(shorter, params.min_tokens, 1))

    def submit(self, request: EngineRequest) -> None:
        """Give a request to an engine, or a place in line while the caps are reached."""
        self._idle.clear()
        request.deadline = time.monotonic() + self.config.queue_timeout
        self._line.append(request)
        self._move_line()
        if self._line and self._expiry is None:
            self._expire()

    def submit_to(self, worker: Worker, request: EngineRequest) -> None:
        """Give a request to this engine, past the line.

        Raises:
            EngineDeadError: It does not run.
        """
        if worker.state != "ready":
            raise EngineDeadError("the engine does not run")
        self._idle.clear()
        self._send(request, worker)

    def abort(self, seq_ids: Iterable[int]) -> None:
        """End sequences that nobody waits for any more."""
        aborted = set(seq_ids)
        for worker in self._workers:
            worker.client.abort(aborted)
        for request in [request for request in self._line if aborted & set(request.seq_ids)]:
            request.num_open -= len(aborted & set(request.seq_ids))
            if not request.num_open:
                self._line.remove(request)
        self._move_line()

    def worker_stats(self) -> list[WorkerStats]:
        """Each worker as of now."""
        return [worker.stats() for worker in self._workers]

    def _effective_policy(self, engine: EngineConfig) -> str:
        """The policy, but one that hashes no prompts where that is for nothing."""
        if self.config.num_engines == 1:
            return "round_robin"
        if self.policy == "cache_aware" and not engine.enable_prefix_caching:
            return "least_loaded"
        return self.policy

    def _make_client(self, index: int) -> WorkerClient:
        devices = self.config.devices
        start = Start(
            self._engine_config,
            str(self._directory),
            None if devices is None else devices[index],
            share_of_cpus(index, self.config.num_engines),
            self.config.queue_coalesce_ms,
        )
        self._num_processes += 1
        address = Path(self._sockets.name, f"worker-{self._num_processes}")
        return WorkerClient(start, address, self._context, self._on_news)

    async def _supervise(self, worker: Worker) -> None:
        """Watch a worker for ever; when its process dies, end its requests and start another."""
        backoff = FIRST_BACKOFF
        while True:
            started = time.monotonic()
            ending = await worker.client.run(self.config.step_timeout)
            worker.state = "dead"
            lost = worker.client.give_up()
            logger.error(
                "engine %d died (%s) with %d sequences; another one is started",
                worker.index,
                ending,
                len(lost),
            )
            # Whoever waits must not wait for a process that is stuck to be reaped.
            self._lose(lost, EngineDeadError("the engine died while it worked on this; try again"))
            self._router.forget(worker.index)
            await worker.client.kill()
            if time.monotonic() - started > STABLE_AFTER:
                backoff = FIRST_BACKOFF
            while worker.state != "ready":
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, LAST_BACKOFF)
                await self._restart(worker)

    async def _restart(self, worker: Worker) -> None:
        worker.num_restarts += 1
        worker.state = "starting"
        worker.client = self._make_client(worker.index)
        try:
            await asyncio.wait_for(worker.client.start(), self._start_timeout)
        except Exception as e:  # noqa: BLE001  # whatever it is, the next attempt may succeed
            reason = str(e) or f"not within {self._start_timeout:g} s"
            logger.error("engine %d does not start: %s", worker.index, reason)
            worker.state = "dead"
            await worker.client.kill()
        else:
            logger.info("engine %d runs again", worker.index)
            worker.state = "ready"
            self._listener.on_restarted(worker)
            self._move_line()

    def _on_news(self, news: News) -> None:
        self._listener.on_news(news)
        self._move_line()

    def _move_line(self) -> None:
        """Hand requests in line to engines as far as the caps allow."""
        config = self.config
        while self._line:
            if 0 < config.max_inflight_total <= self.num_inflight - len(self._line):
                return
            targets = [
                worker
                for worker in self.ready_workers
                if not config.max_inflight_per_engine
                or worker.num_inflight < config.max_inflight_per_engine
            ]
            if not targets:
                return
            request = self._line.popleft()
            worker = self._router.pick(targets, request.keys, self._root(request))
            self._send(request, worker)
        if not self.num_open_sequences:
            self._idle.set()

    def _send(self, request: EngineRequest, worker: Worker) -> None:
        num_cached = self._router.sent(worker, request.keys, self._root(request))
        request.num_prompt_left -= num_cached
        worker.client.add(request)

    def _root(self, request: EngineRequest) -> bytes:
        return root_hash(str(self._directory), None, request.message.cache_salt)

    def _expire(self) -> None:
        """Refuse the requests that have waited in line for too long, now and when it is time."""
        now = time.monotonic()
        expired: list[int] = []
        while self._line and self._line[0].deadline <= now:
            expired += self._line.popleft().seq_ids
        self._expiry = None
        if self._line:
            delay = self._line[0].deadline - now
            self._expiry = asyncio.get_running_loop().call_later(delay, self._expire)
        waited = f"no engine was free within {self.config.queue_timeout:g} s: try again later"
        self._lose(expired, OverloadedError(waited, reason="timeout"))

    def _lose(self, seq_ids: list[int], error: UnavailableError) -> None:
        """Say that sequences have ended, which nobody has any more."""
        if seq_ids:
            self._listener.on_lost(seq_ids, error)
        self._move_line()

    def _capacity(self, num_running: int) -> int:
        """Completions let in when so many can run at a time."""
        queued = self.config.max_num_queued_reqs
        return num_running + (QUEUED_PER_RUNNING * num_running if queued is None else queued)


def share_of_cpus(index: int, num_shares: int) -> list[int] | None:
    """The CPUs of one of several engines that share this machine; None for a single one.

    With fewer CPUs than engines some engines share one.
    """
    cpus = usable_cpus()
    if num_shares == 1 or not cpus:
        return None
    first, last = (len(cpus) * i // num_shares for i in (index, index + 1))
    return cpus[first:last] or [cpus[index % len(cpus)]]


def _private_directory() -> "tempfile.TemporaryDirectory[str]":
    """A directory for our user alone, with a path short enough for sockets in it."""
    directory = tempfile.gettempdir()
    too_long = len(directory) > MAX_DIRECTORY_PATH
    return tempfile.TemporaryDirectory(prefix="nanovllm-", dir="/tmp" if too_long else directory)
