"""What clients send to `/v1/responses`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from nanovllm.server.chat.wire import MAX_TOOLS, FunctionName, SampledRequest
from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    NumLogprobs,
    Off,
    RequestId,
    TokenCount,
    WireModel,
    by_type,
    not_served,
    only_types,
)
from nanovllm.server.responses.items import Items


class PlainText(WireModel):
    """Text as it comes."""

    type: Literal["text"]


class JSONObject(WireModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JSONSchema(WireModel):
    """JSON that a schema describes; it is always kept to, whatever `strict` says."""

    type: Literal["json_schema"]
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


TextFormat = Annotated[PlainText | JSONObject | JSONSchema, Discriminator("type")]


class TextOptions(WireModel):
    """What the answer's text has to look like."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Has no effect.")


class ReasoningOptions(WireModel):
    """How much the model thinks."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Has no effect: what the model thinks is returned as it is."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


ONLY_FUNCTIONS = "'{kind}' is not supported: the client's functions are the only tools"


class FunctionTool(WireModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Whether arguments are kept to the schema; by default they are."
    )


class FunctionChoice(WireModel):
    """The function that has to be called."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(WireModel):
    """Some of the tools, of which the model may or has to call one."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[FunctionChoice, only_types(("function",), ONLY_FUNCTIONS)]],
        Field(min_length=1, max_length=MAX_TOOLS),
        FAIL_FAST,
    ]


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a string")]
    | Annotated[FunctionChoice, Tag("type function")]
    | Annotated[AllowedTools, Tag("type allowed_tools")],
    by_type("function", "allowed_tools", or_string=True),
    only_types(("function", "allowed_tools"), ONLY_FUNCTIONS),
]
Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16),
    FAIL_FAST,
]


class StreamOptions(WireModel):
    """How a stream looks."""

    include_obfuscation: bool | None = Field(None, description="Has no effect: there is none.")


class ResponseRequest(SampledRequest):
    """A conversation to answer, and how. Fields that OpenAI does not have are vLLM's."""

    input: str | Items
    instructions: str | None = Field(
        None, description="Comes first, and is not kept for `previous_response_id`."
    )
    previous_response_id: str | None = Field(None, description="Go on from a stored response.")
    tools: (
        Annotated[
            list[Annotated[FunctionTool, only_types(("function",), ONLY_FUNCTIONS)]],
            Field(max_length=MAX_TOOLS),
            FAIL_FAST,
        ]
        | None
    ) = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="What the template reads besides, such as `enable_thinking`."
    )
    conversation: Annotated[None, not_served("use previous_response_id")] = None
    prompt: Annotated[None, not_served("there are no stored prompts")] = None
    context_management: Annotated[None, not_served("a conversation is never compacted")] = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(True, description="Whether to keep the response for a while.")
    background: Annotated[Off, not_served("an answer is waited for; use stream")] = None
    include: Annotated[list[Include], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None = None
    max_output_tokens: TokenCount | None = None
    max_tool_calls: TokenCount | None = Field(None, description="Has no effect: of built-in tools.")
    metadata: Metadata | None = None
    top_logprobs: NumLogprobs | None = None
    request_id: RequestId | None = Field(
        None, description="Used by `/abort`, as `X-Request-Id` is."
    )
    moderation: Annotated[None, not_served("nothing is moderated")] = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted with each token; None is no log probabilities at all."""
        if self.top_logprobs or "message.output_text.logprobs" in (self.include or ()):
            return self.top_logprobs or 0
        return None
