"""What a conversation begins with that goes on from a stored response, and what is stored of it."""

from collections.abc import Iterable
from typing import Any

from nanovllm.server.errors import APIError
from nanovllm.server.responses.items import STORED_ITEMS, Item, MessageItem
from nanovllm.server.responses.output import new_id
from nanovllm.server.state import ServerState

ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}


def history_of(state: ServerState, response_id: str | None) -> list[Item]:
    """The items that a response has answered, and those that it consists of.

    Args:
        state: The server.
        response_id: The `previous_response_id` of a request; without one there are none.

    Raises:
        APIError: There is no such response, or not any more. OpenAI's status and code, on which
            clients branch to send the whole conversation.
    """
    if response_id is None:
        return []
    stored = state.responses.get(response_id)
    if stored is None:
        raise APIError(
            400,
            f"Previous response with id '{response_id:.80}' not found: it may have been forgotten; "
            "send the whole conversation as `input`.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return STORED_ITEMS.validate_python(stored.history())


def as_stored(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Items as they are kept and listed: each with an id, and with its content in parts.

    Not by `model_dump`, which looks once more of which kind each part is.
    """
    return [_as_stored(item) for item in items]


def _as_stored(item: Item) -> dict[str, Any]:
    stored: dict[str, Any] = {
        name: [_part(part.type, part.text) for part in value] if isinstance(value, list) else value
        for name, value in vars(item).items()
        if value is not None
    }
    stored.setdefault("id", new_id(ID_PREFIXES[stored["type"]]))
    if isinstance(item, MessageItem):
        stored.setdefault("status", "completed")
        if isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            stored["content"] = [_part(kind, item.content)]
    return stored


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": kind, "refusal": text}
    part: dict[str, Any] = {"type": kind, "text": text}
    return part | {"annotations": []} if kind == "output_text" else part
