"""A pool of engine processes: placed, and given requests.

One engine is a pool of one. A request goes to an engine once and stays there; if that engine dies
the request ends with an error that says to try again.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import zmq.asyncio

from nanovllm.cluster.admission import Admission
from nanovllm.cluster.line import Line
from nanovllm.cluster.router import make_router, policy_name
from nanovllm.cluster.stats import WorkerStats
from nanovllm.cluster.supervisor import Supervision, supervise
from nanovllm.cluster.worker import Worker, share_of_cpus
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.engine.block_manager import root_hash
from nanovllm.errors import (
    EngineDeadError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    UnavailableError,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.client import MakeCall, WorkerClient
from nanovllm.worker.load import EngineRequest
from nanovllm.worker.messages import News, Start, Started

QUEUED_PER_RUNNING = 4
MIN_QUEUED_TOKENS = 1 << 20
LEAST_START_TIMEOUT = 120.0
"""Seconds an engine may take to start anew at least; ten times as long as the first one took."""
MAX_DIRECTORY_PATH = 70
"""Characters, so that 107 are enough for the whole path of a socket."""


class PoolListener(Protocol):
    """Who hears what becomes of the requests."""

    def on_news(self, news: News) -> None:
        """An engine ended a step."""

    def on_lost(self, seq_ids: Iterable[int], error: UnavailableError) -> None:
        """These sequences have ended without a result."""

    def on_restarted(self, worker: Worker) -> None:
        """An engine that had died runs again, with an empty cache."""


class EnginePool:
    """The engines of one model, for one event loop.

    Args:
        config: How many there are and whom they serve.
        engine: What each of them is.
        directory: The checkpoint.
        listener: Hears what becomes of the requests.

    Raises:
        InvalidRequestError: `devices` are not those that so many engines need.
    """

    def __init__(
        self,
        config: PoolConfig,
        engine: EngineConfig,
        directory: Path,
        listener: PoolListener,
    ) -> None:
        self.config = config
        self.draining = False
        self.policy = policy_name(config.dispatch_policy)
        self._device_groups = config.device_groups(engine.tensor_parallel_size)
        _check_devices(config, engine)
        self._engine_config = engine
        self._directory = directory
        self._listener = listener
        self._closed = False
        self._router = make_router(self._effective_policy(engine))
        self._workers: list[Worker] = []
        self._line = Line(config.queue_timeout, self._on_expired)
        self._supervisors: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_held = 0
        # The process's own: one of ours would wait, if nobody closes us, for sockets that nobody
        # reads any more, and that in whatever thread the garbage collector runs.
        self._context = zmq.asyncio.Context.shadow(zmq.Context.instance())
        self._sockets = _private_directory()
        self._num_processes = 0
        self._next_seq_id = 0

    @property
    def num_engines(self) -> int:
        return len(self._device_groups)

    @property
    def is_ready(self) -> bool:
        return not self.draining and any(worker.state == "ready" for worker in self._workers)

    @property
    def num_inflight(self) -> int:
        return len(self._line) + sum(worker.num_inflight for worker in self._workers)

    @property
    def num_open_sequences(self) -> int:
        """Completions that run, wait in an engine or stand in line."""
        in_engines = sum(worker.num_open_sequences for worker in self._workers)
        return self._line.num_open_sequences + in_engines

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
            Worker(index, self._make_client(index)) for index in range(self.num_engines)
        ]
        starting = [asyncio.ensure_future(worker.client.start()) for worker in self._workers]
        try:
            started = await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await self.close()
            raise
        supervision = Supervision(
            self._make_client,
            self.config.step_timeout,
            max(LEAST_START_TIMEOUT, 10 * (time.monotonic() - begun)),
            self._on_died,
            self._on_restarted,
        )
        for worker in self._workers:
            worker.state = "ready"
            self._supervisors.append(asyncio.ensure_future(supervise(worker, supervision)))
        return started[0]

    async def close(self, force: bool = False) -> None:
        """End all processes and every open request.

        Args:
            force: Whether to kill the processes without asking them to end.
        """
        self.draining = self._closed = True
        error = NotReadyError("the engines are being shut down")
        lost = self._line.clear()
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        lost += self._line.clear()
        for worker in self._workers:
            lost += worker.client.give_up(error)
        self._lose(lost, error)
        clients = [worker.client for worker in self._workers]
        await asyncio.gather(*(client.kill() if force else client.stop() for client in clients))
        for worker in self._workers:
            worker.state = "dead"
        self._sockets.cleanup()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those in flight have ended.

        Those that follow on one in flight, such as the next sentence of a text, are part of it.

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

    def admission(self) -> Admission:
        """Make what requests that follow one another are admitted by."""
        return Admission(self._hold)

    def admit(
        self, num_sequences: int, num_tokens: int, admission: Admission | None = None
    ) -> None:
        """Check that the queue takes so many more sequences with so many prompt tokens.

        Args:
            num_sequences: How many.
            num_tokens: Of their prompts.
            admission: What they belong to; it is opened. If it is open already they get in.

        Raises:
            InvalidRequestError: They would not fit an empty queue either.
            OverloadedError: They do not fit it now.
            NotReadyError: No engine runs, or the pool is draining.
        """
        if admission is not None and admission.is_open:
            self._check_running()
            return
        self.check_ready()
        self._check_room(num_sequences, num_tokens)
        if admission is not None:
            admission.open()

    def _check_room(self, num_sequences: int, num_tokens: int) -> None:
        ready = [worker.client.started for worker in self.ready_workers if worker.client.started]
        per_engine = ready[0].config.max_num_seqs
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
        waiting += self._line.num_tokens
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
        threshold = self.num_engines if threshold is None else threshold
        ready = [worker.client.started for worker in self.ready_workers if worker.client.started]
        if not self.config.adaptive_max_new_tokens or self.num_inflight <= threshold or not ready:
            return params
        allowed = params.max_tokens or ready[0].max_model_len - num_prompt_tokens
        shorter = int(allowed * self.config.adaptive_max_new_tokens_factor)
        return replace(params, max_tokens=max(shorter, params.min_tokens, 1))

    def submit(self, request: EngineRequest) -> None:
        """Give a request to an engine, or a place in line while the caps are reached."""
        self._idle.clear()
        self._line.append(request)
        self._move_line()
        self._line.watch()

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
        self._line.abort(aborted)
        self._move_line()

    def pause(self, seq_ids: Iterable[int], paused: bool) -> None:
        """Hold sequences back in their engines, or let them go on."""
        seq_ids = list(seq_ids)
        for worker in self._workers:
            worker.client.pause(seq_ids, paused)

    async def call_any(self, make: MakeCall) -> bytes:
        """Have the engine with the least to do answer a call; returns the answer's data.

        Raises:
            NotReadyError: No engine runs, or the pool is draining.
            EngineDeadError: The engine died before it answered.
        """
        self.check_ready()
        least = min(self.ready_workers, key=lambda w: (w.client.num_calls, w.outstanding_tokens))
        return await self._answered(least, make)

    async def call_all(self, make: MakeCall) -> list[bytes]:
        """Have every engine that runs answer a call; returns their answers' data.

        An engine that dies before it answers does not count: another one will take its place.

        Raises:
            NotReadyError: No engine runs, or the pool is draining.
            EngineDeadError: All of them died.
        """
        self.check_ready()
        calls = [self._answered(worker, make) for worker in self.ready_workers]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in errors:
            if not isinstance(error, UnavailableError) or len(errors) == len(calls):
                raise error
        return [answer for answer in answers if isinstance(answer, bytes)]

    def worker_stats(self) -> list[WorkerStats]:
        """Each worker as of now."""
        return [worker.stats() for worker in self._workers]

    async def _answered(self, worker: Worker, make: MakeCall) -> bytes:
        self._idle.clear()
        try:
            return await worker.client.call(make)
        finally:
            self._move_line()

    def check_ready(self) -> None:
        """See that the pool takes anything new.

        Raises:
            NotReadyError: No engine runs, or the pool is draining.
        """
        if self.draining:
            raise NotReadyError("the server is shutting down: send the request to another one")
        self._check_running()

    def _check_running(self) -> None:
        if self._closed:
            raise NotReadyError("the engines are being shut down")
        if not self.ready_workers:
            raise NotReadyError("no engine is running: one is being started", 5.0)

    def _effective_policy(self, engine: EngineConfig) -> str:
        """The policy, but one that hashes no prompts where that is for nothing."""
        if self.num_engines == 1:
            return "round_robin"
        if self.policy == "cache_aware" and not engine.enable_prefix_caching:
            return "least_loaded"
        return self.policy

    def _make_client(self, index: int) -> WorkerClient:
        start = Start(
            self._engine_config,
            str(self._directory),
            self._device_groups[index],
            share_of_cpus(index, self.num_engines),
            self.config.queue_coalesce_ms,
        )
        self._num_processes += 1
        address = Path(self._sockets.name, f"worker-{self._num_processes}")
        return WorkerClient(start, address, self._context, self._on_news)

    def _on_died(self, worker: Worker, lost: list[int], error: UnavailableError) -> None:
        self._lose(lost, error)
        self._router.forget(worker.index)

    def _on_restarted(self, worker: Worker) -> None:
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
        num_calls = sum(worker.client.num_calls for worker in self._workers)
        if not (self.num_open_sequences or num_calls or self._num_held):
            self._idle.set()

    def _hold(self, held: bool) -> None:
        """Have a drain wait for what is still to come, or no more."""
        self._num_held += 1 if held else -1
        if held:
            self._idle.clear()
        else:
            self._move_line()

    def _send(self, request: EngineRequest, worker: Worker) -> None:
        num_cached = self._router.sent(worker, request.keys, self._root(request))
        request.num_prompt_left -= num_cached
        worker.client.add(request)

    def _root(self, request: EngineRequest) -> bytes:
        message = request.message
        return root_hash(str(self._directory), message.adapter_id, message.cache_salt)

    def _on_expired(self, seq_ids: list[int]) -> None:
        waited = f"no engine was free within {self.config.queue_timeout:g} s: try again later"
        self._lose(seq_ids, OverloadedError(waited, reason="timeout"))

    def _lose(self, seq_ids: list[int], error: UnavailableError) -> None:
        """Say that sequences have ended, which nobody has any more."""
        if seq_ids:
            self._listener.on_lost(seq_ids, error)
        self._move_line()

    def _capacity(self, num_running: int) -> int:
        """Completions let in when so many can run at a time."""
        queued = self.config.max_num_queued_reqs
        return num_running + (QUEUED_PER_RUNNING * num_running if queued is None else queued)


def _check_devices(config: PoolConfig, engine: EngineConfig) -> None:
    """See that engines of several devices each do not take the same ones."""
    size = engine.tensor_parallel_size
    if size > 1 and config.devices is None and config.replicas > 1 and engine.device != "cpu":
        raise InvalidRequestError(
            f"{config.replicas} engines of tensor_parallel_size={size} need to know their CUDA "
            f"devices: name {config.replicas * size} of them (devices=), or say device='cpu'",
            "devices",
        )


def _private_directory() -> "tempfile.TemporaryDirectory[str]":
    """A directory for our user alone, with a path short enough for sockets in it."""
    directory = tempfile.gettempdir()
    too_long = len(directory) > MAX_DIRECTORY_PATH
    return tempfile.TemporaryDirectory(prefix="nanovllm-", dir="/tmp" if too_long else directory)
