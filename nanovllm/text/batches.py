"""One prompt or many, as callers of `LLM` give them, and what goes with each."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.input_processor import Prompt


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list, where a single one may be text, token ids or a mapping.

    Raises:
        InvalidRequestError: They are neither one prompt nor several.
    """
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    try:
        batch: list[Any] = list(prompts)
    except TypeError as e:
        raise InvalidRequestError(
            f"prompts must be a prompt or a list of them, got {prompts!r:.80}", "prompt"
        ) from e
    single = len(batch) > 0 and all(isinstance(item, Integral) for item in batch)
    return [batch] if single else batch


def as_conversations(messages: Any) -> list[Any]:
    """Conversations as a list, where there may be a single one; what is neither is one, too."""
    if not isinstance(messages, Sequence) or (messages and isinstance(messages[0], Mapping)):
        return [messages]
    return list(messages)


def params_for_each(
    given: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """One set of parameters for each prompt, given one for all or a list of as many.

    Raises:
        InvalidRequestError: They are neither.
    """
    if isinstance(given, SamplingParams):
        return [given] * num_prompts
    if not isinstance(given, Sequence) or not all(isinstance(p, SamplingParams) for p in given):
        raise InvalidRequestError(
            f"sampling_params must be SamplingParams or a list of them, got {given!r:.80}",
            "sampling_params",
        )
    if len(given) != num_prompts:
        raise InvalidRequestError(
            f"{num_prompts} prompts need as many sampling_params, or one for all; got {len(given)}",
            "sampling_params",
        )
    return list(given)


def priority_for_each(given: Sequence[int] | None, num_prompts: int) -> list[int]:
    """The priority of each prompt.

    Raises:
        InvalidRequestError: There are more or fewer than prompts, or they are no integers.
    """
    if given is None:
        return [0] * num_prompts
    valid = isinstance(given, Sequence) and all(type(priority) is int for priority in given)
    if not valid or len(given) != num_prompts:
        raise InvalidRequestError(
            f"priority must be a list of {num_prompts} integers, one for each prompt, got "
            f"{given!r:.80}",
            "priority",
        )
    return list(given)
