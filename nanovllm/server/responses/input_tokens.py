"""`POST /v1/responses/input_tokens`."""

from fastapi import APIRouter

from nanovllm.server.chat.prompt import render
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.responses.history import history_of
from nanovllm.server.responses.objects import InputTokens
from nanovllm.server.responses.request import ResponseRequest
from nanovllm.server.responses.translation import chat_request, input_items
from nanovllm.server.state import State

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post("/v1/responses/input_tokens", response_model=InputTokens)
async def count_input_tokens(body: ResponseRequest, state: State) -> InputTokens:
    """Count the tokens of the prompt that a request would have."""
    state.check_model(body.model or None)
    history = history_of(state, body.previous_response_id)
    chat = chat_request(body, state, "", [*history, *input_items(body)])
    token_ids = await state.llm.encode(await render(state, chat), chat.add_special_tokens)
    return {"object": "response.input_tokens", "input_tokens": len(token_ids)}
