"""What `AsyncLLM` and `AsyncSpeech` share: engine processes, open requests, and what becomes of
both.
"""

import asyncio
import contextlib
import itertools
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from nanovllm.batch import EngineOutput, Key, SpeechRequest, TextRequest
from nanovllm.cluster.admission import Admission
from nanovllm.cluster.pool import EnginePool
from nanovllm.cluster.stats import PoolStats
from nanovllm.cluster.worker import Worker
from nanovllm.config import EngineConfig, PoolConfig, split_options
from nanovllm.errors import InvalidRequestError, OverloadedError, UnavailableError
from nanovllm.request_stream import EngineStream, Output, OutputT
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_type, conformed
from nanovllm.worker.load import EngineRequest
from nanovllm.worker.messages import AddRequest, News, Started

OutputT_co = TypeVar("OutputT_co", bound=Output, covariant=True)
OutputT_contra = TypeVar("OutputT_contra", bound=Output, contravariant=True)
Result = TypeVar("Result")
Self = TypeVar("Self", bound="AsyncEngine[Any]")


class Observer(Protocol[OutputT_contra]):
    """Who watches the requests, for metrics. Times are monotonic, in seconds."""

    def received(self, output: OutputT_contra, params: SamplingParams) -> None:
        """A request was accepted."""

    def tokens(self, output: OutputT_contra, num_new: int, now: float) -> None:
        """A step brought so many tokens or patches of a request, at least one."""

    def finished(self, output: OutputT_contra) -> None:
        """A request has ended; its outputs have the finish reasons."""

    def rejected(self, reason: str) -> None:
        """A request was refused: "requests", "tokens", "timeout" or "not_ready"."""

    def stepped(self, num_positions: int, now: float) -> None:
        """An engine ended a step of so many positions."""


class Outputs(Protocol[OutputT_co]):
    """The open requests' outputs, which an engine's news make grow."""

    def process(self, news: Iterable[EngineOutput]) -> tuple[Sequence[OutputT_co], list[int]]:
        """Take news; returns the outputs that changed, and sequences to end in the engine."""

    def abort(self, request_id: str) -> list[int]:
        """End a request; returns its sequences that the engine still has."""

    def __len__(self) -> int: ...


