"""What the two kinds of answer have in common: how they come about and how they are sent."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from nanovllm import __version__
from nanovllm.server.openai.generation import Cursor, Generation, Piece
from nanovllm.server.openai.logprobs import TokenNames
from nanovllm.server.openai.requests import GenerationRequest
from nanovllm.server.openai.streaming import DONE, stream_unless_gone, unless_gone
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.state import ServerState

encode = msgspec.json.Encoder().encode


class Answer(ABC):
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
            "model": state.names_of("text")[0],
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
    async def start(self) -> Generation:
        """Check the request and queue it."""

    @abstractmethod
    def choice(self, cursor: Cursor, piece: Piece) -> Mapping[str, Any]:
        """A whole choice, of which the piece is all the text."""

    @abstractmethod
    def opening(self, cursor: Cursor) -> Mapping[str, Any] | None:
        """What a choice begins with before its first token, if anything."""

    @abstractmethod
    def addition(self, cursor: Cursor, piece: Piece) -> Mapping[str, Any]:
        """What is added to a choice."""

    @abstractmethod
    def closing(self, cursor: Cursor) -> Mapping[str, Any]:
        """What a choice ends with."""

    def whole_extras(self, generation: Generation) -> dict[str, Any]:  # noqa: ARG002
        """What a whole answer has besides its choices and usage."""
        return {}

    async def _respond_whole(self) -> Response:
        generation = await self.start()
        try:
            await generation.finish()
        finally:
            await generation.aclose()
        choices = []
        for cursors in self._cursors(generation):
            for cursor in cursors:
                choices.append(self.choice(cursor, cursor.take() or Piece("", [], [])))
            await asyncio.sleep(0)  # log probabilities of many prompts take long together
        body = self._head | {"choices": choices, "usage": generation.usage()}
        body |= self.whole_extras(generation)
        return Response(encode(body), media_type="application/json", headers=self._headers)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        generation = await self.start()
        try:
            cursors = self._cursors(generation)
            async for index in generation.news():
                if chunks := b"".join(self._chunks(generation, cursors[index])):
                    yield chunks
            last = b""
            if self._usage_at_end:
                last = event(self._head | {"choices": [], "usage": generation.usage()})
            yield last + DONE
        finally:
            await generation.aclose()

    def _chunks(self, generation: Generation, cursors: Sequence[Cursor]) -> Iterator[bytes]:
        """Everything that is new of one prompt's completions."""
        for cursor in cursors:
            for choice in self._new_choices(cursor):
                chunk = self._head | {"choices": [choice]}
                if self._usage_always:
                    chunk["usage"] = generation.usage()
                elif self._usage_at_end:
                    chunk["usage"] = None
                yield event(chunk)

    def _new_choices(self, cursor: Cursor) -> Iterator[Mapping[str, Any]]:
        if not cursor.opened:
            cursor.opened = True
            if (opening := self.opening(cursor)) is not None:
                yield opening
        if (piece := cursor.take()) is not None:
            yield self.addition(cursor, piece)
        if cursor.completion.finished and not cursor.closed:
            cursor.closed = True
            yield self.closing(cursor)

    def _cursors(self, generation: Generation) -> list[list[Cursor]]:
        """A cursor for each completion of each prompt; prompts count first."""
        n = len(generation.outputs[0].outputs)
        by_token = bool(self.request.return_token_ids) or self.request.num_logprobs is not None
        return [
            [
                Cursor(
                    output,
                    completion,
                    prompt_index * n + completion.index,
                    hidden=generation.hidden,
                    by_token=by_token,
                )
                for completion in output.outputs
            ]
            for prompt_index, output in enumerate(generation.outputs)
        ]


def event(body: Mapping[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: %b\n\n" % encode(body)
