"""`AsyncLLM`: a text model in worker processes, for one event loop."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
    Sized,
)
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

from nanovllm.batch import EngineOutput
from nanovllm.cluster.pool import EnginePool, Worker
from nanovllm.cluster.stats import PoolStats
from nanovllm.config import EngineConfig, PoolConfig, split_options
from nanovllm.errors import (
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    UnavailableError,
)
from nanovllm.models.hub import resolve_model
from nanovllm.outputs import RequestOutput
from nanovllm.request_stream import RequestStream
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.frontend import Message, TextFrontend
from nanovllm.text.input_processor import InputProcessor, Prompt, TextInput
from nanovllm.text.output_processor import OutputProcessor
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.worker.load import EngineRequest
from nanovllm.worker.messages import AddRequest, News

Result = TypeVar("Result")

LONG_TEXT = 4096
"""Characters from which tokenising or rendering goes to a thread; it takes the loop a millisecond
for so many."""
RENDER_TIMEOUT = 2.0
"""Seconds a chat template may take."""


class Observer(Protocol):
    """Who watches the requests, for metrics. Times are monotonic, in seconds."""

    def received(self, output: RequestOutput, params: SamplingParams) -> None:
        """A request was accepted."""

    def tokens(self, output: RequestOutput, num_new: int, now: float) -> None:
        """A step brought so many tokens of a request, at least one."""

    def finished(self, output: RequestOutput) -> None:
        """A request has ended; its outputs have the finish reasons."""

    def rejected(self, reason: str) -> None:
        """A request was refused: "requests", "tokens", "timeout" or "not_ready"."""

    def stepped(self, num_positions: int, now: float) -> None:
        """An engine ended a step of so many positions."""


class AsyncLLM:
    """A text model in one or more engine processes; text is made and read in this one.

    It starts at the first use, in the event loop that is running then, and belongs to it.

    Args:
        model: Directory of a checkpoint or id of a hub repository; None is the bundled demo model.
        **options: Fields of `EngineConfig` and `PoolConfig`, in our names or the family's.

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
        cls,
        engine: EngineConfig,
        pool: PoolConfig | None = None,
        observer: Observer | None = None,
    ) -> "AsyncLLM":
        """Build from configs instead of keyword options."""
        llm = cls.__new__(cls)
        llm._init(engine, pool or PoolConfig(), observer)
        return llm

    def _init(self, engine: EngineConfig, pool: PoolConfig, observer: Observer | None) -> None:
        self.config = engine
        self.pool_config = pool
        self.max_model_len = 0
        self._observer = observer
        self._starting: asyncio.Future[None] | None = None
        self._closed = False
        self._running: _Running | None = None
        # Whoever holds a stream owns its request: one that is dropped is aborted.
        self._streams: WeakValueDictionary[str, RequestStream] = WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()
        self._request_numbers = itertools.count()
        # Drawn here, so that they depend neither on the dispatch nor on an engine's life.
        self._seeds = random.Random(engine.seed)
        self._recent: deque[tuple[float, float]] = deque(maxlen=pool.metric_window)

    async def start(self) -> None:
        """Load the tokenizer and start the engines; without effect if that is done.

        Raises:
            FileNotFoundError: There is no such model.
            InvalidRequestError: An option or the checkpoint cannot be used.
            NotEnoughMemoryError: The model or its KV cache does not fit.
            RuntimeError: An engine process died.
        """
        if self._closed:
            raise RuntimeError("this AsyncLLM is closed: build a new one")
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        directory, frontend = await asyncio.to_thread(self._load_frontend)
        frontend.default_sampling_params()  # a mistake in its file shows now, not in every request
        pool = EnginePool(self.pool_config, self.config, directory, self)
        started = await pool.start()
        self.config = started.config
        self.max_model_len = started.max_model_len
        self._running = _Running(
            pool,
            frontend,
            frontend.input_processor(self.max_model_len),
            frontend.output_processor(),
        )
        try:
            for worker in pool.ready_workers:
                await self._warm_up(worker)
        except BaseException:
            await pool.close()
            raise

    def _load_frontend(self) -> tuple[Path, TextFrontend]:
        directory = resolve_model(self.config)
        return directory, TextFrontend(directory, self.config)

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

    async def __aenter__(self) -> "AsyncLLM":
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

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if self._running is None else self._running.frontend.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """VLLM's defaults, overridden by the checkpoint's `generation_config.json`."""
        return self._parts.frontend.default_sampling_params()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt; yields the output so far whenever there is news of it.

        Leaving the iteration aborts the request.

        Args:
            prompt: Text, token ids, or vLLM's mapping of either.
            sampling_params: What to sample; None is `default_sampling_params()`.
            request_id: A name for `abort`, not that of another open request; None makes one.
            priority: Lower runs first.
            cache_salt: Share cached prefixes only with requests of the same salt.

        Raises:
            InvalidRequestError: The prompt or a parameter cannot be used.
            UnavailableError: The queue is full, or the engine died; try again later.
        """
        await self.start()
        inputs = await self.prepare(prompt, sampling_params or self.default_sampling_params())
        request_ids = None if request_id is None else [request_id]
        (stream,) = await self.submit(
            [inputs], request_ids=request_ids, priority=priority, cache_salt=cache_salt
        )
        try:
            async for output in stream:
                yield output.snapshot()
        finally:
            await stream.aclose()

    async def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt a conversation becomes by the model's chat template.

        Args:
            messages: The conversation.
            **options: See `TextFrontend.render`.

        Raises:
            InvalidRequestError: There is no template, it refuses the conversation, or it takes
                too long.
        """
        size = sum(len(content) for m in messages if isinstance(content := m.get("content"), str))
        work = _in_thread_if(
            size >= LONG_TEXT or len(messages) > 64,
            lambda: self._parts.frontend.render(messages, **options),
        )
        try:
            return await asyncio.wait_for(work, RENDER_TIMEOUT)
        except asyncio.TimeoutError as e:
            raise InvalidRequestError(
                f"the chat template took more than {RENDER_TIMEOUT:g} s: send a shorter "
                "conversation",
                "messages",
            ) from e

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return await _in_thread_if(
            len(text) >= LONG_TEXT, lambda: self._parts.frontend.encode(text, add_special_tokens)
        )

    async def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return await _in_thread_if(
            len(token_ids) >= LONG_TEXT,
            lambda: self._parts.frontend.decode(token_ids, skip_special_tokens),
        )

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True
    ) -> TextInput:
        """Tokenise and check a request; nothing is queued yet.

        Args:
            prompt: Text, token ids, or vLLM's mapping of either.
            params: What to sample.
            add_special_tokens: Whether the tokenizer adds its own to a text; a rendered chat
                template has them already.

        Raises:
            InvalidRequestError: The prompt or a parameter cannot be used with this model.
            ContextLengthError: The prompt leaves no room for an output.
        """
        if self._running is None:  # warming up is part of starting, and comes here, too
            await self.start()
        inputs = self._parts.inputs
        return await _in_thread_if(
            _size(prompt) >= LONG_TEXT,
            lambda: inputs.process(prompt, params, add_special_tokens),
        )

    async def submit(
        self,
        inputs: Sequence[TextInput],
        *,
        request_ids: Sequence[str] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[RequestStream]:
        """Queue prepared requests, all or none.

        Args:
            inputs: What `prepare` returned.
            request_ids: A name for each, not that of another open request; None makes them.
            priority: Lower runs first.
            cache_salt: Share cached prefixes only with requests of the same salt.

        Raises:
            InvalidRequestError: A name is taken, or the requests would never fit the queue.
            OverloadedError: The queue is full.
            NotReadyError: No engine is running.
        """
        pool = self._parts.pool
        names = list(request_ids) if request_ids else [self._new_id() for _ in inputs]
        taken = [name for i, name in enumerate(names) if name in self._streams or name in names[:i]]
        if taken:
            raise InvalidRequestError(
                f"a request with the id {taken[0]!r} is still running", "request_id"
            )
        try:
            pool.admit(sum(i.params.n for i in inputs), sum(len(i.token_ids) for i in inputs))
        except UnavailableError as e:
            if self._observer is not None:
                self._observer.rejected(getattr(e, "reason", e.code))
            raise
        opened = self._open(names, inputs, priority, cache_salt)
        for request, _ in opened:
            pool.submit(request)
        return [stream for _, stream in opened]

    async def abort(self, request_id: str) -> bool:
        """End a request with finish reason "abort"; False if there is none of this name."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._abort(stream.output)
        return stream is not None

    async def warm(self, prompt: Prompt) -> int:
        """Compute a prefix on every engine, so that requests that begin with it find it cached.

        Returns:
            The number of its tokens.

        Raises:
            InvalidRequestError: The prompt cannot be used.
            UnavailableError: No engine is running, or one died.
        """
        item = await self.prepare(prompt, SamplingParams(max_tokens=1))
        pool = self._parts.pool
        if not pool.is_ready:
            raise NotReadyError("no engine takes requests now")
        await asyncio.gather(*(self._compute_on(worker, item) for worker in pool.ready_workers))
        return len(item.token_ids)

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
    def _parts(self) -> "_Running":
        if self._running is None:
            raise RuntimeError("the engines are not running: await start() first")
        return self._running

    def _new_id(self) -> str:
        return f"request-{next(self._request_numbers)}"

    def _open(
        self,
        names: Sequence[str],
        inputs: Sequence[TextInput],
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[tuple[EngineRequest, RequestStream]]:
        """Register requests, all or none; the pool does not have them yet."""
        now = time.monotonic()
        requests = [self._pack(item, priority, cache_salt) for item in inputs]
        opened = []
        for name, item, request in zip(names, inputs, requests, strict=True):
            params = request.message.params
            output = self._parts.outputs.add(
                name, list(request.seq_ids), item.prompt, item.token_ids, params, now
            )
            stream = RequestStream(output, self._abort)
            self._streams[name] = stream
            if self._observer is not None:
                self._observer.received(output, params)
            opened.append((request, stream))
        return opened

    def _pack(self, item: TextInput, priority: int, cache_salt: str | None) -> EngineRequest:
        """Make a request that is ready to be sent."""
        pool = self._parts.pool
        params = pool.adapt(item.params, len(item.token_ids))
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        params = replace(params, seed=seed)
        first = pool.reserve(params.n)
        message = AddRequest(first, item.token_ids, params, priority, cache_salt, item.payload)
        try:
            return EngineRequest(message)
        except OverflowError as e:
            raise InvalidRequestError("a number in the request has more than 64 bits") from e
        except UnicodeEncodeError as e:
            raise InvalidRequestError("a text in the request is not valid Unicode") from e

    async def _warm_up(self, worker: Worker) -> None:
        """Compute the prefixes of the options on one engine."""
        for prefix in (self.pool_config.warm_prefixes or "").split("||"):
            if prefix:
                item = await self.prepare(prefix, SamplingParams(max_tokens=1))
                await self._compute_on(worker, item)

    async def _compute_on(self, worker: Worker, item: TextInput) -> None:
        ((request, stream),) = self._open([self._new_id()], [item])
        self._parts.pool.submit_to(worker, request)
        async for _ in stream:
            pass

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

    def _abort(self, output: RequestOutput) -> None:
        """End a request that may have ended already."""
        if not output.finished and not self._closed:
            self._parts.pool.abort(self._parts.outputs.abort(output.request_id))
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.wake()
            self._forget(output)

    def _forget(self, output: RequestOutput) -> None:
        self._streams.pop(output.request_id, None)
        if self._observer is not None:
            self._observer.finished(output)
        metrics = output.metrics
        latency = (metrics.finished_time or time.monotonic()) - metrics.arrival_time
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self._recent.append((latency, num_tokens / max(latency, 1e-9)))


class _Running(NamedTuple):
    """What there is once the engines have started."""

    pool: EnginePool
    frontend: TextFrontend
    inputs: InputProcessor
    outputs: OutputProcessor


def _size(prompt: Prompt) -> int:
    """Characters or token ids of a prompt; it has not been checked yet."""
    if isinstance(prompt, Mapping):
        return max((_size(part) for part in prompt.values()), default=0)
    return len(prompt) if isinstance(prompt, Sized) else 0


async def _in_thread_if(long: bool, work: Callable[[], Result]) -> Result:
    """Run work here, or in a thread if it takes long."""
    return await asyncio.to_thread(work) if long else work()
