"""What we answer on `/v1`: the shapes of the JSON, for the type checker and for OpenAPI."""

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from nanovllm.server.chat.logprobs import ChatTokenLogprob


class PromptTokensDetails(TypedDict):
    """How many tokens of the prompts were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    """How many of the generated tokens were thoughts, as near as their text tells."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Tokens of all prompts and all completions of a request.

    Models that think have `completion_tokens_details`.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class PromptLogprob(TypedDict):
    """Log probability of one token at one position of a prompt, as vLLM reports it."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(TypedDict):
    """Log probabilities of a text, a list a kind; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: NotRequired[PromptLogprobs | None]
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatLogprobs(TypedDict):
    """Log probabilities of a message."""

    content: list[ChatTokenLogprob]
    refusal: None


class MadeFunctionCall(TypedDict):
    """The function of a call, and its arguments as JSON text."""

    name: str
    arguments: str


class MadeToolCall(TypedDict):
    """A call in an answer."""

    id: str
    type: Literal["function"]
    function: MadeFunctionCall


class AssistantMessage(TypedDict):
    """The answer to a conversation.

    What the model has thought is there under both of its usual names.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[MadeToolCall]]


class ChatCompletionChoice(TypedDict):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatCompletionChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs | None]
    prompt_token_ids: NotRequired[list[int]]


class FunctionCallChunk(TypedDict):
    """A function's name, in a call's first chunk alone, and more of its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallChunk(TypedDict):
    """What a chunk adds to a call; the first one has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallChunk


class MessageDelta(TypedDict, total=False):
    """What a chunk adds to a message."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallChunk]


class ChatDeltaChoice(TypedDict):
    """What a chunk adds to one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class ModelPermission(TypedDict):
    """What OpenAI's list says of a model, and old clients read."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: None
    is_blocking: bool


class Model(TypedDict):
    """A name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]
