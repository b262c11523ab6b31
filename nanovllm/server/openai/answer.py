"""What the two kinds of answer have in common: how they are sent."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec
from fastapi import Request

from nanovllm import __version__
from nanovllm.server.chat.checks import form_asked_for_by
from nanovllm.server.chat.logprobs import TokenNames
from nanovllm.server.errors import APIError
from nanovllm.server.openai.requests import GenerationRequest
from nanovllm.server.openai.responses import Usage
from nanovllm.server.request_id import request_id
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import DONE, WholeOrStream, encode, event

Choice = Mapping[str, Any]


class Run(Protocol):
    """What is generated for a request."""

    async def aclose(self) -> None:
        """Abort what has not ended."""


RunT = TypeVar("RunT", bound=Run)


class Answer(WholeOrStream, Generic[RunT]):
    """The answer to one request, sent whole or in chunks.

    A choice is one completion; its chunks are an opening, what is added to it, and a closing with
    the reason why it ends.

    Args:
        request: What is asked.
        http: The connection it came by.
        state: The server.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request: GenerationRequest, http: Request, state: ServerState) -> None:
        state.check_model(request.model or None)
        name = request_id(http.headers, request.request_id)
        super().__init__(http, state, name, streams=bool(request.stream))
        self.request = request
        self.names = TokenNames(state.llm.tokenizer, bool(request.return_tokens_as_token_ids))
        options = request.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._head = {
            "id": f"{self.id_prefix}-{self.request_id}",
            "object": self.chunk_object if request.stream else self.whole_object,
            "created": int(time.time()),
            "model": state.answering_name(request.model or None),
            "system_fingerprint": f"nanovllm-{__version__}",
        }

    def error_event(self, error: APIError) -> bytes:
        return event(error.body()) + DONE

    @abstractmethod
    async def start(self) -> RunT:
        """Check the request and queue it."""

    @abstractmethod
    def choices(self, run: RunT) -> AsyncIterator[Choice]:
        """Wait for all of them, and yield the whole choices."""

    @abstractmethod
    def chunks(self, run: RunT) -> AsyncIterator[Iterable[Choice]]:
        """Yield what is added to choices, as it comes."""

    @abstractmethod
    def usage(self, run: RunT) -> Usage:
        """Tokens so far."""

    async def whole_extras(self, run: RunT) -> dict[str, Any]:  # noqa: ARG002
        """What a whole answer has besides its choices and usage."""
        return {}

    async def _started(self) -> RunT:
        """Start; a form that cannot be had is blamed on the field that asked for it."""
        structure = self.request.structure()
        with form_asked_for_by(None if structure is None else structure[0]):
            return await self.start()

    async def whole(self) -> dict[str, Any]:
        run = await self._started()
        try:
            choices = []
            async for choice in self.choices(run):
                choices.append(msgspec.Raw(encode(choice)))
                await asyncio.sleep(0)  # log probabilities of many choices take long together
            extras = await self.whole_extras(run)
        finally:
            await run.aclose()
        return self._head | {"choices": choices, "usage": self.usage(run)} | extras

    async def events(self) -> AsyncGenerator[bytes, None]:
        run = await self._started()
        try:
            async for choices in self.chunks(run):
                if chunks := b"".join(self._chunk(run, choice) for choice in choices):
                    yield chunks
            last = b""
            if self._usage_at_end:
                last = event(self._head | {"choices": [], "usage": self.usage(run)})
            yield last + DONE
        finally:
            await run.aclose()

    def _chunk(self, run: RunT, choice: Choice) -> bytes:
        chunk = self._head | {"choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self.usage(run)
        elif self._usage_at_end:
            chunk["usage"] = None
        return event(chunk)


def usage_of(num_prompt: int, num_completion: int, num_cached: int) -> Usage:
    """Tokens of prompts and completions, as OpenAI counts them."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
