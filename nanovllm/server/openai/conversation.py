"""From the messages of a request to the prompt that the model's chat template makes of them."""

import json
from collections.abc import Mapping
from typing import Any

from nanovllm.config import RESERVED_TEMPLATE_NAMES
from nanovllm.errors import InvalidRequestError
from nanovllm.server.openai.requests import ChatTemplateOptions, Message, ToolCall
from nanovllm.server.state import ServerState

TEMPLATE_KWARGS = (
    "add_vision_id",
    "clear_thinking",
    "date_string",
    "enable_thinking",
    "keep_all_reasoning",
    "model_identity",
    "preserve_thinking",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
    "thinking_mode",
    "tools_in_user_message",
)
"""What a request may hand to a template, unless `chat_template_kwarg_names` says else."""


async def render(
    request: ChatTemplateOptions, state: ServerState, effort: str | None = None
) -> str:
    """Return the prompt, special tokens spelled out.

    Args:
        request: The conversation.
        state: The server.
        effort: OpenAI's `reasoning_effort`, for templates that read it; "none" turns thinking off.

    Raises:
        InvalidRequestError: The template does not take the conversation, or a variable in
            `chat_template_kwargs` is not one that a request may set.
    """
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other: a message is "
            "either begun or continued",
            "continue_final_message",
        )
    begins = not request.continue_final_message and request.add_generation_prompt is not False
    thinking: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        thinking["enable_thinking"] = False
    tokenizer = state.llm.tokenizer
    templates = () if tokenizer is None else tokenizer.chat_templates.values()
    system = "developer" if any("developer" in text for text in templates) else "system"
    return await state.llm.render(
        [
            _as_template_reads(message, system, f"messages.{index}")
            for index, message in enumerate(request.messages)
        ],
        tools=[tool.model_dump(exclude_none=True) for tool in request.tools or []] or None,
        documents=request.documents,
        add_generation_prompt=begins,
        continue_final_message=bool(request.continue_final_message),
        chat_template_kwargs=_default_kwargs(state)
        | thinking
        | _checked_kwargs(request.chat_template_kwargs, state),
    )


def text_of(message: Message) -> str:
    """The text of a message; parts are lines."""
    content = message.content
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else part.text for part in content)
    return content or ""


def _as_template_reads(message: Message, developer: str, path: str) -> dict[str, Any]:
    """A message as templates expect it.

    Args:
        message: The message.
        developer: Role that stands for OpenAI's "developer", which most templates do not know.
        path: Where in the request it is.
    """
    role = developer if message.role == "developer" else message.role
    read: dict[str, Any] = {"role": role, "content": text_of(message)}
    for name in ("name", "reasoning", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            read[name] = value
    if message.tool_calls:
        read["tool_calls"] = [
            _with_parsed_arguments(call, f"{path}.tool_calls.{index}.function.arguments")
            for index, call in enumerate(message.tool_calls)
        ]
    return read


def _with_parsed_arguments(call: ToolCall, path: str) -> dict[str, Any]:
    """A call whose arguments are an object, as templates iterate over them."""
    text = call.function.arguments
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as e:
        raise InvalidRequestError(
            f"{path}: must be the JSON text of an object, got {text!r:.80}: {e}", path
        ) from e
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"{path}: must be the JSON text of an object, got {text!r:.80}", path
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _default_kwargs(state: ServerState) -> dict[str, Any]:
    text = state.config.default_chat_template_kwargs
    kwargs: dict[str, Any] = json.loads(text) if text else {}
    return kwargs


def _checked_kwargs(given: Mapping[str, Any] | None, state: ServerState) -> dict[str, Any]:
    names = state.config.chat_template_kwarg_names
    allowed = set(TEMPLATE_KWARGS if names is None else names) - RESERVED_TEMPLATE_NAMES
    for name in given or {}:
        if name not in allowed:
            raise InvalidRequestError(
                f"chat_template_kwargs must not have {name!r:.80}: a request may set "
                f"{', '.join(sorted(allowed)) or 'nothing'}",
                "chat_template_kwargs",
            )
    return dict(given or {})
