"""What the two kinds of answer have in common: how they are sent."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from nanovllm import __version__
from nanovllm.server.chat.checks import form_asked_for_by
from nanovllm.server.chat.logprobs import TokenNames
from nanovllm.server.openai.requests import GenerationRequest
from nanovllm.server.openai.responses import Usage
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import DONE, encode, event, stream_unless_gone, unless_gone

Choice = Mapping[str, Any]


class Run(Protocol):
    """What is generated for a request."""

    async def aclose(self) -> None:
        """Abort what has not ended."""


RunT = TypeVar("RunT", bound=Run)


class Answer(ABC, Generic[RunT]):
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
        self.request = request
        self.state = state
        self.request_id = request_id(http.headers, request.request_id)
        self.names = TokenNames(state.llm.tokenizer, bool(request.return_tokens_as_token_ids))
        self._http = http
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

    async def respond(self) -> Response:
        """Generate and send; a client that leaves ends the generation.

        Raises:
            InvalidRequestError: The request cannot be used.
            UnavailableError: The server is too busy, or its engine died before the first token.
            APIError: The same in HTTP's terms.
        """
        if not self.request.stream:
            return await unless_gone(self._http, self._respond_whole())
        return await stream_unless_gone(
            self._http,
            self._events(),
            lambda error: event(error.body()) + DONE,
            keep_alive=self.state.config.sse_keep_alive_interval,
            headers=self._headers,
        )

    @property
    def _headers(self) -> dict[str, str]:
        return {HEADER: self.request_id}

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

    async def _respond_whole(self) -> Response:
        run = await self._started()
        try:
            choices = []
            async for choice in self.choices(run):
                choices.append(msgspec.Raw(encode(choice)))
                await asyncio.sleep(0)  # log probabilities of many choices take long together
            extras = await self.whole_extras(run)
        finally:
            await run.aclose()
        body = self._head | {"choices": choices, "usage": self.usage(run)} | extras
        return Response(encode(body), media_type="application/json", headers=self._headers)

    async def _events(self) -> AsyncGenerator[bytes, None]:
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
