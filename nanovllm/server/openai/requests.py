"""What clients send to `/v1/completions` and `/v1/chat/completions`."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from nanovllm.config.server import MAX_PROMPTS
from nanovllm.server.openai.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    WHOLE,
    BadWords,
    Int64,
    LogitBias,
    NumLogprobs,
    NumTokens,
    Off,
    OrSay,
    Penalty,
    RepetitionPenalty,
    RequestId,
    Share,
    Stop,
    Temperature,
    Text,
    TokenCount,
    TokenId,
    TokenIds,
    WireModel,
    not_served,
)

MAX_MESSAGES = 1 << 13
"""What is checked in some 0.05 s, and would fill a context of a million tokens."""

ONLY_TEXT = not_served("this model reads and writes text")
NO_GRAMMAR = not_served("structured output comes with a later version")
NO_BEAMS = not_served("there is no beam search; use n")


class StreamOptions(WireModel):
    """How a stream reports what it used.

    Attributes:
        include_usage: Whether a last chunk, without choices, has the usage of the whole request.
        continuous_usage_stats: Whether every chunk has the usage so far.
    """

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class TextFormat(WireModel):
    """The only response format: text as it comes."""

    type: Literal["text"]


class GenerationRequest(WireModel, ABC):
    """What both kinds of request have in common. Fields that OpenAI does not have are vLLM's.

    A field that is null counts as left out. Sampling fields that are left out are what the model's
    `generation_config.json` says.
    """

    # Fields we do not know have no effect; they are kept for a line in the log.
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="A served name; left out, it is the only model.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: TokenCount | None = Field(None, description="Completions of each prompt.")
    best_of: TokenCount | None = Field(None, description="Only the same as `n`.")
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Int64 | None = None
    stop: Stop = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST, WHOLE] | None
    ) = None
    min_tokens: NumTokens | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: Annotated[TokenIds, WHOLE] | None = None
    prompt_logprobs: NumLogprobs | None = None
    truncate_prompt_tokens: Annotated[
        TokenCount | Literal[-1] | None, OrSay("must be at least 1, or -1")
    ] = Field(None, description="Keep so many last tokens of the prompt; -1 is as many as fit.")
    priority: Int64 | None = Field(0, description="Lower runs first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Share cached prefixes only with requests of the same salt."
    )
    request_id: RequestId | None = Field(
        None, description="Used in the id of the answer and by `/abort`, as `X-Request-Id` is."
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Whether log probabilities name tokens "token_id:123".'
    )
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    response_format: Annotated[TextFormat | None, NO_GRAMMAR] = None
    structured_outputs: Annotated[None, NO_GRAMMAR] = None
    guided_json: Annotated[None, NO_GRAMMAR] = None
    guided_regex: Annotated[None, NO_GRAMMAR] = None
    guided_choice: Annotated[None, NO_GRAMMAR] = None
    guided_grammar: Annotated[None, NO_GRAMMAR] = None
    json_schema: Annotated[None, NO_GRAMMAR] = None
    regex: Annotated[None, NO_GRAMMAR] = None
    ebnf: Annotated[None, NO_GRAMMAR] = None
    use_beam_search: Annotated[Off, NO_BEAMS] = None
    prompt_embeds: Annotated[None, not_served("a prompt is text or token ids")] = None
    logits_processors: Annotated[None, not_served("no code of a request is run")] = None
    kv_transfer_params: Annotated[None, not_served("a KV cache stays in its engine")] = None

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None is what is left of the context."""

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives wanted with each token; None is no log probabilities at all."""


Prompt = Annotated[
    Text
    | TokenIds
    | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), FAIL_FAST],
    WHOLE,
    OrSay("must be text, a list of token ids, or a list of those; none of them empty"),
]


class CompletionRequest(GenerationRequest):
    """A prompt to write on from, or several."""

    prompt: Prompt
    max_tokens: NumTokens | None = Field(
        None, description="0 only scores the prompt: see `echo` and `logprobs`."
    )
    logprobs: NumLogprobs | None = None
    echo: bool | None = Field(False, description="Whether the prompt comes before what it gave.")
    add_special_tokens: bool | None = True
    suffix: Annotated[None, not_served("text is only written on, not filled in")] = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


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


class RefusalPart(WireModel):
    """What a message of the assistant says in place of an answer."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


def _kind_of_part(part: Any) -> str:
    # Names with a space, so that they are no part of the path in an error's `param`.
    if isinstance(part, str):
        return "a string"
    is_refusal = isinstance(part, dict) and part.get("type") == "refusal"
    return "a refusal" if is_refusal else "a text"


Part = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[TextPart, Tag("a text")]
    | Annotated[RefusalPart, Tag("a refusal")],
    Discriminator(_kind_of_part),
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


def _check_pieces(messages: Any) -> Any:
    """Bound what the messages consist of, all together, before anything is made of it."""
    if isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        lists = (
            message.get(name)
            for message in messages
            if isinstance(message, dict)
            for name in ("content", "tool_calls")
        )
        if sum(len(pieces) for pieces in lists if isinstance(pieces, list)) > MAX_MESSAGES:
            raise PydanticCustomError(
                "not_accepted",
                "may have {most} content parts and tool calls all together",
                {"most": MAX_MESSAGES},
            )
    return messages


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES),
    FAIL_FAST,
    BeforeValidator(_check_pieces),
]


class Function(WireModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(WireModel):
    """A tool, of which there is one kind."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=128), FAIL_FAST]
Document = Annotated[dict[str, str], FAIL_FAST]


class ChatTemplateOptions(WireModel):
    """How a conversation becomes a prompt."""

    messages: Messages
    add_generation_prompt: bool | None = Field(
        None,
        description="Whether to begin a message of the assistant; by default, unless one is "
        "continued.",
    )
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    documents: Annotated[list[Document], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="What the template reads besides, such as `enable_thinking`."
    )
    chat_template: Annotated[None, not_served("no template of a request is rendered")] = None


class ChatCompletionRequest(ChatTemplateOptions, GenerationRequest):
    """A conversation to answer."""

    max_completion_tokens: TokenCount | None = None
    max_tokens: TokenCount | None = Field(None, description="`max_completion_tokens` wins.")
    logprobs: bool | None = False
    top_logprobs: NumLogprobs | None = None
    echo: bool | None = Field(
        False, description="Whether the answer begins with the message that it continues."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    tool_choice: Annotated[
        Literal["none", "auto"] | None,
        not_served("tools are not called yet; only 'none', or 'auto' without tools"),
    ] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, not_served("use tools")] = None
    function_call: Annotated[Literal["none"] | None, not_served("use tools")] = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None,
        ONLY_TEXT,
    ] = None
    audio: Annotated[None, ONLY_TEXT] = None
    mm_processor_kwargs: Annotated[None, ONLY_TEXT] = None
    prediction: Annotated[None, not_served("nothing is predicted")] = None
    store: Annotated[Off, not_served("nothing is stored")] = None
    web_search_options: Annotated[None, not_served("the server asks no other one")] = None

    @property
    def token_limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
