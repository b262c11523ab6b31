"""From the items of a conversation to the messages that chat templates read."""

from collections.abc import Sequence
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.server.responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
    text_of,
)
from nanovllm.text.conversations import arguments_of, call_of

Message = dict[str, Any]


def messages_of(items: Sequence[Item], instructions: str | None = None) -> list[Message]:
    """Return the messages that items are.

    What the assistant thought, said and called in one go is one message. A call that was cut off,
    or whose arguments the model got wrong, is left out, and so is what the client made of it: no
    template could write it, and nobody could mend it.

    Args:
        items: The conversation, in order.
        instructions: What the system says before it.
    """
    messages: list[Message] = []
    left_out: set[str] = set()
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            if item.call_id in left_out:
                continue
            content = text_of(item.output)
            messages.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": text_of(item.content)})
        elif isinstance(item, FunctionCallItem):
            arguments = _whole_arguments(item)
            if arguments is None:
                left_out.add(item.call_id)
            else:
                left_out.discard(item.call_id)  # some clients count ids anew in each turn
                _add_call(messages, call_of(item.call_id, item.name, arguments))
        elif isinstance(item, MessageItem):
            _add_content(messages, text_of(item.content))
        else:
            _add_reasoning(messages, item)
    return messages


def _whole_arguments(item: FunctionCallItem) -> dict[str, Any] | None:
    if item.status not in (None, "completed"):  # clients may leave it out
        return None
    try:
        return arguments_of(item.arguments, "")
    except InvalidRequestError:
        return None


def _add_reasoning(messages: list[Message], item: ReasoningItem) -> None:
    text = text_of(item.content or item.summary)
    if text:  # that of other servers may be encrypted, which tells us nothing
        messages.append({"role": "assistant", "content": "", "reasoning_content": text})


def _add_content(messages: list[Message], text: str) -> None:
    turn = messages[-1] if messages else {}
    if turn.get("role") == "assistant" and not turn["content"] and "tool_calls" not in turn:
        turn["content"] = text
    else:
        messages.append({"role": "assistant", "content": text})


def _add_call(messages: list[Message], call: dict[str, Any]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)
