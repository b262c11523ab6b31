"""`LLM`: a text model in this process."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch

from nanovllm.batch import Key
from nanovllm.config import EngineConfig
from nanovllm.interrupts import interrupts_held_back
from nanovllm.local_adapters import LocalAdapters, LoRARequests
from nanovllm.lora_config import LoRARequest
from nanovllm.models.hub import resolve_model
from nanovllm.models.model_config import ModelConfig
from nanovllm.outputs import EmbeddingRequestOutput, RequestOutput
from nanovllm.progress import progress_bar
from nanovllm.runners.text import TextRunner
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.batches import as_batch, as_conversations, params_for_each, priority_for_each
from nanovllm.text.embeddings import embedding_output
from nanovllm.text.frontend import Message, TextFrontend
from nanovllm.text.input_processor import Prompt
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.worker.loading import load_engine

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _alone(
    method: Callable[Concatenate["LLM", Parameters], Result],
) -> Callable[Concatenate["LLM", Parameters], Result]:
    """Refuse a call once the LLM is closed, or while another thread makes one."""

    @wraps(method)
    def call(self: "LLM", /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._turn():
            if self._closed:
                raise RuntimeError("this LLM is closed: build a new one")
            return method(self, *args, **kwargs)

    return call


class LLM:
    """A text model, its engine and its tokenizer in this process, for one thread at a time.

    A call that meets another thread's is refused with a `RuntimeError`; `AsyncLLM` takes many.

    Args:
        model: Directory of a checkpoint or id of a hub repository; None is the bundled demo model.
        **options: Fields of `EngineConfig`, by their names or aliases.

    Raises:
        InvalidRequestError: An option or the checkpoint cannot be used; the message says why.
        FileNotFoundError: There is no such model.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._start(EngineConfig.from_options(model=model, **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        """Build from a config instead of keyword options."""
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        directory = resolve_model(config)
        self._frontend = TextFrontend(directory, config)
        self.engine, runner, self.config = load_engine(config, directory, self._frontend.grammars)
        self._runner = cast(TextRunner, runner)
        self._adapters = LocalAdapters(self.engine, self._runner.adapters)
        self._inputs = self._frontend.input_processor(self._runner.max_model_len)
        self._outputs = self._frontend.output_processor()
        self._request_ids = itertools.count()
        self._news: dict[str, RequestOutput] = {}
        self._closed = False
        self._in_use = threading.RLock()
        self._dropped = deque[str]()  # requests to abort, of streams that went beside a call

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._frontend.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self._frontend.model_config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched as the engine sees fit.

        Args:
            prompts: One prompt or several, each text, token ids or vLLM's mapping of either.
            sampling_params: One for all or one for each; None is `default_sampling_params()`.
            use_tqdm: Whether to show progress.
            lora_request: An adapter for all or one for each; None is none.
            priority: One for each prompt, of which lower ones run first; None is 0 for all.

        Returns:
            One output a prompt, in order.

        Raises:
            InvalidRequestError: A prompt or a parameter cannot be used; nothing has been started.
        """
        batch = as_batch(prompts)
        params = self._params_for(sampling_params, len(batch))
        return self._run(batch, params, lora_request, use_tqdm, True, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several.

        Args:
            messages: A list of messages, or a list of such lists.
            sampling_params: See `generate`.
            use_tqdm: Whether to show progress.
            lora_request: See `generate`.
            **template_options: See `render`.

        Returns:
            One output a conversation, in order.

        Raises:
            InvalidRequestError: The model has no chat template, or it refuses the messages.
        """
        prompts: list[Prompt] = [
            self.render(conversation, **template_options)
            for conversation in as_conversations(messages)
        ]
        params = self._params_for(sampling_params, len(prompts))
        return self._run(prompts, params, lora_request, use_tqdm, False)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        dimensions: int | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embed prompts, batched as the engine sees fit; see `text/embeddings.py`.

        Args:
            prompts: See `generate`.
            dimensions: How many numbers of an embedding to keep; None is all.
            use_tqdm: See `generate`.
            lora_request: See `generate`.
            truncate_prompt_tokens: Keep so many first tokens of a prompt, and the one that the
                tokenizer ends it with; -1 is as many as fit.

        Returns:
            One output a prompt, in order; embeddings have the length 1.

        Raises:
            InvalidRequestError: A prompt cannot be used, or there are not as many numbers; nothing
                has been started.
            RuntimeError: One could not be computed.
        """
        batch = as_batch(prompts)
        params = self._frontend.embedding_params(dimensions, truncate_prompt_tokens)
        outputs = self._run(batch, [params] * len(batch), lora_request, use_tqdm, True, embeds=True)
        return [embedding_output(output, dimensions) for output in outputs]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> "RequestStream":
        """Complete one prompt; the iterator yields the output so far after each step with news.

        Closing or dropping the iterator aborts the request.
        """
        with interrupts_held_back():  # until the stream knows what it has to abort
            return RequestStream(
                self, *self._add(prompt, sampling_params, lora_request=lora_request)
            )

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        **template_options: Any,
    ) -> "RequestStream":
        """Answer one conversation and yield like `stream`."""
        prompt = self.render(messages, **template_options)
        with interrupts_held_back():
            return RequestStream(
                self,
                *self._add(
                    prompt, sampling_params, lora_request=lora_request, add_special_tokens=False
                ),
            )

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> str:
        """Queue a request; `step` brings its news.

        Args:
            prompt: Text, token ids or vLLM's mapping of either.
            sampling_params: What to sample.
            priority: Lower runs first.
            cache_salt: Share cached prefixes only with requests of the same salt; None is the
                prompt's own `cache_salt`.
            add_special_tokens: Whether the tokenizer adds its own to a text.
            lora_request: The adapter it goes through; None is none.

        Returns:
            The request's id.

        Raises:
            InvalidRequestError: The prompt or a parameter cannot be used.
        """
        request_id, _ = self._add(
            prompt,
            sampling_params,
            priority=priority,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
            lora_request=lora_request,
        )
        return request_id

    @_alone
    def step(self) -> list[RequestOutput]:
        """Run the engine one step.

        Returns:
            Every request with news, as it stands now; it is updated in place by later steps.
        """
        self._advance()
        news, self._news = self._news, {}
        return list(news.values())

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; without effect if it has ended."""
        with self._turn(), interrupts_held_back():
            if self._closed:
                return
            self._news.pop(request_id, None)
            for seq_id in self._outputs.abort(request_id):
                self.engine.abort(seq_id)

    def has_unfinished(self) -> bool:
        """Whether any request still runs or waits, or has news to report."""
        return not self._closed and (self.engine.has_unfinished or bool(self._news))

    def is_finished(self) -> bool:
        """The opposite of `has_unfinished`, under nano-vllm's name."""
        return not self.has_unfinished()

    @_alone
    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter before a request names it; False if it is there already.

        Raises:
            InvalidRequestError: It cannot be loaded, or another one has its id.
        """
        return self._adapters.add(lora_request)

    @_alone
    def remove_lora(self, lora_int_id: int) -> bool:
        """Forget an adapter, so that another one may have its id; False if it is not known.

        Raises:
            InvalidRequestError: A request still uses it.
        """
        return self._adapters.remove(lora_int_id)

    @_alone
    def list_loras(self) -> set[int]:
        """Ids of the adapters that are loaded."""
        return self._adapters.ids

    def default_sampling_params(self) -> SamplingParams:
        """The defaults of vLLM, overridden by the checkpoint's `generation_config.json`."""
        return self._frontend.default_sampling_params()

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt a conversation becomes by the model's chat template.

        Args:
            messages: The conversation.
            **options: See `TextFrontend.render`.

        Raises:
            InvalidRequestError: There is no template, or it refuses the conversation.
        """
        return self._frontend.render(messages, **options)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._frontend.encode(text, add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._frontend.decode(token_ids, skip_special_tokens)

    def close(self) -> None:
        """Free the model and the KV cache; the object cannot be used afterwards."""
        with self._turn():
            if self._closed:
                return
            self._closed = True
            self._runner.close()
            del self.engine, self._runner, self._adapters
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @_alone
    def _add(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        lora_request: LoRARequest | None = None,
        embeds: bool = False,
    ) -> tuple[str, RequestOutput]:
        """Register a request whole or not at all; returns its id and its live output."""
        arrival_time = time.monotonic()
        (params,) = self._params_for(sampling_params, 1)
        inputs = self._inputs.process(prompt, params, add_special_tokens, embeds)
        adapter_id = self._adapters.id_of(lora_request)
        request_id = str(next(self._request_ids))
        seq_ids: list[int] = []
        try:
            with interrupts_held_back():
                seq_ids += self.engine.add(
                    list[Key](inputs.token_ids),
                    inputs.params,
                    priority=priority,
                    cache_salt=inputs.cache_salt if cache_salt is None else cache_salt,
                    adapter_id=adapter_id,
                    schedules_ahead=inputs.payload.grammar is None,
                    payload=inputs.payload,
                )
                output = self._outputs.add(
                    request_id,
                    seq_ids,
                    inputs.prompt,
                    inputs.token_ids,
                    inputs.params,
                    arrival_time,
                )
        except BaseException:  # Ctrl-C too: nobody would know of the request
            self._outputs.abort(request_id)
            for seq_id in seq_ids:
                self.engine.abort(seq_id)
            raise
        return request_id, output

    @_alone
    def _run(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams],
        lora_request: LoRARequests,
        show_progress: bool,
        add_special_tokens: bool,
        priority: Sequence[int] | None = None,
        embeds: bool = False,
    ) -> list[RequestOutput]:
        """Add requests and step until all have ended; whatever happens, none is left behind."""
        loras = self._adapters.for_each(lora_request, len(prompts))
        priorities = priority_for_each(priority, len(prompts))
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, param, lora, precedence in zip(
                prompts, params, loras, priorities, strict=True
            ):
                with interrupts_held_back():  # until we know what we have to abort
                    request_id, output = self._add(
                        prompt,
                        param,
                        priority=precedence,
                        lora_request=lora,
                        add_special_tokens=add_special_tokens,
                        embeds=embeds,
                    )
                    outputs[request_id] = output
            unfinished = set(outputs)
            with (
                interrupts_held_back(),  # once for all steps: each by itself would take 10 us
                progress_bar(len(outputs), self.engine.stats, show_progress) as advance_to,
            ):
                while unfinished:
                    self._advance()
                    for request_id in unfinished & self._news.keys():
                        if self._news.pop(request_id).finished:
                            unfinished.remove(request_id)
                    advance_to(len(outputs) - len(unfinished))
        finally:
            with interrupts_held_back():  # a second Ctrl-C
                for request_id in outputs:
                    self.abort(request_id)
        return list(outputs.values())

    @_alone
    def _wait_for_news(self, request_id: str, output: RequestOutput) -> RequestOutput:
        """Step until a request has news or has ended; returns how it stands then."""
        while not output.finished and request_id not in self._news:
            self._advance()
        self._news.pop(request_id, None)
        return output.snapshot()

    def _advance(self) -> None:
        """Run one step and keep its news until whoever asked for them takes them."""
        while self._dropped:
            self.abort(self._dropped.popleft())
        with interrupts_held_back():  # but for the runner, which the engine lets them interrupt
            outputs, stopped = self._outputs.process(self.engine.step())
            for seq_id in stopped:
                self.engine.abort(seq_id)
            for output in outputs:
                self._news[output.request_id] = output

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        return params_for_each(
            self.default_sampling_params() if given is None else given, num_prompts
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep other threads out, or be kept out by one.

        Raises:
            RuntimeError: Another thread is in.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "another thread is using this LLM: give each thread one of its own, or use AsyncLLM"
            )
        try:
            yield
        finally:
            self._in_use.release()


class RequestStream(Iterator[RequestOutput]):
    """The outputs of one request as they grow; ends with the finished one.

    It waits on the request itself, so that aborting it elsewhere, or stepping the engine, ends the
    stream too.
    """

    def __init__(self, llm: LLM, request_id: str, output: RequestOutput) -> None:
        self._llm, self._request_id, self._output = llm, request_id, output
        self._ended = False

    def __next__(self) -> RequestOutput:
        if self._ended:
            raise StopIteration
        output = self._llm._wait_for_news(self._request_id, self._output)
        self._ended = output.finished
        return output

    def close(self) -> None:
        """Abort the request, unless it has ended."""
        self._llm.abort(self._request_id)
        self._ended = True

    def __del__(self) -> None:
        try:
            self.close()
        except RuntimeError:  # another thread is at work, and will see to it
            self._llm._dropped.append(self._request_id)
