"""`/loras`: the adapters of the speech model, and `/lora/*`, as the family had them before.

Adapters are loaded from directories below `lora_dir` alone, and by who has the admin key.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from nanovllm.errors import InvalidRequestError
from nanovllm.server.adapters import below_lora_dir, require_admin
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.family_route import FamilyRoute
from nanovllm.server.fields import WireModel
from nanovllm.server.health import Status
from nanovllm.server.state import State

router = APIRouter(route_class=FamilyRoute, tags=["speech"])

DISABLED = "Runtime LoRA is disabled; set NANOVLLM_LORA_ENABLED=true"

AdapterName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Without a slash, so that none is taken for that of `/lora/load`."""


def require_enabled(state: State) -> None:
    """Refuse what needs adapters where there are none.

    Raises:
        InvalidRequestError: They are not enabled.
    """
    if not state.speech.config.enable_lora:
        raise InvalidRequestError(DISABLED)


ADMIN = [Depends(require_enabled), Depends(require_admin)]


class AdapterToLoad(WireModel):
    """An adapter to register."""

    name: AdapterName
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Its directory, relative to the server's `lora_dir`, or absolute and below it."
    )


class Adapter(TypedDict):
    """An adapter that requests may name as `lora_name`."""

    name: str


@router.get("/loras", response_model=list[Adapter], dependencies=[Depends(require_enabled)])
async def list_loras(state: State) -> list[Adapter]:
    """List the adapters."""
    return [{"name": name} for name in state.speech.list_loras()]


@router.post("/loras", response_model=Adapter, dependencies=ADMIN)
async def register_lora(body: AdapterToLoad, state: State) -> Adapter:
    """Load an adapter."""
    await state.speech.register_lora(body.name, str(below_lora_dir(state, body.path)))
    return {"name": body.name}


@router.delete("/loras/{name}", response_model=Adapter, dependencies=ADMIN)
async def unregister_lora(name: str, state: State) -> Adapter:
    """Forget an adapter, once the last request that uses it has ended."""
    await state.speech.unregister_lora(name)
    return {"name": name}


class LoRAPath(WireModel):
    """Which adapter to load."""

    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class LoRASwitch(WireModel):
    """Whether requests without a `lora_name` use the adapter of `/lora/load`."""

    enabled: bool


class LoadedLoRA(BaseModel):
    """What of an adapter was loaded: names of tensors."""

    status: Literal["ok"] = "ok"
    loaded_keys: list[str]
    skipped_keys: list[str] = []


class LoRAStatus(BaseModel):
    """Whether the adapter is used."""

    status: Literal["ok"] = "ok"
    lora_enabled: bool


@router.post("/lora/load", dependencies=ADMIN)
async def load_lora(body: LoRAPath, state: State) -> LoadedLoRA:
    """Load the adapter of all requests that name none, in place of the one before."""
    directory = below_lora_dir(state, body.lora_path, "lora_path")
    with in_words_of_client({"path": "lora_path"}):
        return LoadedLoRA(loaded_keys=await state.speech.single_lora.load(str(directory)))


@router.post("/lora/set_enabled", dependencies=ADMIN)
async def set_lora_enabled(body: LoRASwitch, state: State) -> LoRAStatus:
    """Use the adapter of `/lora/load`, or leave it be."""
    state.speech.single_lora.enable(body.enabled)
    return LoRAStatus(lora_enabled=body.enabled)


@router.post("/lora/reset", dependencies=ADMIN)
async def reset_lora(state: State) -> Status:
    """Forget the adapter of `/lora/load`."""
    await state.speech.single_lora.reset()
    return Status()
