"""Decisions for a client, in whatever dialect it asks for them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

from fastapi import Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.chat.plan import format_of
from nanovllm.server.chat.prompt import checked_kwargs, render
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.fields import Int64, RequestId, WireModel
from nanovllm.server.generation import Generation, in_parts
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import encode, unless_gone
from nanovllm.text.decisions import Decision, Labels, Question

MAX_QUESTIONS = 400
"""Of one request, as at OpenAI."""


class DecisionOptions(WireModel):
    """What any request for decisions may say besides."""

    # Fields we do not know have no effect; they are kept for a line in the log.
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="A served name; left out, it is the only model.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="What the template reads besides; `enable_thinking` is false."
    )
    priority: Int64 | None = Field(0, description="Lower runs first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Share cached prefixes only with requests of the same salt."
    )
    request_id: RequestId | None = None


class Asked(NamedTuple):
    """What to decide.

    Args:
        messages: What the questions are about, as chat templates read it.
        questions: The questions.
        param: The client's field that the messages come from.
    """

    messages: list[dict[str, Any]]
    questions: Sequence[Question]
    param: str


class Decided(NamedTuple):
    """Decisions, and what they took.

    Args:
        request_id: What the client knows the request by.
        decisions: One for each question.
        num_prompt_tokens: Tokens of the prompts, of which there is one for each question.
        num_cached_tokens: Of these, tokens that came from the prefix cache.
    """

    request_id: str
    decisions: list[Decision]
    num_prompt_tokens: int
    num_cached_tokens: int


async def respond(
    http: Request,
    state: ServerState,
    options: DecisionOptions,
    asked: Asked,
    tell: Callable[[Decided], object],
) -> Response:
    """Decide and answer; a client that leaves ends the work.

    Args:
        http: The connection the request came by.
        state: The server.
        options: How.
        asked: What.
        tell: Makes the body of the answer.

    Raises:
        InvalidRequestError: The request cannot be used.
        UnavailableError: The server is too busy, or its engine died.
        APIError: The same in HTTP's terms.
    """
    name = request_id(http.headers, options.request_id)

    async def answer() -> Response:
        with in_words_of_client({"messages": asked.param, "prompt": asked.param}):
            decided = await _decide(state, options, asked, name)
        content = encode(tell(decided))
        return Response(content, media_type="application/json", headers={HEADER: name})

    return await unless_gone(http, answer())


async def _decide(state: ServerState, options: DecisionOptions, asked: Asked, name: str) -> Decided:
    kwargs = {"enable_thinking": False} | checked_kwargs(options.chat_template_kwargs, state)

    async def prompt_of(question: str) -> str:
        messages = _with_question(asked.messages, question)
        params = SamplingParams()  # rendering takes no notice of it
        return await render(
            state,
            ChatRequest(messages=messages, params=params, template_kwargs=kwargs, request_id=name),
        )

    labels = await _labels(state, await prompt_of("?"))
    labelled = [labels.of(question) for question in asked.questions]
    decisions: list[Decision] = []
    num_prompt_tokens = num_cached_tokens = 0
    for part in in_parts(state, labelled):
        of_labels = itertools.chain.from_iterable(question.token_ids for question in part)
        token_ids = sorted(set(itertools.chain.from_iterable(of_labels)))
        run = await Generation.finished(
            state,
            name,
            [await prompt_of(question.text) for question in part],
            SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=token_ids),
            add_special_tokens=False,
            priority=options.priority or 0,
            cache_salt=options.cache_salt,
            lora_name=state.text_adapter(options.model),
        )
        num_prompt_tokens += run.num_prompt_tokens
        num_cached_tokens += run.num_cached_tokens
        for question, output in zip(part, run.outputs, strict=True):
            completion = output.outputs[0]
            if not completion.logprobs:  # after `/abort`
                raise InvalidRequestError("the request was ended before it was done")
            scores, likeliest = completion.logprobs[0], completion.token_ids[0]
            decisions.append(Decision.of(scores, question.token_ids, likeliest))
    return Decided(name, decisions, num_prompt_tokens, num_cached_tokens)


def _with_question(messages: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """A conversation that ends in a question, in what the user says last if that is its end."""
    *before, last = messages
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": question}]
    return [*before, last | {"content": f"{last['content']}\n\n{question}"}]


async def _labels(state: ServerState, prompt: str) -> Labels:
    """The labels that a reply to such a prompt may begin with.

    Raises:
        InvalidRequestError: It begins with something else.
    """
    if format_of(state).begins_with_thoughts(prompt):
        raise InvalidRequestError(
            "the model thinks before it answers, so that its first token decides nothing: ask one "
            "that does not, or whose thinking chat_template_kwargs can turn off",
            "chat_template_kwargs",
        )
    if state.llm.tokenizer is None:
        raise InvalidRequestError("the model has no tokenizer", "model")
    return Labels(state.llm.tokenizer, prompt)
