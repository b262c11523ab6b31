"""`POST /v1/responses`."""

import time
from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.server.chat.logprobs import ChatTokenLogprob, TokenNames, chat_logprobs
from nanovllm.server.chat.run import ChatUsage
from nanovllm.server.errors import APIError
from nanovllm.server.generation import Piece
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.request_id import request_id
from nanovllm.server.responses.body import unfinished, usage_of
from nanovllm.server.responses.history import as_stored, history_of
from nanovllm.server.responses.objects import ResponseObject, Status
from nanovllm.server.responses.output import Event, Output, new_id
from nanovllm.server.responses.request import ResponseRequest
from nanovllm.server.responses.start import start
from nanovllm.server.responses.translation import chat_request, input_items
from nanovllm.server.state import ServerState, State
from nanovllm.server.streaming import (
    DONE,
    WholeOrStream,
    also_streams,
    encode,
    named_event,
)

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])

CUT_OFF: dict[str | None, Status] = {"length": "incomplete", "abort": "cancelled"}
"""What a response is whose completion ends for this reason; others complete it."""


@router.post("/v1/responses", response_model=ResponseObject, responses=also_streams(ResponseObject))
async def create_response(body: ResponseRequest, request: Request, state: State) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    return await ResponseAnswer(body, request, state).respond()


class ResponseAnswer(WholeOrStream):
    """The answer to one request, sent whole or as events.

    Args:
        request: What is asked.
        http: The connection it came by.
        state: The server.
    """

    def __init__(self, request: ResponseRequest, http: Request, state: ServerState) -> None:
        name = state.answering_name(request.model or None)
        history = history_of(state, request.previous_response_id)
        self._items = [*history, *input_items(request)]
        self._request = request
        # A client may name its request, not the response: whoever knows that name may read it.
        response_id = new_id("resp")
        request_name = request_id(http.headers, request.request_id or response_id)
        super().__init__(http, state, request_name, streams=bool(request.stream))
        self._chat = chat_request(request, state, self.request_id, self._items)
        self._names = TokenNames(state.llm.tokenizer)
        self._output = Output()
        self._num_events = 0
        stored = request.store is not False and state.responses.keeps_any
        self._response = unfinished(request, self._chat, response_id, name, stored=stored)

    async def whole(self) -> ResponseObject:
        async with aclosing(self._generate()) as steps:
            async for _ in steps:
                pass
        return self._response

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._generate()) as steps:
            async for events in steps:
                if not self._num_events:
                    yield self._encoded(self._beginning())
                if events:
                    yield self._encoded(events)
        yield self._encoded([self._about_response(self._response["status"])]) + DONE

    async def _generate(self) -> AsyncGenerator[list[Event], None]:
        """Write the response, and yield the events that tell of it."""
        conversation = await start(self.state, self._request, self._chat)
        conversation.names.add(self._response["id"])
        (choice,) = conversation.choices
        try:
            async for news in conversation.news():
                yield [
                    event
                    for item in news
                    for event in self._output.push(
                        item.deltas,
                        choice.tool_calls,
                        self._logprobs(item.piece, conversation.left_out),
                    )
                ]
        finally:
            await conversation.aclose()
        status = CUT_OFF.get(choice.finish_reason, "completed")
        yield list(self._output.close(cut_off=status != "completed"))
        self._end(status, conversation.usage)

    def _end(self, status: Status, usage: ChatUsage) -> None:
        """Complete the response, and keep it if it shall be kept."""
        response = self._response
        response["status"] = status
        response["output"] = self._output.items
        response["usage"] = usage_of(usage)
        if status == "completed":
            response["completed_at"] = int(time.time())
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if response["store"]:
            self.state.responses.put(response["id"], encode(response), as_stored(self._items))

    def error_event(self, error: APIError) -> bytes:
        beginning = [] if self._num_events else self._beginning()
        self._response["status"] = "failed"
        self._response["output"] = self._output.items
        self._response["error"] = {"code": "server_error", "message": error.message}
        return self._encoded([*beginning, self._about_response("failed")]) + DONE

    def _beginning(self) -> list[Event]:
        return [self._about_response(kind) for kind in ("created", "in_progress")]

    def _about_response(self, kind: str) -> Event:
        # There is no event for a response that was cancelled.
        kind = "incomplete" if kind == "cancelled" else kind
        return {"type": f"response.{kind}", "response": self._response}

    def _encoded(self, events: Iterable[Event]) -> bytes:
        """Server-sent events, numbered."""
        sent = b""
        for event in events:
            sent += named_event(event | {"sequence_number": self._num_events})
            self._num_events += 1
        return sent

    def _logprobs(self, piece: Piece | None, left_out: Collection[int]) -> list[ChatTokenLogprob]:
        """Those of the tokens that the piece's text is of."""
        num_top = self._request.num_logprobs
        if num_top is None or piece is None or piece.logprobs is None:
            return []
        scores = chat_logprobs(piece.token_ids, piece.logprobs, num_top, self._names)
        written = zip(piece.token_ids, scores, strict=True)
        return [score for token_id, score in written if token_id not in left_out]
