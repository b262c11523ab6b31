"""What to sample for a request: what it says, and else the defaults of the model."""

from dataclasses import fields, replace
from typing import Any

from pydantic import BaseModel

from nanovllm.sampling_params import SamplingParams
from nanovllm.server.state import ServerState

NAMES = {f.name for f in fields(SamplingParams)}


def sampling_from(
    state: ServerState, request: BaseModel, *, max_tokens: int | None, **own: Any
) -> SamplingParams:
    """Return what to sample; null counts as left out.

    Args:
        state: The server, for the defaults of its model.
        request: What the client sent; its fields that have our names go through as they are.
        max_tokens: Tokens to generate at most; None is all the room there is.
        own: What the request says in other words, under our names; it goes before its fields.
    """
    same = {name: getattr(request, name) for name in type(request).model_fields.keys() & NAMES}
    given = {name: value for name, value in (same | own).items() if value is not None}
    return replace(state.llm.default_sampling_params(), **given | {"max_tokens": max_tokens})
