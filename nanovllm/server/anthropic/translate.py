"""From Anthropic's request to the one that all dialects share."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.server.anthropic import requests as wire
from nanovllm.server.chat.checks import check_stop, note_ignored
from nanovllm.server.chat.prompt import as_one, checked_kwargs
from nanovllm.server.chat.request import ChatRequest, ToolChoice
from nanovllm.server.errors import APIError
from nanovllm.server.sampling import sampling_from
from nanovllm.server.state import ServerState
from nanovllm.text.conversations import call_of

BILLING = "x-anthropic-billing-header"
"""Claude Code begins its instructions with it, different in each request: no prefix would be
cached."""
BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
"""What messages of a role consist of."""


def chat_request(
    request: wire.CountTokensRequest, state: ServerState, request_id: str
) -> ChatRequest:
    """Return the conversation of a request.

    Args:
        request: What the client sent.
        state: The server.
        request_id: What the client knows the request by.

    Raises:
        InvalidRequestError: The request contradicts itself, or asks for more than there is.
        APIError: It is but the rest of a conversation; the clients that send such know its code.
    """
    if request.thread is not None:
        message = "thread: not supported: no conversation is kept; send the whole of it"
        raise APIError(400, message, param="thread", code="thread_unsupported_request")
    note_ignored(request)
    messages = _messages(request)
    continues = messages[-1]["role"] == "assistant"
    if continues and "tool_calls" in messages[-1]:
        raise InvalidRequestError(
            f"messages.{len(request.messages) - 1}: tool_use is the last there is; a message of "
            "the user with the tool_result has to follow",
            "messages",
        )
    thinking, config = request.thinking, request.output_config
    thinks = {} if thinking is None else {"enable_thinking": thinking.type != "disabled"}
    return ChatRequest(
        messages=messages,
        params=_params(request, state),
        model=request.model or None,
        tools=[_function(tool) for tool in request.tools or []],
        tool_choice=_tool_choice(request.tool_choice),
        template_kwargs=thinks | checked_kwargs(request.chat_template_kwargs, state),
        reasoning_effort=None if config is None else config.effort,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        may_clip=True,
        request_id=request_id,
    )


def _params(request: wire.CountTokensRequest, state: ServerState) -> SamplingParams:
    if not isinstance(request, wire.MessagesRequest):
        return sampling_from(state, request, max_tokens=1)
    check_stop(request.stop_sequences, state.config, "stop_sequences")
    return sampling_from(
        state,
        request,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences or None,
        structured_outputs=_form(request),
    )


def _form(request: wire.CountTokensRequest) -> StructuredOutputsParams | None:
    config = request.output_config
    wanted = request.output_format or (config and config.format)
    return StructuredOutputsParams(json=wanted.schema_) if wanted else None


def _function(tool: wire.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: wire.ToolChoice | None) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequestError(
                "tool_choice.name: must be the tool to call where type is 'tool'",
                "tool_choice.name",
            )
        return ToolChoice(mode="function", name=choice.name, parallel=parallel)
    return ToolChoice(mode="required" if choice.type == "any" else choice.type, parallel=parallel)


def _messages(request: wire.CountTokensRequest) -> list[dict[str, Any]]:
    """The conversation as templates read it: results are messages, and turns alternate."""
    system = request.system
    if isinstance(system, list):
        system = [block for block in system if not block.text.startswith(BILLING)]
    instructions = _text_of(system)
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for index, message in enumerate(request.messages):
        _check_blocks(message, f"messages.{index}.content")
        messages += _as_templates_read(message)
    turns: list[dict[str, Any]] = []
    for role, group in groupby(messages, key=itemgetter("role")):
        said = list(group)
        turns += said if role == "tool" else [as_one(said)]
    return turns


def _as_templates_read(message: wire.Message) -> list[dict[str, Any]]:
    """A turn as one message, and one more before it for each result in it."""
    blocks = message.content
    if isinstance(blocks, str):
        return [{"role": message.role, "content": blocks}]
    results = [
        {"role": "tool", "content": _text_of(block.content), "tool_call_id": block.tool_use_id}
        for block in blocks
        if isinstance(block, wire.ToolResultBlock)
    ]
    thoughts = "\n".join(b.thinking for b in blocks if isinstance(b, wire.ThinkingBlock))
    calls = [call_of(b.id, b.name, b.input) for b in blocks if isinstance(b, wire.ToolUseBlock)]
    texts = [block for block in blocks if isinstance(block, wire.TextBlock)]
    read: dict[str, Any] = {"role": message.role, "content": _text_of(texts)}
    if thoughts:
        read["reasoning_content"] = thoughts
    if calls:
        read["tool_calls"] = calls
    says_nothing = not (texts or thoughts or calls)
    return results if results and says_nothing else [*results, read]


def _check_blocks(message: wire.Message, path: str) -> None:
    """Refuse what only the other side can say."""
    for index, block in enumerate([] if isinstance(message.content, str) else message.content):
        if block.type not in BLOCKS_OF[message.role]:
            raise InvalidRequestError(
                f"{path}.{index}: a message of the role '{message.role}' has no '{block.type}'; "
                f"it may have {' or '.join(BLOCKS_OF[message.role])}",
                f"{path}.{index}",
            )


def _text_of(content: str | Sequence[wire.TextBlock] | None) -> str:
    """The text of a content; blocks are lines."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)
