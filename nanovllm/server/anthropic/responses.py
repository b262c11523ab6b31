"""What we answer on `/v1/messages`: the shapes of the JSON, for the type checker and OpenAPI."""

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict


class TextContent(TypedDict):
    """A piece of the answer."""

    type: Literal["text"]
    text: str


class ThinkingContent(TypedDict):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(TypedDict):
    """A call; of one that `max_tokens` cut short, as much of its input as there is."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Content = TextContent | ThinkingContent | ToolUseContent


class OutputTokensDetails(TypedDict):
    """Of the output tokens, those of thoughts."""

    thinking_tokens: int


class Usage(TypedDict):
    """Tokens so far. A prompt's are `input_tokens` and those read from the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageResponse(TypedDict):
    """The answer to a conversation."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Content]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage


class TokenCountResponse(TypedDict):
    """How long the prompt of a conversation is."""

    input_tokens: int


class ErrorDetails(TypedDict):
    """What a program may branch on."""

    error_code: str


class AnthropicErrorInfo(TypedDict):
    """What went wrong."""

    type: str
    message: str
    details: NotRequired[ErrorDetails]


class AnthropicErrorResponse(TypedDict):
    """The body of every response that is not a success."""

    type: Literal["error"]
    error: AnthropicErrorInfo
