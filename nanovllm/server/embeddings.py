"""Embeddings for a client, in whatever dialect it asks for them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import Response

from nanovllm.errors import InvalidRequestError
from nanovllm.server import whole_answer
from nanovllm.server.generation import RequestInParts
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import encode
from nanovllm.text.embeddings import embedding_of
from nanovllm.text.input_processor import Prompt

MAX_TEXTS = 2048
"""Of one request, as at OpenAI, unless `max_prompts` is more."""


class Wanted(NamedTuple):
    """What to embed, and how.

    Args:
        prompts: Texts or token ids.
        fields: The client's names for our arguments, for errors.
        dimensions: How many numbers of each embedding to keep; None is all.
        truncate_prompt_tokens: Keep so many first tokens of a prompt; -1 is as many as fit.
        add_special_tokens: Whether the tokenizer adds its own to texts.
        priority: Lower runs first.
        cache_salt: Share cached prefixes only with requests of the same salt.
        lora_name: A registered adapter; None is none.
        given_id: What the client calls its request, unless a header says it.
    """

    prompts: Sequence[Prompt]
    fields: dict[str, str]
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str | None = None
    lora_name: str | None = None
    given_id: str | None = None


class Embedded(NamedTuple):
    """Embeddings, float32 `[dimensions]` each, and what it took.

    Args:
        request_id: What the client knows the request by.
        embeddings: One for each prompt.
        num_prompt_tokens: Tokens of all prompts.
        num_cached_tokens: Of these, tokens that came from the prefix cache.
    """

    request_id: str
    embeddings: list[npt.NDArray[np.float32]]
    num_prompt_tokens: int
    num_cached_tokens: int


def written(embedding: npt.NDArray[np.float32]) -> msgspec.Raw:
    """The numbers as JSON: one embedding at a time, or the event loop had to wait for them all."""
    return msgspec.Raw(encode(embedding.tolist()))


async def respond(
    http: Request, state: ServerState, wanted: Wanted, tell: Callable[[Embedded], object]
) -> Response:
    """Embed and answer; see `whole_answer.respond`.

    Args:
        http: The connection the request came by.
        state: The server.
        wanted: What is asked.
        tell: Makes the body of the answer.
    """
    return await whole_answer.respond(
        http,
        wanted.given_id,
        wanted.fields,
        lambda name: _embed(state, wanted, name),
        lambda embedded: sum(len(embedding) for embedding in embedded.embeddings),
        tell,
    )


async def _embed(state: ServerState, wanted: Wanted, name: str) -> Embedded:
    most = max(MAX_TEXTS, state.config.max_prompts)
    if len(wanted.prompts) > most:
        raise InvalidRequestError(
            f"a request may have {most} texts, got {len(wanted.prompts)}", "prompt"
        )
    request = RequestInParts(state, name)
    params = state.llm.embedding_params(wanted.dimensions, wanted.truncate_prompt_tokens)
    embeddings, num_prompt_tokens, num_cached_tokens = [], 0, 0
    for prompts in request.parts(wanted.prompts):
        run = await request.run(
            prompts,
            params,
            add_special_tokens=wanted.add_special_tokens,
            embeds=True,
            priority=wanted.priority,
            cache_salt=wanted.cache_salt,
            lora_name=wanted.lora_name,
        )
        hidden = [output.embedding for output in run.outputs if output.embedding is not None]
        embeddings += [embedding_of(each, wanted.dimensions) for each in hidden]
        num_prompt_tokens += run.num_prompt_tokens
        num_cached_tokens += run.num_cached_tokens
    return Embedded(name, embeddings, num_prompt_tokens, num_cached_tokens)
