"""`POST /v1/embeddings`."""

import base64
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field
from typing_extensions import TypedDict

from nanovllm.server.chat.checks import note_ignored
from nanovllm.server.embeddings import Embedded, Wanted, respond, written
from nanovllm.server.fields import (
    CacheSalt,
    LenientModel,
    ModelName,
    Priority,
    RequestId,
    TokenCount,
    TruncateTo,
    not_served,
)
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.requests import Prompt, as_prompts
from nanovllm.server.openai.responses import PromptTokensDetails
from nanovllm.server.state import State

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


class EmbeddingRequest(LenientModel):
    """Texts to embed. Fields that OpenAI does not have are vLLM's."""

    input: Prompt
    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="Numbers, or their little-endian float32 in base64."
    )
    dimensions: TokenCount | None = Field(
        None, description="Keep so many numbers; by default all that the model has."
    )
    user: str | None = None
    truncate_prompt_tokens: TruncateTo = Field(
        None, description="Keep so many first tokens of a text; -1 is as many as fit."
    )
    add_special_tokens: bool | None = True
    priority: Priority = 0
    cache_salt: CacheSalt = Field(
        None, description="Only requests of the same salt share cached prefixes."
    )
    request_id: RequestId | None = None

    normalize: Annotated[
        Literal[True] | None, not_served("embeddings have the length 1, as the models want it")
    ] = None


class EmbeddingData(TypedDict):
    """The embedding of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens of all texts."""

    prompt_tokens: int
    completion_tokens: Literal[0]
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingList(TypedDict):
    """The answer of `/v1/embeddings`, in the order of the texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingData]
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def create_embeddings(body: EmbeddingRequest, request: Request, state: State) -> Response:
    """Embed one or several texts: a vector of length 1 for each."""
    model = body.model or None
    state.check_model(model)
    note_ignored(body)
    name = state.answering_name(model)
    wanted = Wanted(
        as_prompts(body.input),
        {"prompt": "input"},
        dimensions=body.dimensions,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        add_special_tokens=body.add_special_tokens is not False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
        lora_name=state.text_adapter(model),
        given_id=body.request_id,
    )
    in_base64 = body.encoding_format == "base64"
    return await respond(request, state, wanted, lambda made: _told(made, name, in_base64))


def _told(embedded: Embedded, model: str, in_base64: bool) -> dict[str, Any]:
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(embedding.astype("<f4").tobytes()).decode()
            if in_base64
            else written(embedding),
        }
        for index, embedding in enumerate(embedded.embeddings)
    ]
    return {
        "id": f"embd-{embedded.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {
            "prompt_tokens": embedded.num_prompt_tokens,
            "completion_tokens": 0,
            "total_tokens": embedded.num_prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": embedded.num_cached_tokens},
        },
    }