class AsyncEngine(ABC, Generic[OutputT]):
    """A model in one or more engine processes, for one event loop.

    It starts at the first use, in the event loop that is running then, and belongs to it.

    Args:
        model: Directory of a checkpoint or id of a hub repository; None is the bundled demo model.
        **options: Fields of `EngineConfig` and `PoolConfig`, by their names or aliases.

    Raises:
        InvalidRequestError: An option cannot be used; the message says why.

    Attributes:
        config: The engine's options; once started, with what was found out filled in.
        max_model_len: Longest prompt plus output; 0 until started.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        engine, pool = split_options({"model": model, **options}, EngineConfig, PoolConfig)
        self._init(engine, pool, None)

    @classmethod
    def from_config(
        cls: type[Self],
        engine: EngineConfig,
        pool: PoolConfig | None = None,
        observer: Observer[Any] | None = None,
    ) -> Self:
        """Build from configs instead of keyword options.

        Args:
            engine: What each engine is.
            pool: How many there are and whom they serve.
            observer: Watches the requests.
        """
        made = cls.__new__(cls)
        made._init(engine, pool or PoolConfig(), observer)
        return made

    def _init(
        self,
        engine: EngineConfig,
        pool: PoolConfig,
        observer: Observer[OutputT] | None,
    ) -> None:
        self.config = engine
        self.pool_config = pool
        self.max_model_len = 0
        self._observer = observer
        self._starting: asyncio.Future[None] | None = None
        self._closed = False
        self._running: _Running[OutputT] | None = None
        # Whoever holds a stream owns its request: one that is dropped is aborted.
        self._streams: WeakValueDictionary[str, EngineStream[OutputT]] = WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()
        self._request_numbers = itertools.count()
        # Drawn here, so that they depend neither on the dispatch nor on an engine's life.
        self._seeds = random.Random(engine.seed % 2**64)
        self._recent: deque[tuple[float, float]] = deque(maxlen=pool.metric_window)

    @abstractmethod
    def _load(self) -> Path:
        """Find the checkpoint and load what this process needs of it, in a thread."""

    @abstractmethod
    def _make_outputs(self, started: Started) -> Outputs[OutputT]:
        """Build what takes the engines' news, now that they run."""

    @abstractmethod
    async def _warm_up(self, worker: Worker) -> None:
        """Prepare an engine that has just started, for the first time or anew."""

    async def start(self) -> None:
        """Load what goes with the model and start the engines; without effect if that is done.

        Raises:
            FileNotFoundError: There is no such model.
            InvalidRequestError: An option or the checkpoint cannot be used.
            NotEnoughMemoryError: The model or its KV cache does not fit.
            RuntimeError: An engine process died, or this is not the loop it was started in.
        """
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed: build a new one")
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        if self._starting.get_loop() is not asyncio.get_running_loop():
            raise RuntimeError(
                f"this {type(self).__name__} belongs to the event loop it was started in: build "
                "one in each"
            )
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        directory = await asyncio.to_thread(self._load)
        pool = EnginePool(self.pool_config, self.config, directory, self)
        started = await pool.start()
        self.config = started.config
        self.max_model_len = started.max_model_len
        self._running = _Running(pool, self._make_outputs(started))
        try:
            for worker in pool.ready_workers:
                await self._warm_up(worker)
        except BaseException:
            await pool.close()
            raise

    async def close(self, force: bool = False) -> None:
        """End the engines and every open request; the object cannot be used afterwards.

        Args:
            force: Whether to kill the engines without asking them to end.
        """
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._starting
        if self._running is not None:
            await self._running.pool.close(force)

    async def __aenter__(self: Self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that run.

        Returns:
            Whether all have ended within `timeout` seconds.
        """
        return self._running is None or await self._running.pool.drain(timeout)

    @property
    def is_ready(self) -> bool:
        return self._running is not None and self._running.pool.is_ready

    @property
    def model_id(self) -> str:
        """What the model is called: its id on the hub, or the name of its directory."""
        return self.config.model_id

    async def abort(self, request_id: str) -> bool:
        """End a request with finish reason "abort"; False if there is none of this name."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._abort(stream.output)
        return stream is not None

    def stats(self) -> PoolStats:
        """The pool as of now."""
        latencies = [latency for latency, _ in self._recent]
        rates = [rate for _, rate in self._recent]
        pool = None if self._running is None else self._running.pool
        return PoolStats(
            self.pool_config.dispatch_policy if pool is None else pool.policy,
            [] if pool is None else pool.worker_stats(),
            0 if pool is None else pool.num_inflight,
            0 if pool is None else pool.num_open_sequences,
            sum(latencies) / max(len(latencies), 1),
            sum(rates) / max(len(rates), 1),
        )

    @property
    def _parts(self) -> "_Running[OutputT]":
        if self._running is None:
            raise RuntimeError("the engines are not running: await start() first")
        return self._running

    def _new_id(self) -> str:
        return f"request-{next(self._request_numbers)}"

    def _admit(
        self,
        names: Sequence[str],
        num_sequences: int,
        num_tokens: int,
        admission: Admission | None = None,
    ) -> None:
        """Check that these requests may be opened; nothing is queued yet.

        With an `admission` they are part of what has been admitted, or open it.

        Raises:
            InvalidRequestError: A name is taken or no string, or the requests would never fit the
                queue.
            OverloadedError: The queue is full.
            NotReadyError: No engine is running.
        """
        for name in names:
            check_type("request_id", name, str, "a string")
        taken = [name for i, name in enumerate(names) if name in self._streams or name in names[:i]]
        if taken:
            raise InvalidRequestError(
                f"a request with the id {taken[0]!r} is still running", "request_id"
            )
        try:
            self._parts.pool.admit(num_sequences, num_tokens, admission)
        except UnavailableError as e:
            if self._observer is not None:
                self._observer.rejected(getattr(e, "reason", e.code))
            raise

    def _pack(
        self,
        keys: Sequence[Key],
        params: SamplingParams,
        payload: TextRequest | SpeechRequest,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter_id: int | None = None,
    ) -> EngineRequest:
        """Make a request that is ready to be sent.

        Raises:
            InvalidRequestError: It has something of a type or size that no engine can be told.
        """
        priority = conformed("priority", priority, int)
        cache_salt = conformed("cache_salt", cache_salt, str | None)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        params = replace(params, seed=seed)
        first = self._parts.pool.reserve(params.n)
        message = AddRequest(first, keys, params, priority, cache_salt, payload, adapter_id)
        try:
            return EngineRequest(message)
        except OverflowError as e:
            raise InvalidRequestError("a number in the request has more than 64 bits") from e
        except UnicodeEncodeError as e:
            raise InvalidRequestError("a text in the request is not valid Unicode") from e

    def _watch(self, stream: EngineStream[OutputT], params: SamplingParams) -> None:
        """Register a request by its stream; the pool does not have it yet."""
        self._streams[stream.output.request_id] = stream
        if self._observer is not None:
            self._observer.received(stream.output, params)

    def on_restarted(self, worker: Worker) -> None:
        """Warm up an engine that runs again; it serves meanwhile."""
        task = asyncio.ensure_future(self._warm_up(worker))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        # It may well die once more, and that is told elsewhere.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def on_news(self, news: News) -> None:
        """Take in what a step has brought, and wake whoever waits for it."""
        now = time.monotonic()
        if self._observer is not None and news.num_positions:
            self._observer.stepped(news.num_positions, now)
        outputs, stopped = self._parts.outputs.process(news.outputs)
        if stopped:
            self._parts.pool.abort(stopped)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # otherwise nobody holds it, and it is about to be aborted
                num_new = stream.wake()
                if num_new and self._observer is not None:
                    self._observer.tokens(output, num_new, now)
            if output.finished:
                self._forget(output)

    def on_lost(self, seq_ids: Iterable[int], error: UnavailableError) -> None:
        """End requests whose sequences are lost; whoever waits for them gets the error."""
        if isinstance(error, OverloadedError) and self._observer is not None:
            self._observer.rejected(error.reason)
        news = [EngineOutput(seq_id, None, None, "error", str(error)) for seq_id in seq_ids]
        for output in self._parts.outputs.process(news)[0]:
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.wake(error)
            self._forget(output)

    def _abort(self, output: OutputT) -> None:
        """End a request that may have ended already."""
        if not output.finished and not self._closed:
            self._parts.pool.abort(self._parts.outputs.abort(output.request_id))
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.wake()
            self._forget(output)

    def _forget(self, output: OutputT) -> None:
        self._streams.pop(output.request_id, None)
        if self._observer is not None:
            self._observer.finished(output)
        metrics = output.metrics
        latency = (metrics.finished_time or time.monotonic()) - metrics.arrival_time
        self._recent.append((latency, output.num_tokens / max(latency, 1e-9)))


@dataclass(frozen=True, slots=True)
class _Running(Generic[OutputT]):
    """What there is once the engines have started."""

    pool: EnginePool
    outputs: Outputs[OutputT]


async def in_thread_if(long: bool, work: Callable[[], Result]) -> Result:
    """Run work here, or in a thread if it takes long."""
    return await asyncio.to_thread(work) if long else work()
