"""`AsyncLLM`: a text model in worker processes, for one event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanovllm.adapted_engine import AdaptedEngine
from nanovllm.async_engine import Observer, in_thread_if
from nanovllm.cluster.worker import Worker
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.errors import InvalidRequestError, NotReadyError, OverloadedError
from nanovllm.models.hub import resolve_model
from nanovllm.models.model_config import ModelConfig
from nanovllm.outputs import EmbeddingRequestOutput, RequestOutput
from nanovllm.request_stream import RequestStream
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.embeddings import embedding_output
from nanovllm.text.frontend import Message, TextFrontend
from nanovllm.text.input_processor import InputProcessor, Prompt, TextInput
from nanovllm.text.output_processor import OutputProcessor
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.validation import check_type
from nanovllm.worker.load import EngineRequest
from nanovllm.worker.messages import Started

Result = TypeVar("Result")

LONG_TEXT = 4096
"""Characters from which tokenising or rendering goes to a thread; it takes the loop a millisecond
for so many."""
RENDER_TIMEOUT = 2.0
"""Seconds a chat template may take."""
TEXT_THREADS = 2
"""Long texts tokenised at the same time."""
FORM_TIMEOUT = 5.0
"""Seconds until the form of an output is given up; the limits of its compiler end it sooner."""
FORM_THREADS = 2
"""Forms compiled at the same time."""


class AsyncLLM(AdaptedEngine[RequestOutput]):
    """A text model in one or more engine processes; texts are tokenised and detokenised here.

    It starts with the first use, `await start()` or `async with`, and ends with `await close()`.

    Args:
        model: Directory of a checkpoint or id of a hub repository; None is the bundled demo model.
        **options: Fields of `EngineConfig` and `PoolConfig`, by their names or aliases.
    """

    def _init(
        self,
        engine: EngineConfig,
        pool: PoolConfig,
        observer: Observer[RequestOutput] | None,
    ) -> None:
        super()._init(engine, pool, observer)
        self._frontend: TextFrontend | None = None
        self._text: _Text | None = None
        # What a timeout leaves behind goes on in its thread, so their number is what bounds it.
        self._form_threads = ThreadPoolExecutor(FORM_THREADS, "forms")
        self._form_turns = asyncio.Semaphore(FORM_THREADS)
        # Long texts wait for one another: a million characters take a second, and 150 MB.
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, "texts")

    def _load(self) -> Path:
        directory = resolve_model(self.config)
        self._frontend = TextFrontend(directory, self.config)
        # A mistake in its file shows now, not in every request.
        self._frontend.default_sampling_params()
        return directory

    def _make_outputs(self, started: Started) -> OutputProcessor:
        if self._frontend is None:
            raise RuntimeError("the frontend is loaded before the engines start")
        inputs = self._frontend.input_processor(started.max_model_len)
        outputs = self._frontend.output_processor()
        self._text = _Text(self._frontend, inputs, outputs)
        return outputs

    async def _warm_up(self, worker: Worker) -> None:
        """Compute the prefixes of the options on one engine."""
        for prefix in (self.pool_config.warm_prefixes or "").split("||"):
            if prefix:
                item = await self.prepare(prefix, SamplingParams(max_tokens=1))
                await self._compute_on(worker, item)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if self._text is None else self._text.frontend.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        """The model's hyper-parameters; there once it is loaded."""
        return self._started.frontend.model_config

    def default_sampling_params(self) -> SamplingParams:
        """The defaults of vLLM, overridden by the checkpoint's `generation_config.json`."""
        return self._started.frontend.default_sampling_params()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_name: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt; yields the output so far whenever there is news of it.

        Leaving the iteration aborts the request.

        Args:
            prompt: Text, token ids, or vLLM's mapping of either.
            sampling_params: What to sample; None is `default_sampling_params()`.
            request_id: A name for `abort`, not that of another open request; None makes one.
            priority: Lower runs first.
            cache_salt: Share cached prefixes only with requests of the same salt; None is the
                prompt's own `cache_salt`.
            lora_name: A registered adapter; None is none.

        Raises:
            InvalidRequestError: The prompt or a parameter cannot be used.
            UnavailableError: The queue is full, or the engine died; try again later.
        """
        await self.start()
        given = self.default_sampling_params() if sampling_params is None else sampling_params
        inputs = await self.prepare(prompt, given)
        async with self._stream(inputs, request_id, priority, cache_salt, lora_name) as stream:
            async for output in stream:
                yield output.snapshot()

    async def embed(
        self,
        prompt: Prompt,
        request_id: str | None = None,
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_name: str | None = None,
    ) -> EmbeddingRequestOutput:
        """Embed a prompt; see `text/embeddings.py`. Cancelling it aborts the request.

        Args:
            prompt: Text, token ids, or vLLM's mapping of either.
            request_id: See `generate`.
            dimensions: How many numbers of the embedding to keep; None is all.
            truncate_prompt_tokens: Keep so many first tokens of a prompt, and the one that the
                tokenizer ends it with; -1 is as many as fit.
            priority: Lower runs first.
            cache_salt: See `generate`.
            lora_name: A registered adapter; None is none.

        Returns:
            The prompt and its embedding, whose length is 1.

        Raises:
            InvalidRequestError: The prompt cannot be used, or there are not as many numbers.
            UnavailableError: The queue is full, or the engine died; try again later.
            RuntimeError: It was aborted, or could not be computed.
        """
        await self.start()
        params = self.embedding_params(dimensions, truncate_prompt_tokens)
        inputs = await self.prepare(prompt, params, embeds=True)
        async with self._stream(inputs, request_id, priority, cache_salt, lora_name) as stream:
            async for _ in stream:
                pass
        return embedding_output(stream.output, dimensions)

    def embedding_params(
        self, dimensions: int | None = None, truncate_prompt_tokens: int | None = None
    ) -> SamplingParams:
        """What `prepare` takes for embeddings; see `TextFrontend.embedding_params`."""
        return self._started.frontend.embedding_params(dimensions, truncate_prompt_tokens)

    async def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt a conversation becomes by the model's chat template.

        Args:
            messages: The conversation.
            **options: See `TextFrontend.render`.

        Raises:
            InvalidRequestError: There is no template, it refuses the conversation, or it takes
                too long.
        """
        work = in_thread_if(
            not _is_short(messages, options),
            lambda: self._started.frontend.render(messages, **options),
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
        return await self._in_text_thread_if(
            len(text) >= LONG_TEXT, lambda: self._started.frontend.encode(text, add_special_tokens)
        )

    async def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return await in_thread_if(
            len(token_ids) >= LONG_TEXT,
            lambda: self._started.frontend.decode(token_ids, skip_special_tokens),
        )

    async def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        embeds: bool = False,
    ) -> TextInput:
        """Tokenise and check a request; nothing is queued yet.

        Args:
            prompt: Text, token ids, or vLLM's mapping of either.
            params: What to sample.
            add_special_tokens: Whether the tokenizer adds its own to a text; a rendered chat
                template has them already.
            embeds: Whether the prompt's embedding is wanted.

        Raises:
            InvalidRequestError: The prompt or a parameter cannot be used with this model.
            ContextLengthError: The prompt leaves no room for an output.
            OverloadedError: Too many forms are being compiled.
        """
        check_type("sampling_params", params, SamplingParams, "SamplingParams")
        if self._text is None:  # warming up is part of starting, and comes here, too
            await self.start()
        inputs = self._started.inputs

        def process() -> TextInput:
            return inputs.process(prompt, params, add_special_tokens, embeds)

        if params.structured_outputs is not None:
            return await self._in_form_thread(process)
        return await self._in_text_thread_if(_size(prompt) >= LONG_TEXT, process)

    async def submit(
        self,
        inputs: Sequence[TextInput],
        *,
        request_ids: Sequence[str] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_name: str | None = None,
    ) -> list[RequestStream]:
        """Queue prepared requests, all or none.

        Args:
            inputs: What `prepare` returned.
            request_ids: A name for each, not that of another open request; None makes them.
            priority: Lower runs first.
            cache_salt: Share cached prefixes only with requests of the same salt; None is what
                each prompt said.
            lora_name: A registered adapter; None is none.

        Raises:
            InvalidRequestError: A name is taken, the requests would never fit the queue, or there
                is no such adapter.
            OverloadedError: The queue is full.
            NotReadyError: No engine is running.
        """
        names = list(request_ids) if request_ids else [self._new_id() for _ in inputs]
        self._admit(names, sum(i.params.n for i in inputs), sum(len(i.token_ids) for i in inputs))
        opened = self._open(names, inputs, priority, cache_salt, lora_name)
        for request, _ in opened:
            self._parts.pool.submit(request)
        return [stream for _, stream in opened]

    @contextlib.asynccontextmanager
    async def _stream(
        self,
        inputs: TextInput,
        request_id: str | None,
        priority: int,
        cache_salt: str | None,
        lora_name: str | None,
    ) -> AsyncGenerator[RequestStream, None]:
        """One prepared request, queued; aborted at the end if it has not ended by then."""
        (stream,) = await self.submit(
            [inputs],
            request_ids=None if request_id is None else [request_id],
            priority=priority,
            cache_salt=cache_salt,
            lora_name=lora_name,
        )
        try:
            yield stream
        finally:
            await stream.aclose()

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

    async def _in_text_thread_if(self, long: bool, work: Callable[[], Result]) -> Result:
        if not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, work)

    async def _in_form_thread(self, process: Callable[[], TextInput]) -> TextInput:
        """Prepare a request whose output has a form, which may take a while to be compiled.

        A turn is a thread's: one that goes on behind a timeout, or for nobody, keeps it.
        """
        try:
            await asyncio.wait_for(self._form_turns.acquire(), FORM_TIMEOUT)
        except asyncio.TimeoutError as e:
            raise OverloadedError(
                "other requests' structured_outputs are still being compiled: try again",
                reason="timeout",
            ) from e
        work = self._form_threads.submit(process)
        work.add_done_callback(partial(self._end_form_turn, asyncio.get_running_loop()))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), FORM_TIMEOUT)
        except asyncio.TimeoutError as e:
            raise InvalidRequestError(
                f"structured_outputs take more than {FORM_TIMEOUT:g} s to compile: give a "
                "simpler form",
                "structured_outputs",
            ) from e

    def _end_form_turn(self, loop: asyncio.AbstractEventLoop, _: Future[TextInput]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the thread
            loop.call_soon_threadsafe(self._form_turns.release)

    @property
    def _started(self) -> "_Text":
        if self._text is None:
            raise RuntimeError("the engines are not running: await start() first")
        return self._text

    def _open(
        self,
        names: Sequence[str],
        inputs: Sequence[TextInput],
        priority: int = 0,
        cache_salt: str | None = None,
        lora_name: str | None = None,
    ) -> list[tuple[EngineRequest, RequestStream]]:
        """Register requests, all or none; the pool does not have them yet."""
        now = time.monotonic()
        with self._leased(names, lora_name) as adapter_id:
            requests = [self._request(item, priority, cache_salt, adapter_id) for item in inputs]
        opened = []
        for name, item, request in zip(names, inputs, requests, strict=True):
            params = request.message.params
            output = self._started.outputs.add(
                name, list(request.seq_ids), item.prompt, item.token_ids, params, now
            )
            stream = RequestStream(output, self._abort)
            self._watch(stream, params)
            opened.append((request, stream))
        return opened

    def _request(
        self, item: TextInput, priority: int, cache_salt: str | None, adapter_id: int | None
    ) -> EngineRequest:
        params = self._parts.pool.adapt(item.params, len(item.token_ids))
        cache_salt = item.cache_salt if cache_salt is None else cache_salt
        return self._pack(item.token_ids, params, item.payload, priority, cache_salt, adapter_id)

    async def _compute_on(self, worker: Worker, item: TextInput) -> None:
        ((request, stream),) = self._open([self._new_id()], [item])
        self._parts.pool.submit_to(worker, request)
        async for _ in stream:
            pass


class _Text(NamedTuple):
    """What turns text into requests and keys into text, once the engines have started."""

    frontend: TextFrontend
    inputs: InputProcessor
    outputs: OutputProcessor


def _is_short(messages: Any, options: Mapping[str, Any]) -> bool:
    """Whether a conversation is rendered in a millisecond: it is a little text and nothing else."""
    if not isinstance(messages, Sequence):
        return True  # and refused at once
    if len(messages) > 64 or any(options.get(name) for name in ("tools", "documents")):
        return False
    given = [*messages, options.get("chat_template_kwargs") or {}]
    if not all(isinstance(names, Mapping) for names in given):
        return True  # and refused at once
    values = [value for names in given for value in names.values()]
    size = sum(len(value) for value in values if isinstance(value, str))
    return size < LONG_TEXT and all(isinstance(v, str | int | float | None) for v in values)


def _size(prompt: Prompt) -> int:
    """Characters or token ids of a prompt; it has not been checked yet."""
    if isinstance(prompt, Mapping):
        return max((_size(part) for part in prompt.values()), default=0)
    return len(prompt) if isinstance(prompt, Sized) else 0
