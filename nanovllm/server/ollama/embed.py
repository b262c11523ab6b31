"""`POST /api/embed`."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from nanovllm.config.server import MAX_PROMPTS
from nanovllm.server.chat.checks import note_ignored
from nanovllm.server.embeddings import Embedded, Wanted, respond, written
from nanovllm.server.fields import FAIL_FAST, LenientModel, OrSay, Text, TokenCount
from nanovllm.server.ollama.requests import KeepAlive
from nanovllm.server.ollama.responses import EmbedResponse
from nanovllm.server.ollama.route import OllamaRoute
from nanovllm.server.ollama.translate import model_name
from nanovllm.server.state import State

router = APIRouter(route_class=OllamaRoute)


class EmbedRequest(LenientModel):
    """Texts to embed."""

    model: Annotated[str, Field(min_length=1)]
    input: Annotated[
        str | Annotated[list[Text], Field(max_length=MAX_PROMPTS), FAIL_FAST],
        OrSay("must be text or a list of texts, none of them empty"),
    ] = Field(description="Without any text the model is loaded, as it is anyway.")
    truncate: bool | None = Field(
        True, description="Whether a text that is too long loses its end, or is refused."
    )
    dimensions: TokenCount | None = None
    keep_alive: KeepAlive = Field(None, description="The model stays loaded anyway.")
    options: dict[str, Any] | None = Field(None, description="Nothing is sampled.")


@router.post("/api/embed", response_model=EmbedResponse)
async def embed(body: EmbedRequest, request: Request, state: State) -> Response:
    """Embed one or several texts: a vector of length 1 for each."""
    started = time.monotonic_ns()
    note_ignored(body)
    texts = [body.input] if isinstance(body.input, str) else body.input
    wanted = Wanted(
        [text for text in texts if text],
        {"prompt": "input", "truncate_prompt_tokens": "truncate"},
        dimensions=body.dimensions,
        truncate_prompt_tokens=None if body.truncate is False else -1,
        lora_name=state.text_adapter(model_name(body.model, state)),
    )

    def tell(embedded: Embedded) -> dict[str, Any]:
        return {
            "model": body.model,
            "embeddings": [written(embedding) for embedding in embedded.embeddings],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": 0,
            "prompt_eval_count": embedded.num_prompt_tokens,
        }

    return await respond(request, state, wanted, tell)
