"""What one HTTP request has the engines generate, and how much of it has been sent."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nanovllm.batch import LOST_GRAMMAR, UNUSABLE_LOGITS
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.errors import INTERNAL_ERROR, APIError
from nanovllm.server.state import ServerState
from nanovllm.text.input_processor import Prompt, TextInput

if TYPE_CHECKING:
    from nanovllm.request_stream import RequestStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_AT_ONCE = 64
"""Prompts of one request that the engines are given at a time, where there may be many."""
MAX_CHARS_AT_ONCE = 1 << 18
"""Characters of all these, but for one prompt that is longer."""

MAX_PROMPT_SCORES = 1 << 20
"""Log probabilities of the prompts' tokens in an answer, which are some 30 to 70 MB of JSON."""


class Generation:
    """A stream for each prompt of a request.

    Closing or dropping it aborts what has not ended.

    Args:
        request_id: What the client knows it by.
        streams: One for each prompt, in order.
        hidden: Whether to leave the completions out: only the prompts were asked for.

    Attributes:
        names: All that `/abort` finds it by.
    """

    def __init__(
        self, request_id: str, streams: Sequence["RequestStream"], hidden: bool = False
    ) -> None:
        self.request_id = request_id
        self.names = {request_id}
        self.hidden = hidden
        self._streams = streams
        self.outputs = [stream.output for stream in streams]

    @classmethod
    async def start(
        cls,
        state: ServerState,
        request_id: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        hidden: bool = False,
        embeds: bool = False,
        may_clip: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_name: str | None = None,
    ) -> "Generation":
        """Check all prompts, then queue all of them or none.

        Args:
            state: The server.
            request_id: What the client knows the request by.
            prompts: Texts or token ids.
            params: What to sample for each.
            add_special_tokens: Whether the tokenizer adds its own to texts.
            hidden: See the class.
            embeds: Whether the prompts' embeddings are wanted.
            may_clip: Whether an output may get fewer tokens than `max_tokens` for want of room.
            priority: Lower runs first.
            cache_salt: Share cached prefixes only with requests of the same salt.
            lora_name: A registered adapter; None is none.

        Raises:
            InvalidRequestError: A prompt or a parameter cannot be used, or too much would be told
                of the prompts.
            ContextLengthError: A prompt and its output would not fit the context.
            UnavailableError: The queue is full, or no engine is running.
        """
        inputs = []
        for prompt in prompts:
            item = await state.llm.prepare(
                prompt, params, add_special_tokens=add_special_tokens, embeds=embeds
            )
            check_room(item, state.llm.max_model_len, may_clip)
            inputs.append(item)
            await asyncio.sleep(0)  # many short prompts take long together
        check_scores(inputs)
        # Our own names: two clients, or one that tries again, may send the same X-Request-Id.
        name = uuid.uuid4().hex
        streams = await state.llm.submit(
            inputs,
            request_ids=[f"{name}-{index}" for index in range(len(inputs))],
            priority=priority,
            cache_salt=cache_salt,
            lora_name=lora_name,
        )
        generation = cls(request_id, streams, hidden)
        state.generations.add(generation)
        return generation

    async def news(self) -> AsyncIterator[int]:
        """Yield the index of a prompt whenever there is news of it, until all have ended.

        Raises:
            UnavailableError: The engine has died.
            APIError: A completion could not be computed.
        """
        async for index in _merge(self._streams):
            for completion in self.outputs[index].outputs:
                if completion.finish_reason == "error":
                    raise _failure(self.request_id, str(completion.stop_reason))
            yield index

    async def finish(self) -> None:
        """Wait until all of it is there; raises what `news` does."""
        async for _ in self.news():
            pass

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        return sum(output.num_cached_tokens for output in self.outputs)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, unless nobody asked for them."""
        return 0 if self.hidden else sum(output.num_tokens for output in self.outputs)

    async def abort(self) -> bool:
        """End it; its client gets what there is. False if it has ended already."""
        aborted = [stream.abort() for stream in self._streams]
        return any(aborted)

    async def aclose(self) -> None:
        """Abort what has not ended."""
        for stream in self._streams:
            await stream.aclose()


class RequestInParts:
    """A request of many prompts, of which the engines are given some at a time.

    All at once would fill the queue, and hold the event loop up. Between two parts it can be ended,
    too.

    Args:
        state: The server.
        request_id: What the client knows it by.
    """

    def __init__(self, state: ServerState, request_id: str) -> None:
        self.names = {request_id}
        self._state, self._request_id, self._ended = state, request_id, False
        state.generations.add(self)

    def parts(self, items: Sequence[T], item_chars: int = 0) -> Iterator[Sequence[T]]:
        """Some items at a time, of which there is a prompt for each; `item_chars` long or less."""
        size = min(MAX_AT_ONCE, self._state.llm.config.max_num_seqs or MAX_AT_ONCE)
        size = max(1, min(size, MAX_CHARS_AT_ONCE // max(item_chars, 1)))
        for first in range(0, len(items), size):
            yield items[first : first + size]

    async def run(
        self, prompts: Sequence[Prompt], params: SamplingParams, **options: Any
    ) -> Generation:
        """Give the engines a part, and wait until all of it is there; see `Generation.start`.

        Raises:
            InvalidRequestError: See there, or the request was ended.
            ContextLengthError: See there.
            UnavailableError: See there, or the engine has died.
            APIError: A completion could not be computed.
        """
        self._check()
        name = self._request_id
        run = await Generation.start(self._state, name, prompts, params, hidden=True, **options)
        try:
            await run.finish()
        finally:
            await run.aclose()
        self._ended |= any(output.outputs[0].finish_reason == "abort" for output in run.outputs)
        self._check()
        return run

    async def abort(self) -> bool:
        """End it; its client gets an error."""
        self._ended = True
        return True

    def _check(self) -> None:
        if self._ended:
            raise InvalidRequestError("the request was ended before it was done")


def _failure(request_id: str, reason: str) -> APIError:
    """What a client is told, which is not what an exception in an engine says."""
    if reason == LOST_GRAMMAR:
        return APIError(400, reason)
    logger.error("request %s failed: %s", request_id, reason)
    told = reason if reason == UNUSABLE_LOGITS else INTERNAL_ERROR
    return APIError(500, told, "internal_error")


def check_room(item: TextInput, max_model_len: int, may_clip: bool = False) -> None:
    """Refuse a prompt, or an output behind it, that does not fit the context.

    Args:
        item: The prompt and what to sample.
        max_model_len: The length of the context.
        may_clip: Whether one token of output is enough.

    Raises:
        ContextLengthError: It does not fit.
    """
    num_prompt = len(item.token_ids)
    num_output = 1 if may_clip else max(item.params.max_tokens or 1, item.params.min_tokens)
    num_output = 0 if item.payload.embeds else num_output
    if num_prompt + num_output <= max_model_len:
        return
    raise ContextLengthError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{num_prompt + num_output} tokens ({num_prompt} in the prompt, {num_output} for the "
        "completion): shorten the prompt or ask for fewer tokens.",
        "prompt" if num_prompt >= max_model_len else "max_tokens",
    )


def check_scores(inputs: Sequence[TextInput]) -> None:
    """Refuse more log probabilities of prompts than an answer takes.

    Raises:
        InvalidRequestError: There would be more.
    """
    num_scores = sum(
        item.params.n * len(item.token_ids) * (item.params.prompt_logprobs + 1)
        for item in inputs
        if item.params.prompt_logprobs is not None
    )
    if num_scores > MAX_PROMPT_SCORES:
        params = inputs[0].params
        raise InvalidRequestError(
            f"the answer would have {num_scores} log probabilities of the prompt's tokens: of each "
            f"of them and its {params.prompt_logprobs} alternatives, with each of {params.n} "
            f"completions; it takes {MAX_PROMPT_SCORES}: lower n, prompt_logprobs or, with echo, "
            "logprobs, or send fewer or shorter prompts",
            "n" if params.n > 1 else "prompt",
        )


class Piece(NamedTuple):
    """What has been added to a completion; `logprobs` is None unless they were asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


