"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.server.anthropic.answer import MessageAnswer
from nanovllm.server.anthropic.requests import CountTokensRequest, MessagesRequest
from nanovllm.server.anthropic.responses import MessageResponse, TokenCountResponse
from nanovllm.server.anthropic.translate import chat_request
from nanovllm.server.chat.prompt import render
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.request_id import request_id
from nanovllm.server.state import State
from nanovllm.server.streaming import also_streams

router = APIRouter(route_class=JSONRoute, tags=["Anthropic"])


@router.post(
    "/v1/messages", response_model=MessageResponse, responses=also_streams(MessageResponse)
)
async def create_message(body: MessagesRequest, request: Request, state: State) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    return await MessageAnswer(body, request, state).respond()


@router.post("/v1/messages/count_tokens", response_model=TokenCountResponse)
async def count_tokens(
    body: CountTokensRequest, request: Request, state: State
) -> TokenCountResponse:
    """Count the tokens of the prompt that `/v1/messages` would make of a conversation."""
    asked = chat_request(body, state, request_id(request.headers))
    state.check_model(asked.model)
    prompt = await render(state, asked)
    return {"input_tokens": len(await state.llm.encode(prompt, asked.add_special_tokens))}
