"""`POST /v1/chat/completions`."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.errors import InvalidRequestError
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.answer import Answer
from nanovllm.server.openai.conversation import render, text_of
from nanovllm.server.openai.generation import Cursor, Generation, Piece
from nanovllm.server.openai.logprobs import chat_logprobs, prompt_logprobs
from nanovllm.server.openai.requests import ChatCompletionRequest
from nanovllm.server.openai.responses import (
    ChatChoice,
    ChatCompletion,
    ChatDeltaChoice,
    ChatLogprobs,
)
from nanovllm.server.openai.sampling import sampling_params
from nanovllm.server.openai.streaming import also_streams
from nanovllm.server.state import State

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=also_streams(ChatCompletion),
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    return await ChatAnswer(body, request, state).respond()


class ChatAnswer(Answer):
    """Messages of the assistant."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    request: ChatCompletionRequest

    async def start(self) -> Generation:
        request = self.request
        _check_served(request)
        params = sampling_params(request, self.state)
        prompt = await render(request, self.state, request.reasoning_effort)
        return await Generation.start(
            self.state,
            self.request_id,
            [prompt],
            params,
            add_special_tokens=bool(request.add_special_tokens),
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
        )

    def choice(self, cursor: Cursor, piece: Piece) -> ChatChoice:
        choice: ChatChoice = {
            "index": cursor.index,
            "message": {
                "role": "assistant",
                "content": self._continued_text + piece.text,
                "refusal": None,
            },
            "logprobs": self._logprobs(piece),
            "finish_reason": cursor.finish_reason,
            "stop_reason": cursor.stop_reason,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def opening(self, cursor: Cursor) -> ChatDeltaChoice:
        choice: ChatDeltaChoice = {
            "index": cursor.index,
            "delta": {"role": "assistant", "content": self._continued_text},
            "logprobs": None,
            "finish_reason": None,
        }
        return choice

    def addition(self, cursor: Cursor, piece: Piece) -> ChatDeltaChoice:
        choice: ChatDeltaChoice = {
            "index": cursor.index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece),
            "finish_reason": None,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def closing(self, cursor: Cursor) -> ChatDeltaChoice:
        return {
            "index": cursor.index,
            "delta": {},
            "logprobs": None,
            "finish_reason": cursor.finish_reason,
            "stop_reason": cursor.stop_reason,
        }

    def whole_extras(self, generation: Generation) -> dict[str, Any]:
        output = generation.outputs[0]
        extras: dict[str, Any] = {}
        if self.request.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.request.return_token_ids:
            extras["prompt_token_ids"] = output.prompt_token_ids
        return extras

    @property
    def _continued_text(self) -> str:
        """With `echo`, the text that the answer goes on from."""
        last = self.request.messages[-1]
        return text_of(last) if self.request.echo and last.role == "assistant" else ""

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        num_top = self.request.num_logprobs
        if num_top is None or piece.logprobs is None:
            return None
        return chat_logprobs(piece.token_ids, piece.logprobs, num_top, self.names)


def _check_served(request: ChatCompletionRequest) -> None:
    """Refuse what no field by itself is wrong about."""
    if request.tools and request.tool_choice != "none":
        raise InvalidRequestError(
            "tools are not supported: this version calls none; with tool_choice='none' the model "
            "only reads of them",
            "tools",
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
