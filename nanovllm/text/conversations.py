"""Conversations in OpenAI's form, as chat templates read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.text.json_text import decode


def as_templates_read(messages: Sequence[Any]) -> list[Any]:
    """Return messages whose content is text, and whose calls have objects for arguments.

    Parts of a content are lines, and none of it is an empty one. What a message has without a value
    it has not, nor an empty list of calls: templates ask whether there is one. What is no message
    stays what it is, for the template's side to refuse.

    Args:
        messages: A conversation, which is left alone.

    Raises:
        InvalidRequestError: It is no list, a part of a content is no text, or a call's arguments
            are no object; `param` says where.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequestError(
            f"messages must be a list of messages, got {messages!r:.80}", "messages"
        )
    return [
        _read(message, f"messages.{index}") if isinstance(message, Mapping) else message
        for index, message in enumerate(messages)
    ]


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
    except (ValueError, RecursionError) as e:
        arguments, reason = None, f": {e}"
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"{path}: must be the JSON text of an object, got {text!r:.80}{reason}", path
        )
    return arguments


def _read(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    read = {name: value for name, value in message.items() if value is not None}
    content = read.get("content", "")
    if isinstance(content, list | tuple):
        parts = enumerate(content)
        content = "\n".join(_text_of(part, f"{path}.content.{index}") for index, part in parts)
    read["content"] = content
    calls = read.get("tool_calls")
    if calls is not None and not calls:
        del read["tool_calls"]
    elif isinstance(calls, list | tuple):
        read["tool_calls"] = [
            _call(call, f"{path}.tool_calls.{index}.function.arguments")
            for index, call in enumerate(calls)
        ]
    return read


def _text_of(part: Any, path: str) -> str:
    text = part
    if isinstance(part, Mapping):
        text = part.get("refusal") if part.get("text") is None else part["text"]
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"{path}: this model reads and writes text, and {part!r:.80} is none", path
        )
    return text


def _call(call: Any, path: str) -> Any:
    """A call whose arguments are an object, if they are the text of one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": arguments_of(arguments, path)}}