class Cursor:
    """A completion on its way to a client, and how much of it has been taken.

    It is the only reader of the log probabilities, and leaves none behind: with 20 alternatives
    those of a token are 3 KB.

    Args:
        output: The request.
        completion: One of its completions.
        index: Which of all of an answer's completions it is.
        hidden: Whether to keep what is generated to ourselves.
        by_token: Whether tokens are news even if they add no text yet.
    """

    __slots__ = (
        "_by_token",
        "_hidden",
        "_num_chars",
        "_num_tokens",
        "closed",
        "completion",
        "index",
        "opened",
        "output",
    )

    def __init__(
        self,
        output: RequestOutput,
        completion: CompletionOutput,
        index: int,
        *,
        hidden: bool = False,
        by_token: bool = False,
    ) -> None:
        self.output = output
        self.completion = completion
        self.index = index
        self.opened = False
        self.closed = False
        self._hidden = hidden
        self._by_token = by_token
        self._num_chars = 0
        self._num_tokens = 0

    def take(self) -> Piece | None:
        """Take what has come since the last time; None if there is nothing."""
        completion = self.completion
        num_chars, num_tokens = len(completion.text), len(completion.token_ids)
        more_tokens = self._by_token and num_tokens > self._num_tokens
        if self._hidden or not (num_chars > self._num_chars or more_tokens):
            return None
        logprobs = None
        if completion.logprobs is not None:
            logprobs = completion.logprobs.copy()
            completion.logprobs.clear()
        piece = Piece(
            completion.text[self._num_chars :], completion.token_ids[self._num_tokens :], logprobs
        )
        self._num_chars, self._num_tokens = num_chars, num_tokens
        return piece

    @property
    def finish_reason(self) -> str | None:
        return "length" if self._hidden else self.completion.finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return None if self._hidden else self.completion.stop_reason


async def _merge(streams: Sequence["RequestStream"]) -> AsyncIterator[int]:
    """Yield the index of a stream whenever it has news."""
    if len(streams) == 1:
        async for _ in streams[0]:
            yield 0
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                try:
                    task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
