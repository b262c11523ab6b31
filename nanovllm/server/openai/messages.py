"""What conversations consist of on the wire: messages, and tools with the choice among them."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, Tag
from pydantic_core import PydanticCustomError

from nanovllm.server.chat.wire import MAX_TOOLS, FunctionName, RefusalPart
from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    OrSay,
    WireModel,
    bounded,
    by_type,
    not_served,
)

MAX_MESSAGES = 1 << 13
"""What is checked in some 0.05 s, and would fill a context of a million tokens."""

ONLY_TEXT = not_served("this model reads and writes text")

TextKind = Literal["text", "input_text", "output_text"]


def _check_kind(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in get_args(TextKind):
        raise PydanticCustomError(
            "not_accepted",
            "'{kind}' is not supported: this model reads and writes text",
            {"kind": kind[:80]},
        )
    return kind


class TextPart(WireModel):
    """A piece of a message, under any of the names that OpenAI's two APIs have for text."""

    type: Annotated[TextKind, BeforeValidator(_check_kind)]
    text: str


Part = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[TextPart, Tag("type text")]
    | Annotated[RefusalPart, Tag("type refusal")],
    by_type("text", "refusal", or_string=True),
]


class FunctionCall(WireModel):
    """The function that a message of the assistant called, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(WireModel):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(WireModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None = (
        None
    )
    tool_call_id: str | None = None
    function_call: Annotated[None, not_served("use tool_calls")] = None
    audio: Annotated[None, ONLY_TEXT] = None


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES),
    FAIL_FAST,
    bounded(("content", "tool_calls"), MAX_MESSAGES, "content parts and tool calls"),
]


class Function(WireModel):
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments; left out, it has none.
        strict: Whether its arguments follow the schema also where the model may call or not. Where
            it has to call, they always do.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(WireModel):
    """A tool, of which there is one kind."""

    type: Literal["function"] = "function"
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), FAIL_FAST]


class NamedFunction(WireModel):
    """A function by its name."""

    name: FunctionName


class NamedTool(WireModel):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(WireModel):
    """Which of the tools may be called, and whether one has to be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS), FAIL_FAST]


class AllowedToolsChoice(WireModel):
    """Some of the tools; the model does not hear of the others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice,
    OrSay(
        'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
    ),
]
