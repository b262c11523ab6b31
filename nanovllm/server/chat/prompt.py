"""From a conversation to the prompt that the model's chat template makes of it."""

import json
from collections.abc import Mapping
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Any

from nanovllm.config import RESERVED_TEMPLATE_NAMES
from nanovllm.errors import InvalidRequestError
from nanovllm.server.chat.request import ChatRequest
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


async def render(state: ServerState, request: ChatRequest) -> str:
    """Return the prompt, special tokens spelled out.

    Raises:
        InvalidRequestError: The template does not take the conversation, or the request contradicts
            itself.
    """
    begins = request.add_generation_prompt
    if request.continue_final_message and begins:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other: a message is "
            "either begun or continued",
            "continue_final_message",
        )
    return await state.llm.render(
        _begun_by_one([_as_template_reads(message, state) for message in request.messages]),
        tools=[_as_template_shows(tool) for tool in request.tools] or None,
        documents=request.documents,
        add_generation_prompt=begins,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=template_kwargs(state, request),
    )


def template_kwargs(state: ServerState, request: ChatRequest) -> dict[str, Any]:
    """What the template reads besides the conversation: the server's, then the request's."""
    text = state.config.default_chat_template_kwargs
    kwargs: dict[str, Any] = json.loads(text) if text else {}
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
    if request.reasoning_effort == "none":
        kwargs["enable_thinking"] = False
    return kwargs | request.template_kwargs


def checked_kwargs(given: Mapping[str, Any] | None, state: ServerState) -> dict[str, Any]:
    """What a client wants the template to read besides.

    Raises:
        InvalidRequestError: A request may not set it.
    """
    names = state.config.chat_template_kwarg_names
    allowed = set(TEMPLATE_KWARGS if names is None else names) - RESERVED_TEMPLATE_NAMES
    for name in given or {}:
        if name not in allowed:
            raise InvalidRequestError(
                f"chat_template_kwargs must not have {name!r:.80}: a request may set "
                f"{', '.join(sorted(allowed)) or 'nothing'}, unless the server was started with "
                "others (--chat-template-kwarg-names)",
                "chat_template_kwargs",
            )
    return dict(given or {})


def as_one(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What messages of the same role say together."""
    if len(messages) == 1:
        return messages[0]
    together: dict[str, Any] = {"role": messages[0]["role"]}
    for name in ("content", "reasoning_content"):
        texts = [text for message in messages if (text := message.get(name))]
        if texts or name == "content":
            together[name] = "\n".join(texts)
    if calls := [call for message in messages for call in message.get("tool_calls", ())]:
        together["tool_calls"] = calls
    return together


def _begun_by_one(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in which what the system says first is one message: many templates take one.

    Codex sends both `instructions` and a message of the developer.
    """
    first = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    begin = [as_one(list(said)) for _, said in groupby(first, key=itemgetter("role"))]
    return begin + messages[len(first) :]


def _as_template_reads(message: dict[str, Any], state: ServerState) -> dict[str, Any]:
    """A message whose role templates know: few of them have OpenAI's "developer"."""
    if message["role"] != "developer":
        return message
    tokenizer = state.llm.tokenizer
    templates = () if tokenizer is None else tokenizer.chat_templates.values()
    known = any("developer" in text for text in templates)
    return message if known else message | {"role": "system"}


def _as_template_shows(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool without what is for us and not for the model."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return tool | {"function": function}
