"""From a request of `/v1/responses` to the conversation that is answered."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.server.chat.checks import check_stop, note_ignored
from nanovllm.server.chat.prompt import checked_kwargs
from nanovllm.server.chat.request import ChatRequest, ToolChoice
from nanovllm.server.responses.items import MAX_ITEMS, Item, MessageItem, num_parts
from nanovllm.server.responses.messages import messages_of
from nanovllm.server.responses.request import (
    AllowedTools,
    FunctionChoice,
    FunctionTool,
    JSONObject,
    JSONSchema,
    ResponseRequest,
)
from nanovllm.server.sampling import sampling_from
from nanovllm.server.state import ServerState


def chat_request(
    request: ResponseRequest,
    state: ServerState,
    request_id: str,
    items: Sequence[Item],
) -> ChatRequest:
    """Return the conversation that a request asks to answer.

    Args:
        request: What is asked.
        state: The server, for its limits and the defaults of its model.
        request_id: What the client knows the request by.
        items: The whole conversation.

    Raises:
        InvalidRequestError: The request contradicts itself, or asks for more than this server
            gives.
    """
    note_ignored(request)
    if len(items) > MAX_ITEMS:
        raise InvalidRequestError(
            f"a conversation may have {MAX_ITEMS} items, this one has {len(items)}", "input"
        )
    if (parts := num_parts(items)) > MAX_ITEMS:
        raise InvalidRequestError(
            f"a conversation may have {MAX_ITEMS} content parts, this one has {parts}", "input"
        )
    messages = messages_of(items, request.instructions)
    if not messages:
        problem = "has only calls that are not whole" if items else "must not be empty"
        raise InvalidRequestError(f"input: {problem}", "input")
    choice, tools = _tools(request)
    reasoning = request.reasoning
    return ChatRequest(
        messages=messages,
        params=_params(request, state),
        model=request.model or None,
        tools=[_as_chat_has_it(tool) for tool in tools],
        tool_choice=choice,
        template_kwargs=checked_kwargs(request.chat_template_kwargs, state),
        reasoning_effort=None if reasoning is None else reasoning.effort,
        request_id=request_id,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
    )


def without_default_strictness(request: ResponseRequest, chat: ChatRequest) -> ChatRequest | None:
    """A conversation whose calls follow schemas only where the request says so.

    None if that makes no difference.
    """
    by_default = {tool.name for tool in request.tools or [] if tool.strict is None}
    tools = [
        tool | {"function": tool["function"] | {"strict": False}}
        if tool["function"]["name"] in by_default
        else tool
        for tool in chat.tools
    ]
    return None if tools == chat.tools else replace(chat, tools=tools)


def input_items(request: ResponseRequest) -> Sequence[Item]:
    """What a request adds to the conversation."""
    if isinstance(request.input, str):
        return [MessageItem(role="user", content=request.input)]
    return request.input


def _params(request: ResponseRequest, state: ServerState) -> SamplingParams:
    check_stop(request.stop, state.config)
    return sampling_from(
        state,
        request,
        max_tokens=request.max_output_tokens,
        logprobs=request.num_logprobs,
        structured_outputs=_form(request),
    )


def _form(request: ResponseRequest) -> StructuredOutputsParams | None:
    """The form of the answer; None is text as it comes."""
    form = None if request.text is None else request.text.format
    if isinstance(form, JSONSchema):
        return StructuredOutputsParams(json=form.schema_)
    return StructuredOutputsParams(json_object=True) if isinstance(form, JSONObject) else None


def _tools(request: ResponseRequest) -> tuple[ToolChoice, list[FunctionTool]]:
    """Whether and what the model calls, and the tools that it is told of."""
    parallel = request.parallel_tool_calls is not False
    tools = request.tools or []
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise InvalidRequestError("tools: two of them have one name", "tools")
    choice = request.tool_choice or "auto"
    if isinstance(choice, FunctionChoice):
        _check_known([choice.name], names, "tool_choice.name")
        return ToolChoice(mode="function", name=choice.name, parallel=parallel), tools
    if isinstance(choice, AllowedTools):
        allowed = [tool.name for tool in choice.tools]
        _check_known(allowed, names, "tool_choice.tools")
        tools = [tool for tool in tools if tool.name in allowed]
        return ToolChoice(mode=choice.mode, parallel=parallel), tools
    if choice == "required" and not tools:
        raise InvalidRequestError("tool_choice='required' needs tools", "tool_choice")
    return ToolChoice(mode=choice, parallel=parallel), tools


def _check_known(wanted: Sequence[str], names: set[str], path: str) -> None:
    for name in wanted:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise InvalidRequestError(f"{path}: {name!r} is not among the tools: {known}", path)


def _as_chat_has_it(tool: FunctionTool) -> dict[str, Any]:
    """A tool in the form that chat templates show; here strictness is the default."""
    strict = tool.strict is not False
    function = tool.model_dump(exclude_none=True, exclude={"type"}) | {"strict": strict}
    return {"type": "function", "function": function}
