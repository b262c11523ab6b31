"""`POST /abort`."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from nanovllm.server.fields import WireModel
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.state import State

router = APIRouter(route_class=JSONRoute, tags=["control"])

ID_PREFIXES = ("chatcmpl-", "cmpl-", "decision-", "embd-", "msg_")
"""What answers' ids begin with, in whatever dialect they are."""


class AbortRequest(WireModel):
    """Which request to end: the `id` of its answer, or the `X-Request-Id` that it was sent with."""

    request_id: Annotated[str, Field(min_length=1, max_length=512)]


class Aborted(TypedDict):
    """Whether there was such a request, and it had not ended yet."""

    request_id: str
    aborted: bool


@router.post("/abort", response_model=Aborted)
async def abort(body: AbortRequest, state: State) -> Aborted:
    """End a request; its client gets what there is, with the finish reason "abort"."""
    names = {body.request_id}
    for prefix in ID_PREFIXES:
        names.add(body.request_id.removeprefix(prefix))
    meant = [generation for generation in state.generations if generation.names & names]
    stopped = [await generation.abort() for generation in meant]
    return {"request_id": body.request_id, "aborted": any(stopped)}
