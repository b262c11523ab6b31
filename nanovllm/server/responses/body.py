"""The response as an object: what was answered, and how it was asked for."""

import time
from typing import Any

from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.chat.run import ChatUsage
from nanovllm.server.responses.objects import ResponseObject, ResponseUsage
from nanovllm.server.responses.request import FunctionTool, ResponseRequest


def unfinished(
    request: ResponseRequest, chat: ChatRequest, response_id: str, model: str, *, stored: bool
) -> ResponseObject:
    """A response that has only begun.

    Args:
        request: What is asked.
        chat: What has been made of it.
        response_id: What it can be asked for by.
        model: What the model is called.
        stored: Whether it will be kept.
    """
    reasoning = request.reasoning
    params = chat.params
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "tools": [_echoed(tool) for tool in request.tools or []],
        "tool_choice": _choice(request),
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "text": _text(request),
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": None},
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_logprobs": request.top_logprobs or 0,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "truncation": request.truncation or "disabled",
        "store": stored,
        "background": False,
        "service_tier": "default",
        "metadata": request.metadata or {},
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def usage_of(usage: ChatUsage) -> ResponseUsage:
    """Tokens in the API's words; nobody pays for writing to our cache."""
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_completion,
    }


def _echoed(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump() | {"strict": tool.strict is not False}


def _choice(request: ResponseRequest) -> str | dict[str, Any]:
    choice = request.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _text(request: ResponseRequest) -> dict[str, Any]:
    options = request.text
    given = {} if options is None else options.model_dump(by_alias=True, exclude_none=True)
    return {"format": {"type": "text"}} | given
