"""`/v1/responses/{id}`: what is kept of a response."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response

from nanovllm.errors import InvalidRequestError
from nanovllm.server.errors import APIError
from nanovllm.server.fields import Off, not_served
from nanovllm.server.response_store import StoredResponse
from nanovllm.server.responses.objects import ItemList, ResponseDeleted, ResponseObject
from nanovllm.server.state import ServerState, State

ONCE_ONLY = not_served("a response is streamed once only")

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/responses/{response_id}", response_model=ResponseObject)
async def retrieve_response(
    response_id: str,
    state: State,
    stream: Annotated[Off, ONCE_ONLY] = None,  # noqa: ARG001  # only to be refused
) -> Response:
    """Return a response once more."""
    return Response(_stored(state, response_id).response, media_type="application/json")


@router.delete("/v1/responses/{response_id}", response_model=ResponseDeleted)
async def delete_response(response_id: str, state: State) -> ResponseDeleted:
    """Forget a response."""
    _stored(state, response_id)
    state.responses.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items", response_model=ItemList)
async def list_input_items(
    response_id: str,
    state: State,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> ItemList:
    """List the items that a response has answered, by default the last ones first.

    Args:
        response_id: The response.
        state: The server.
        limit: How many.
        order: Whether the first or the last one comes first.
        after: The id of the item behind which the list begins.
    """
    items = _stored(state, response_id).input_items()
    if order == "desc":
        items.reverse()
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError(f"after: there is no item {after!r:.80}", "after")
        start = ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _stored(state: ServerState, response_id: str) -> StoredResponse:
    stored = state.responses.get(response_id)
    if stored is None:
        raise APIError(404, f"Response with id '{response_id:.80}' not found.", code="not_found")
    return stored
