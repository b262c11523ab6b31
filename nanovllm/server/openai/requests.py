"""What clients send to `/v1/completions` and `/v1/chat/completions`."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field

from nanovllm.config.server import MAX_PROMPTS
from nanovllm.server.chat.wire import SampledRequest
from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    WHOLE,
    NumLogprobs,
    NumTokens,
    Off,
    OrSay,
    RequestId,
    Text,
    TokenCount,
    TokenId,
    TokenIds,
    TruncateTo,
    WireModel,
    not_served,
)
from nanovllm.server.openai.messages import ONLY_TEXT, Messages, ToolChoice, Tools
from nanovllm.server.openai.structure import StructureFields

MAX_SCORED_IDS = 128
"""Of a request's `logprob_token_ids`: each is told of with every token."""
NO_BEAMS = not_served("there is no beam search; use n")


class StreamOptions(WireModel):
    """How a stream reports what it used.

    Attributes:
        include_usage: Whether a last chunk, without choices, has the usage of the whole request.
        continuous_usage_stats: Whether every chunk has the usage so far.
    """

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationRequest(SampledRequest, StructureFields, ABC):
    """What both kinds of request have in common."""

    stream_options: StreamOptions | None = None
    n: TokenCount | None = Field(None, description="Completions of each prompt.")
    best_of: TokenCount | None = Field(None, description="Only the same as `n`.")
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST, WHOLE] | None
    ) = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: Annotated[TokenIds, WHOLE] | None = None
    logprob_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_SCORED_IDS), FAIL_FAST, WHOLE] | None
    ) = Field(
        None, description="Tokens to tell of in place of the likeliest ones; needs `logprobs`."
    )
    prompt_logprobs: NumLogprobs | None = None
    truncate_prompt_tokens: TruncateTo = Field(
        None, description="Keep so many last tokens of the prompt; -1 is as many as fit."
    )
    request_id: RequestId | None = Field(
        None, description="Used in the id of the answer and by `/abort`, as `X-Request-Id` is."
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Whether log probabilities name tokens "token_id:123".'
    )
    metadata: dict[str, Any] | None = None

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


def as_prompts(prompt: Prompt) -> list[str | list[int]]:
    """The prompts that a field has, one or several."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


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
        return as_prompts(self.prompt)


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
    enable_thinking: bool | None = Field(
        None, description="As in `chat_template_kwargs`, for models that can do without."
    )
    tool_choice: ToolChoice | None = Field(
        None, description='By default "auto" if there are tools.'
    )
    parallel_tool_calls: bool | None = Field(
        True, description="Whether there may be more than one call."
    )
    include_reasoning: bool | None = Field(
        True, description="Whether the answer has what the model thought before it."
    )
    functions: Annotated[None, not_served("use tools")] = None
    function_call: Annotated[Literal["none"] | None, not_served("use tools")] = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None,
        ONLY_TEXT,
    ] = None
    audio: Annotated[None, ONLY_TEXT] = None
    mm_processor_kwargs: Annotated[None, ONLY_TEXT] = None
    store: bool | None = Field(None, description="Without effect: chat completions are not kept.")
    web_search_options: Annotated[None, not_served("the server asks no other one")] = None

    @property
    def token_limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
