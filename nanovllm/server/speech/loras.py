"""`/loras`: the adapters of the speech model, and `/lora/*`, as the family had them before.

Adapters are loaded from directories below `lora_dir` alone, and by who has the admin key.
"""

import uuid
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from nanovllm.errors import InvalidRequestError
from nanovllm.server.auth import is_admin, key_needed
from nanovllm.server.errors import ERROR_RESPONSES, APIError
from nanovllm.server.family_route import FamilyRoute
from nanovllm.server.openai.fields import WireModel
from nanovllm.server.state import ServerState, State

router = APIRouter(route_class=FamilyRoute, responses=ERROR_RESPONSES, tags=["speech"])

DISABLED = "Runtime LoRA is disabled; set NANOVLLM_LORA_ENABLED=true"

AdapterName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def require_enabled(state: State) -> None:
    """Refuse what needs adapters where there are none.

    Raises:
        InvalidRequestError: They are not enabled.
    """
    if not state.speech.config.enable_lora:
        raise InvalidRequestError(DISABLED)


def require_admin(request: Request, state: State) -> None:
    """Refuse who has not got the admin key.

    Raises:
        APIError: There is none, or it is another one.
    """
    if state.config.admin_key is None:
        raise APIError(401, "this server has no admin key: start it with --admin-key")
    if not is_admin(request.scope, state.config.admin_key):
        raise key_needed("admin key")


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
    await _register(state, body.name, body.path)
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


class Done(BaseModel):
    """It is done."""

    status: Literal["ok"] = "ok"


@router.post("/lora/load", dependencies=ADMIN)
async def load_lora(body: LoRAPath, state: State) -> LoadedLoRA:
    """Load the adapter of all requests that name none, in place of the one before."""
    # With a slash: no adapter of `POST /loras` can have this name.
    name = f"default/{uuid.uuid4().hex[:8]}"
    keys = await _register(state, name, body.lora_path)
    old, state.single_lora, state.default_lora = state.single_lora, name, name
    if old is not None:
        await state.speech.unregister_lora(old)
    return LoadedLoRA(loaded_keys=keys)


@router.post("/lora/set_enabled", dependencies=ADMIN)
async def set_lora_enabled(body: LoRASwitch, state: State) -> LoRAStatus:
    """Use the adapter of `/lora/load`, or leave it be."""
    if body.enabled and state.single_lora is None:
        raise InvalidRequestError("there is no adapter: POST /lora/load first", "enabled")
    state.default_lora = state.single_lora if body.enabled else None
    return LoRAStatus(lora_enabled=body.enabled)


@router.post("/lora/reset", dependencies=ADMIN)
async def reset_lora(state: State) -> Done:
    """Forget the adapter of `/lora/load`."""
    old, state.single_lora, state.default_lora = state.single_lora, None, None
    if old is not None:
        await state.speech.unregister_lora(old)
    return Done()


async def _register(state: ServerState, name: str, path: str) -> list[str]:
    """Load an adapter; returns the names of its tensors.

    Raises:
        InvalidRequestError: The path is not below `lora_dir`, or no adapter that fits is there.
    """
    directory = _below_lora_dir(state, path)
    try:
        return await state.speech.register_lora(name, str(directory))
    except OSError as e:
        raise InvalidRequestError(f"there is no adapter at {path!r:.200}", "path") from e


def _below_lora_dir(state: ServerState, path: str) -> Path:
    """The directory that a path means; links are followed before it is judged.

    Raises:
        InvalidRequestError: It is not below `lora_dir`, or there is no such option.
    """
    if state.config.lora_dir is None:
        raise InvalidRequestError("this server loads no adapters: start it with --lora-dir", "path")
    root = Path(state.config.lora_dir).expanduser().resolve()
    try:
        directory = (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as e:  # too long, a circle of links, a null
        raise InvalidRequestError(f"there is no adapter at {path!r:.200}", "path") from e
    if root not in directory.parents:
        raise InvalidRequestError("path must be a directory below the server's lora_dir", "path")
    return directory
