"""`GET /v1/models` and what stands around it."""

import time
from typing import Literal

from fastapi import APIRouter
from typing_extensions import TypedDict

from nanovllm.server.openai.responses import Model, ModelList
from nanovllm.server.state import ServerState, State

router = APIRouter(tags=["OpenAI"])

STARTED = int(time.time())
"""When the models became available, as good as: they are those of the process."""


class Greeting(TypedDict):
    """The answer of `GET /v1`."""

    status: Literal["ok"]


@router.get("/v1", response_model=Greeting)
async def greet() -> Greeting:
    """Say that the API is here."""
    return {"status": "ok"}


@router.get(
    "/v1/models",
    response_model=ModelList,
)
async def list_models(state: State) -> ModelList:
    """List the names that requests may use."""
    return {"object": "list", "data": [_describe(name, state) for name in state.model_names]}


@router.get(
    "/v1/models/{model_id:path}",
    response_model=Model,
)
async def retrieve_model(model_id: str, state: State) -> Model:
    """Describe one model; names may contain slashes."""
    if model_id not in state.model_names:
        state.check_model(model_id)
    return _describe(model_id, state)


def _describe(name: str, state: ServerState) -> Model:
    writes = name in state.text_names
    model = state.llm if writes else state.speech
    is_adapter = writes and name not in state.names_of("text")
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "nanovllm",
        "root": name if is_adapter else model.model_id,
        "parent": state.names_of("text")[0] if is_adapter else None,
        "max_model_len": model.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": STARTED,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
