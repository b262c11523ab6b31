"""What clients send to Ollama's `/api/chat` and `/api/generate`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    WHOLE,
    Int64,
    LenientModel,
    NumLogprobs,
    OrSay,
    Penalty,
    RepetitionPenalty,
    Share,
    Stop,
    Temperature,
    WireModel,
    bounded,
    not_served,
)

MAX_MESSAGES = 1 << 13
"""And calls in them, all together; what is checked in some 0.05 s."""
MAX_TOOLS = 512

Images = Annotated[
    Annotated[list[str], Field(max_length=0)] | None,
    not_served("this model reads and writes text, not images"),
]
Absent = Annotated[Literal[""] | None, not_served("the model's own template renders the prompt")]
Format = Annotated[
    Literal["", "json"] | dict[str, Any] | None, OrSay('must be "json" or a JSON schema')
]
Think = Annotated[
    bool | Literal["low", "medium", "high", "xhigh", "max"] | None,
    OrSay('must be true, false, or how hard: "low", "medium", "high", "xhigh" or "max"'),
]
KeepAlive = Annotated[
    str | float | None, OrSay('must be seconds or a text such as "5m"; it has no effect')
]


class Options(LenientModel):
    """How to sample. What is for loading a model, or for samplers we have not, has no effect."""

    num_predict: Annotated[int, Field(ge=-2, le=2**31 - 1), WHOLE] | None = Field(
        None,
        description="Tokens to generate at most; it may be more than there is room for. 0 and "
        "below, as by default, is all the room there is.",
    )
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    top_p: Share | None = Field(None, description="0 is greedy.")
    min_p: Share | None = None
    seed: Int64 | None = Field(None, description="Below 0 is none.")
    stop: Stop = None
    repeat_penalty: RepetitionPenalty | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = Field(
        None, description="0 turns `repeat_penalty` off; else it is over the whole context."
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class AnswerRequest(LenientModel):
    """What both kinds of request have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    format: Format = Field(None, description="The form of the answer.")
    options: Options | None = None
    keep_alive: KeepAlive = Field(None, description="The model stays loaded anyway.")
    think: Think = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None


class Function(WireModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(WireModel):
    """A tool, of which there is one kind."""

    type: Literal["function"] | None = "function"
    function: Function


class CalledFunction(WireModel):
    """The function that a message of the assistant called."""

    name: str
    arguments: dict[str, Any]


class ToolCall(WireModel):
    """A call in a message of the assistant."""

    id: str | None = None
    function: CalledFunction


class Message(WireModel):
    """A message of a conversation.

    Attributes:
        tool_name: Which function's result this is, in a message of the role "tool".
        tool_call_id: Which call's, where calls have ids.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None = (
        None
    )
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(AnswerRequest):
    """A conversation to answer; without messages, a question whether the model is there."""

    messages: Annotated[
        Annotated[list[Message], Field(max_length=MAX_MESSAGES), FAIL_FAST] | None,
        bounded(("tool_calls",), MAX_MESSAGES, "tool calls"),
    ] = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FAIL_FAST] | None = None


class GenerateRequest(AnswerRequest):
    """A prompt to answer, or with `raw` to write on from.

    Without a prompt, a question whether the model is there.
    """

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: Images = None
    template: Absent = None
    suffix: Annotated[Literal[""] | None, not_served("text is only written on, not filled in")] = (
        None
    )
    context: Annotated[
        Annotated[list[int], Field(max_length=0)] | None,
        not_served("send the whole conversation to /api/chat"),
    ] = None
