"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them.

Adapters are loaded from directories below `lora_dir` alone, and by who has the admin key.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from nanovllm.errors import InvalidRequestError
from nanovllm.server.adapters import NAME, below_lora_dir, require_admin
from nanovllm.server.errors import APIError
from nanovllm.server.fields import WireModel, not_served
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.state import State

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"], dependencies=[Depends(require_admin)])

# A response class of plain text would make that of the errors in the description, too.
DONE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
AdapterName = Annotated[str, Field(pattern=f"^{NAME}$")]


class LoadAdapterRequest(WireModel):
    """An adapter to load.

    Attributes:
        lora_name: What requests call it, as their `model`.
    """

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Its directory, relative to the server's `lora_dir`, or absolute and below it."
    )
    load_inplace: Annotated[
        Literal[False] | None, not_served("unload the adapter before another one takes its name")
    ] = None


class UnloadAdapterRequest(WireModel):
    """An adapter to forget."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]


@router.post("/v1/load_lora_adapter", response_class=Response, responses=DONE)
async def load_lora_adapter(body: LoadAdapterRequest, state: State) -> PlainTextResponse:
    """Load an adapter; requests for text may then name it as their `model`."""
    if not state.llm.config.enable_lora:
        raise InvalidRequestError("this server takes no adapters: start it with --enable-lora")
    if body.lora_name in state.model_names:
        raise InvalidRequestError(
            f"`{body.lora_name}` is the name of a model or of another adapter: choose another one, "
            "or unload that adapter before",
            "lora_name",
        )
    directory = below_lora_dir(state, body.lora_path, "lora_path")
    try:
        await state.llm.register_lora(body.lora_name, str(directory))
    except InvalidRequestError as e:
        param = "lora_name" if e.param == "name" else "lora_path"
        raise InvalidRequestError(str(e), param) from e
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=DONE)
async def unload_lora_adapter(body: UnloadAdapterRequest, state: State) -> PlainTextResponse:
    """Forget an adapter, once the last request that uses it has ended."""
    if body.lora_name not in state.llm.list_loras():
        raise APIError(
            404,
            f"The LoRA adapter `{body.lora_name}` does not exist.",
            param="lora_name",
            code="not_found",
        )
    await state.llm.unregister_lora(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
