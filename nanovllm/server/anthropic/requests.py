"""What clients send to `/v1/messages` and `/v1/messages/count_tokens`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    WHOLE,
    LenientModel,
    ModelName,
    RequestId,
    Share,
    StopString,
    Temperature,
    TokenCount,
    WireModel,
    by_type,
    not_served,
    only_types,
)

MAX_PIECES = 1 << 13
"""Messages and their blocks, all together; checked in some 0.05 s."""
MAX_TOOLS = 512
"""Agents bring those of all the servers that they are connected to."""

NO_SERVER_TOOLS = not_served("a tool is a function of the client's, with an input_schema")


class TextBlock(WireModel):
    """A piece of a text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(WireModel):
    """What the model thought before; its signature is not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(WireModel):
    """Thoughts that another model has sealed, and this one cannot read: they are left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(WireModel):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ONLY_TEXT = "'{kind}' is not supported here: this model reads and writes text; send "
OnlyText = Annotated[TextBlock, only_types(("text",), f"{ONLY_TEXT}text")]
Texts = str | Annotated[list[OnlyText], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST]


class ToolResultBlock(WireModel):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = Field(None, description="Not shown to the model; `content` is.")


BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
Block = Annotated[
    Annotated[TextBlock, Tag("type text")]
    | Annotated[ThinkingBlock, Tag("type thinking")]
    | Annotated[RedactedThinkingBlock, Tag("type redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("type tool_use")]
    | Annotated[ToolResultBlock, Tag("type tool_result")],
    by_type(*BLOCKS),
    only_types(BLOCKS, ONLY_TEXT + " or ".join(BLOCKS)),
]


class Message(WireModel):
    """A turn of a conversation; instructions in its course have the role "system"."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST]


def _check_pieces(messages: Any) -> Any:
    """Bound what the messages consist of, all together, before anything is made of it."""
    if isinstance(messages, list):
        contents = [m.get("content") for m in messages if isinstance(m, dict)]
        blocks = [block for content in contents if isinstance(content, list) for block in content]
        results = [block.get("content") for block in blocks if isinstance(block, dict)]
        num_inner = sum(len(content) for content in results if isinstance(content, list))
        if len(messages) + len(blocks) + num_inner > MAX_PIECES:
            raise PydanticCustomError(
                "not_accepted",
                "may have {most} messages and content blocks all together",
                {"most": MAX_PIECES},
            )
    return messages


Messages = Annotated[list[Message], Field(min_length=1), FAIL_FAST, BeforeValidator(_check_pieces)]
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]


class Tool(WireModel):
    """A function that the model may call.

    Attributes:
        strict: Whether its input follows the schema also where the model may call or not. Where it
            has to call, it always does.
    """

    type: Annotated[Literal["custom"] | None, NO_SERVER_TOOLS] = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(WireModel):
    """Whether and what the model calls; "any" is at least one call, "tool" the one named."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(WireModel):
    """Whether the model thinks before it answers.

    Attributes:
        budget_tokens: Has no effect; `max_tokens` counts thoughts, too.
        display: "omitted" keeps the thoughts to ourselves.
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: TokenCount | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(WireModel):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    """How hard the model tries, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), FAIL_FAST]


class CountTokensRequest(LenientModel):
    """A conversation to count the tokens of."""

    model: ModelName = None
    messages: Messages
    system: Texts | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(
        None, description="What `output_config.format` was called before."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="What the template reads besides, such as `enable_thinking`."
    )
    mcp_servers: Annotated[
        Annotated[list[Any], Field(max_length=0)] | None, not_served("the server calls no other")
    ] = None
    container: Annotated[None, not_served("there are no containers")] = None
    thread: Annotated[dict[str, Any] | None, WithJsonSchema({"type": "null"})] = Field(
        None, description="Refused with a code, by which clients know to go on without."
    )


class MessagesRequest(CountTokensRequest):
    """A conversation to answer."""

    max_tokens: TokenCount = Field(
        description="Tokens to generate at most, thoughts included; it may be more than there is "
        "room for."
    )
    stop_sequences: (
        Annotated[list[StopString], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None
    ) = None
    stream: bool | None = False
    temperature: Temperature | None = None
    top_p: Annotated[Share, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    request_id: RequestId | None = Field(
        None, description="Used in the id of the answer and by `/abort`, as `X-Request-Id` is."
    )
