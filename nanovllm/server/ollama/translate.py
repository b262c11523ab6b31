"""From Ollama's requests to the one that all dialects share."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import count
from typing import Any

from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.server.chat.checks import check_stop, note_ignored
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.ollama import requests as wire
from nanovllm.server.sampling import sampling_from
from nanovllm.server.state import ServerState
from nanovllm.text.conversations import call_of

LATEST = ":latest"
"""The tag that a model's name has in Ollama if it has none."""
NO_OPTIONS = wire.Options.model_validate({})


def model_name(name: str, state: ServerState) -> str:
    """The name as the server has it, which may do without Ollama's tag."""
    return name if name in state.model_names else name.removesuffix(LATEST)


def conversation_of(
    request: wire.ChatRequest | wire.GenerateRequest, state: ServerState, request_id: str
) -> ChatRequest:
    """Return the conversation of a request.

    Args:
        request: What the client sent; it has messages or a prompt.
        state: The server.
        request_id: What the client knows the request by.

    Raises:
        InvalidRequestError: The request contradicts itself, or asks for more than there is.
    """
    tools: list[dict[str, Any]] = []
    if isinstance(request, wire.ChatRequest):
        messages = _messages(request.messages or [])
        tools = [_function(tool.function) for tool in request.tools or []]
    else:
        messages = [{"role": "user", "content": request.prompt or ""}]
        if request.system:
            messages.insert(0, {"role": "system", "content": request.system})
    continues = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    think = request.think
    return ChatRequest(
        messages=messages,
        params=sampling_params(request, state),
        model=model_name(request.model, state),
        tools=tools,
        template_kwargs={} if think is None else {"enable_thinking": think is not False},
        reasoning_effort=think if isinstance(think, str) else None,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        may_clip=True,
        request_id=request_id,
    )


def sampling_params(request: wire.AnswerRequest, state: ServerState) -> SamplingParams:
    """Return what to sample.

    Raises:
        InvalidRequestError: The request asks for more than this server gives.
    """
    options = request.options or NO_OPTIONS
    note_ignored(request, options)
    check_stop(options.stop, state.config, "options.stop")
    return sampling_from(
        state,
        options,
        max_tokens=max(options.num_predict or 0, 0) or None,
        temperature=0.0 if options.top_p == 0 else options.temperature,
        top_p=options.top_p or None,
        repetition_penalty=1.0 if options.repeat_last_n == 0 else options.repeat_penalty,
        seed=None if options.seed is None or options.seed < 0 else options.seed,
        stop=options.stop or None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        structured_outputs=_form(request.format),
    )


def _form(wanted: str | dict[str, Any] | None) -> StructuredOutputsParams | None:
    if not wanted:
        return None
    if isinstance(wanted, str):
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=wanted)


def _function(function: wire.Function) -> dict[str, Any]:
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


def _messages(messages: Sequence[wire.Message]) -> list[dict[str, Any]]:
    """The conversation as templates read it, in which calls and results refer to each other."""
    read: list[dict[str, Any]] = []
    made_ids = (f"call{number:05d}" for number in count())
    open_calls = OpenCalls([])
    for message in messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            item["reasoning_content"] = message.thinking
        if message.tool_calls:
            # Nine letters and digits, which are what Mistral's templates take for an id.
            item["tool_calls"] = [_call(call, next(made_ids)) for call in message.tool_calls]
            open_calls = OpenCalls(item["tool_calls"])
        if message.role == "tool":
            if message.tool_name:
                item["name"] = message.tool_name
            call_id = open_calls.take(message.tool_call_id, message.tool_name)
            if call_id is not None:
                item["tool_call_id"] = call_id
        read.append(item)
    return read


def _call(call: wire.ToolCall, made_id: str) -> dict[str, Any]:
    return call_of(call.id or made_id, call.function.name, call.function.arguments)


class OpenCalls:
    """Calls of a message that wait for their results, which as a rule do not say whose they are.

    Args:
        calls: The calls, in order.
    """

    def __init__(self, calls: Sequence[dict[str, Any]]) -> None:
        self._ids = OrderedDict.fromkeys(call["id"] for call in calls)
        self._of_function: dict[str, deque[str]] = {}
        for call in calls:
            self._of_function.setdefault(call["function"]["name"], deque()).append(call["id"])

    def take(self, call_id: str | None, function: str | None) -> str | None:
        """The id of the call that a result is of, which waits no more; None if there is none.

        Args:
            call_id: The id, if the result has one.
            function: The function whose first call it is, else; None is the first call of any.
        """
        if call_id is None:
            named = self._of_function.get(function or "", deque())
            while named and named[0] not in self._ids:
                named.popleft()
            call_id = named[0] if named else next(iter(self._ids), None)
        if call_id is not None:
            self._ids.pop(call_id, None)
        return call_id
