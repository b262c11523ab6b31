"""Which LoRA adapters a server may load, and who may tell it to."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import Request

from nanovllm.config import EngineConfig, ServerConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.models.hub import resolve_model
from nanovllm.server.auth import is_admin, key_needed
from nanovllm.server.errors import APIError
from nanovllm.server.state import ServerState, State

NAME = "[A-Za-z0-9][A-Za-z0-9_./:@+-]{0,127}"
"""What an adapter may be called; requests name it where they could name a model."""


class LoRAModule(NamedTuple):
    """An adapter that is loaded when the server starts.

    Args:
        name: What requests call it.
        path: Its directory, or its id on the hub.
        base_model_name: The model that it is for; None is whichever is served.
    """

    name: str
    path: str
    base_model_name: str | None = None


def require_admin(request: Request, state: State) -> None:
    """Refuse who has not got the admin key.

    Raises:
        APIError: There is none, or it is another one.
    """
    if state.config.admin_key is None:
        raise APIError(401, "this server has no admin key: start it with --admin-key")
    if not is_admin(request.scope, state.config.admin_key):
        raise key_needed("admin key")


def below_lora_dir(state: ServerState, path: str, param: str = "path") -> Path:
    """The directory that a path means; links are followed before it is judged.

    Args:
        state: The server.
        path: Relative to its `lora_dir`, or absolute and below it.
        param: The field that it comes from.

    Raises:
        InvalidRequestError: It is not below `lora_dir`, or a file of it is not; or there is no such
            option.
    """
    if state.config.lora_dir is None:
        raise InvalidRequestError("this server loads no adapters: start it with --lora-dir", param)
    root = Path(state.config.lora_dir).expanduser().resolve()
    try:
        directory = (root / path).resolve()
        files = [file.resolve() for file in directory.glob("*")]
    except (OSError, RuntimeError, ValueError) as e:  # too long, a circle of links, a null
        raise InvalidRequestError(f"there is no adapter at {path!r:.200}", param) from e
    if not all(root in place.parents for place in (directory, *files)):
        raise InvalidRequestError(
            f"{param} must be a directory below the server's lora_dir, and its files in there, too",
            param,
        )
    return directory


async def load_modules(
    state: ServerState, engine: EngineConfig, modules: Sequence[LoRAModule]
) -> None:
    """Load adapters into the model that writes, or the only one there is.

    Args:
        state: The server; its models run.
        engine: Says where the hub is, for adapters that are not here.
        modules: The adapters.

    Raises:
        InvalidRequestError: One cannot be loaded; the message says which and why.
    """
    for module in modules:
        model = state.text_model or state.speech
        if module.name in state.model_names:
            raise InvalidRequestError(
                f"lora_modules: {module.name!r} is the name of a model or of another adapter",
                "lora_modules",
            )
        names = {*state.model_names, model.model_id}
        if module.base_model_name is not None and module.base_model_name not in names:
            raise InvalidRequestError(
                f"lora_modules: {module.name!r} is for {module.base_model_name!r}, and what is "
                f"served is {', '.join(sorted(names))}",
                "lora_modules",
            )
        source = replace(engine, model=module.path, revision=None, dummy_weights=False)
        try:
            directory = await asyncio.to_thread(resolve_model, source)
            await model.register_lora(module.name, str(directory.resolve()))
        except (FileNotFoundError, InvalidRequestError) as e:
            raise InvalidRequestError(f"lora_modules: {module.name!r}: {e}", "lora_modules") from e


def lora_modules(server: ServerConfig, engine: EngineConfig) -> list[LoRAModule]:
    """Read the option: each is `name=path`, or an object as vLLM has it.

    Raises:
        InvalidRequestError: One is neither, or has a name that no adapter may have; or the engine
            is to take none.
    """
    if server.lora_modules and not engine.enable_lora:
        raise InvalidRequestError("lora_modules needs enable_lora (--enable-lora)", "enable_lora")
    return [_lora_module(text) for text in server.lora_modules or ()]


def _lora_module(text: str) -> LoRAModule:
    fields: Any
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
    else:
        name, _, path = text.partition("=")
        fields = {"name": name, "path": path}
    names = set(LoRAModule._fields)
    if not isinstance(fields, Mapping) or not {"name", "path"} <= fields.keys() <= names:
        raise _no_module(text)
    module = LoRAModule(**fields)
    if not all(isinstance(value, str) and value for value in fields.values()):
        raise _no_module(text)
    if re.fullmatch(NAME, module.name) is None:
        raise InvalidRequestError(
            f"lora_modules: {module.name!r:.200} cannot be the name of an adapter: it begins with "
            "a letter or digit, and has at most 128 of those and of _./:@+-",
            "lora_modules",
        )
    return module


def _no_module(text: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"lora_modules must be name=path, or an object of name, path and perhaps base_model_name; "
        f"got {text!r:.200}",
        "lora_modules",
    )
