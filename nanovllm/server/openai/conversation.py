"""From OpenAI's words for a conversation to ours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.chat.prompt import checked_kwargs
from nanovllm.server.chat.request import ChatRequest, ToolChoice
from nanovllm.server.openai.messages import AllowedToolsChoice, NamedTool
from nanovllm.server.openai.requests import ChatCompletionRequest, ChatTemplateOptions
from nanovllm.server.state import ServerState
from nanovllm.text.conversations import as_templates_read


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
        messages=as_templates_read(_dumped(options.messages)),
        params=SamplingParams(),
        tools=_dumped(options.tools),
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


def _dumped(given: Sequence[BaseModel] | None) -> list[dict[str, Any]]:
    return [item.model_dump(exclude_none=True) for item in given or ()]


def _callable_tools(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The tools, of which a request may allow but some."""
    tools, choice = _dumped(request.tools), request.tool_choice
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
