"""Calls of earlier turns, as chat templates read them."""

from typing import Any

import msgspec

from nanovllm.errors import InvalidRequestError
from nanovllm.server.json_body import decode


def call_of(call_id: str | None, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call in a message of the assistant."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_of(text: str, path: str) -> dict[str, Any]:
    """The arguments of a call, over which templates iterate.

    Args:
        text: The JSON text of an object; nothing is an empty one.
        path: Where in the request it is.

    Raises:
        InvalidRequestError: It is something else.
    """
    reason = ""
    try:
        arguments = decode(text.encode()) if text.strip() else {}
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        arguments, reason = None, f": {e}"
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"{path}: must be the JSON text of an object, got {text!r:.80}{reason}", path
        )
    return arguments
