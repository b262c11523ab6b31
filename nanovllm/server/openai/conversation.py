"""From OpenAI's words for a conversation to ours."""

from dataclasses import replace
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.chat.prompt import checked_kwargs
from nanovllm.server.chat.request import ChatRequest, ToolChoice
from nanovllm.server.openai.messages import AllowedToolsChoice, Message, NamedTool, ToolCall
from nanovllm.server.openai.requests import ChatCompletionRequest, ChatTemplateOptions
from nanovllm.server.state import ServerState
from nanovllm.text.conversations import arguments_of, call_of


def template_request(options: ChatTemplateOptions, state: ServerState) -> ChatRequest:
    """Return a conversation that is only to be rendered.

    Raises:
        InvalidRequestError: A call's arguments are no object, or a variable in
            `chat_template_kwargs` is not one that a request may set.
    """
    continues = bool(options.continue_final_message)
    begins = options.add_generation_prompt
    return ChatRequest(
        request_id="",
        messages=[
            _as_template_reads(message, f"messages.{index}")
            for index, message in enumerate(options.messages)
        ],
        params=SamplingParams(),
        tools=_tools(options),
        documents=options.documents,
        template_kwargs=checked_kwargs(options.chat_template_kwargs, state),
        add_generation_prompt=not continues if begins is None else begins,
        continue_final_message=continues,
        add_special_tokens=bool(options.add_special_tokens),
    )


def chat_request(
    request: ChatCompletionRequest, state: ServerState, params: SamplingParams, request_id: str
) -> ChatRequest:
    """Return a conversation to answer.

    Raises:
        InvalidRequestError: See `template_request`; or a tool is chosen that there is none of.
    """
    asked = template_request(request, state)
    thinking = request.enable_thinking
    return replace(
        asked,
        params=params,
        template_kwargs=({} if thinking is None else {"enable_thinking": thinking})
        | asked.template_kwargs,
        model=request.model or None,
        tools=_callable_tools(request),
        tool_choice=_tool_choice(request),
        reasoning_effort=request.reasoning_effort,
        request_id=request_id,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
    )


def _tools(options: ChatTemplateOptions) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in options.tools or []]


def _callable_tools(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The tools, of which a request may allow but some."""
    tools, choice = _tools(request), request.tool_choice
    if not isinstance(choice, AllowedToolsChoice):
        return tools
    by_name = {tool["function"]["name"]: tool for tool in tools}
    allowed = [tool.function.name for tool in choice.allowed_tools.tools]
    for index, name in enumerate(allowed):
        if name not in by_name:
            path = f"tool_choice.allowed_tools.tools.{index}.function.name"
            raise InvalidRequestError(f"{path}: {name!r} is none of the tools", path)
    return [by_name[name] for name in dict.fromkeys(allowed)]


def _tool_choice(request: ChatCompletionRequest) -> ToolChoice:
    choice, parallel = request.tool_choice, request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        return ToolChoice(mode="function", name=choice.function.name, parallel=parallel)
    if isinstance(choice, AllowedToolsChoice):
        return ToolChoice(mode=choice.allowed_tools.mode, parallel=parallel)
    return ToolChoice(mode=choice or "auto", parallel=parallel)


def text_of(message: Message) -> str:
    """The text of a message; parts are lines."""
    content = message.content
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else part.text for part in content)
    return content or ""


def _as_template_reads(message: Message, path: str) -> dict[str, Any]:
    """A message as templates expect it.

    Args:
        message: The message.
        path: Where in the request it is.
    """
    read: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    for name in ("name", "reasoning", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            read[name] = value
    if message.tool_calls:
        read["tool_calls"] = [
            _call(call, f"{path}.tool_calls.{index}.function.arguments")
            for index, call in enumerate(message.tool_calls)
        ]
    return read


def _call(call: ToolCall, path: str) -> dict[str, Any]:
    function = call.function
    return call_of(call.id, function.name, arguments_of(function.arguments, path))
