"""What we answer on `/api`: the shapes of the JSON, for the type checker and for OpenAPI."""

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict


class OllamaErrorResponse(TypedDict):
    """The body of every response that is not a success."""

    error: str


class TokenLogprob(TypedDict):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TokenLogprob):
    """The token that was taken, and the likeliest ones there."""

    top_logprobs: NotRequired[list[TokenLogprob]]


class CalledFunction(TypedDict):
    """The function that is called; `index` counts the calls of a message."""

    index: int
    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A call of the model."""

    id: str
    function: CalledFunction


class Message(TypedDict):
    """What the model says, or what a line adds to it."""

    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class Answer(TypedDict):
    """What both kinds of answer have in common. The last of a stream has the figures.

    Durations are in nanoseconds.
    """

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[str]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    logprobs: NotRequired[list[Logprob]]


class ChatResponse(Answer):
    """An answer to a conversation."""

    message: Message


class GenerateResponse(Answer):
    """An answer to a prompt."""

    response: str
    thinking: NotRequired[str]


class ModelDetails(TypedDict):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class EmbedResponse(TypedDict):
    """The answer of `/api/embed`; durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class ListedModel(TypedDict):
    """A model there is; `size` is in bytes."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails


class ModelList(TypedDict):
    """The models there are."""

    models: list[ListedModel]


class RunningModel(TypedDict):
    """A model that is loaded; sizes are in bytes, `context_length` in tokens."""

    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: ModelDetails
    expires_at: str
    context_length: int


class RunningModelList(TypedDict):
    """The models that are loaded."""

    models: list[RunningModel]


class ModelDescription(TypedDict):
    """Everything about a model."""

    modelfile: str
    parameters: str
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(TypedDict):
    """Which Ollama it is that this server answers like."""

    version: str
