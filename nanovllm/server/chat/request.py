"""A conversation to answer: what every dialect is translated to."""

from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Whether and what the model calls.

    Args:
        mode: "auto" is up to the model, "required" at least one call, "none" no call; "function"
            is the one of `name`.
        name: See above.
        parallel: Whether there may be more than one call.
    """

    mode: Literal["auto", "required", "none", "function"] = "auto"
    name: str | None = None
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the model has to call."""
        return self.mode in ("required", "function")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to answer.

    Args:
        messages: As chat templates read them: "role", "content" (text), and for the assistant
            "tool_calls" (`{"id", "type": "function", "function": {"name", "arguments": {...}}}`)
            and "reasoning_content", for tools "tool_call_id".
        params: What to sample for each completion; `structured_outputs` is the form of the answer.
        model: What the client called the model; None is the only one.
        tools: Functions that the model may call, in OpenAI's form:
            `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`.
        tool_choice: Whether and what it calls.
        documents: Texts for retrieval.
        template_kwargs: What the chat template reads besides, such as `enable_thinking`.
        reasoning_effort: OpenAI's, for templates that read it; "none" turns thinking off.
        add_generation_prompt: Whether to begin a message of the assistant.
        continue_final_message: Whether the last message is gone on with.
        add_special_tokens: Whether the tokenizer adds its own to the rendered prompt.
        may_clip: Whether the answer may get fewer tokens than `max_tokens` for want of room.
        request_id: What the client knows the request by.
        priority: Lower runs first.
        cache_salt: Share cached prefixes only with requests of the same salt.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    model: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice()  # it is frozen
    documents: list[dict[str, str]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    may_clip: bool = False
    request_id: str
    priority: int = 0
    cache_salt: str | None = None
