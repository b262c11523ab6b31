"""Decisions for a client, in whatever dialect it asks for them."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import Response
from pydantic import Field

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server import whole_answer
from nanovllm.server.chat.checks import note_ignored
from nanovllm.server.chat.plan import format_of
from nanovllm.server.chat.prompt import checked_kwargs, render
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.fields import CacheSalt, LenientModel, ModelName, Priority, RequestId
from nanovllm.server.generation import RequestInParts
from nanovllm.server.state import ServerState
from nanovllm.text.decisions import Decision, Labels, Question

MAX_QUESTIONS = 400
"""Of one request, as at OpenAI."""


class DecisionOptions(LenientModel):
    """What any request for decisions may say besides."""

    model: ModelName = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="What the template reads besides; `enable_thinking` is false."
    )
    priority: Priority = 0
    cache_salt: CacheSalt = None
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
        model: The name of who has decided.
        decisions: One for each question.
        num_prompt_tokens: Tokens of the prompts, of which there is one for each question.
        num_cached_tokens: Of these, tokens that came from the prefix cache.
    """

    request_id: str
    model: str
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
    """Decide and answer; see `whole_answer.respond`.

    Args:
        http: The connection the request came by.
        state: The server.
        options: How.
        asked: What.
        tell: Makes the body of the answer.
    """
    state.check_model(options.model or None)
    note_ignored(options)
    return await whole_answer.respond(
        http,
        options.request_id,
        {"messages": asked.param, "prompt": asked.param},
        lambda name: _decide(state, options, asked, name),
        lambda decided: sum(len(decision.probabilities) for decision in decided.decisions),
        tell,
    )


async def _decide(state: ServerState, options: DecisionOptions, asked: Asked, name: str) -> Decided:
    if not asked.messages:  # there may be nothing but thoughts that we cannot read
        raise InvalidRequestError(f"{asked.param}: must not be empty", asked.param)
    request = RequestInParts(state, name)
    prompt_of = _prompts(state, options, asked, name)
    model = options.model or None
    prompt = await prompt_of("?")
    labels = _labels(state, prompt)
    # In a thread: a label takes some microseconds, and there may be hundreds of them.
    labelled = await asyncio.to_thread(
        lambda: [labels.of(question) for question in asked.questions]
    )
    decisions: list[Decision] = []
    num_prompt_tokens = num_cached_tokens = 0
    for part in request.parts(labelled, len(prompt)):
        of_labels = itertools.chain.from_iterable(question.token_ids for question in part)
        token_ids = sorted(set(itertools.chain.from_iterable(of_labels)))
        run = await request.run(
            [await prompt_of(question.text) for question in part],
            SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=token_ids),
            add_special_tokens=False,
            priority=options.priority or 0,
            cache_salt=options.cache_salt,
            lora_name=state.text_adapter(model),
        )
        num_prompt_tokens += run.num_prompt_tokens
        num_cached_tokens += run.num_cached_tokens
        for question, output in zip(part, run.outputs, strict=True):
            completion = output.outputs[0]
            (logprobs,), (likeliest,) = completion.logprobs or [], completion.token_ids
            decisions.append(Decision.of(logprobs, question.token_ids, likeliest))
    answering = state.answering_name(model)
    return Decided(name, answering, decisions, num_prompt_tokens, num_cached_tokens)


def _prompts(
    state: ServerState, options: DecisionOptions, asked: Asked, name: str
) -> Callable[[str], Awaitable[str]]:
    """What makes a prompt of a question."""
    kwargs = {"enable_thinking": False} | checked_kwargs(options.chat_template_kwargs, state)

    async def prompt_of(question: str) -> str:
        request = ChatRequest(
            messages=_with_question(asked.messages, question),
            params=SamplingParams(),  # rendering takes no notice of it
            template_kwargs=kwargs,
            request_id=name,
        )
        return await render(state, request)

    return prompt_of


def _with_question(messages: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """A conversation that ends in a question, in what the user says last if that is its end."""
    *before, last = messages
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": question}]
    content = "\n\n".join(filter(None, [last["content"], question]))
    return [*before, last | {"content": content}]


def _labels(state: ServerState, prompt: str) -> Labels:
    """The labels that a reply to such a prompt may begin with.

    Raises:
        InvalidRequestError: It begins with something else.
    """
    tokenizer = state.llm.tokenizer
    if tokenizer is None:
        raise InvalidRequestError("the model has no tokenizer, and no chat template", "model")
    if format_of(state).begins_with_thoughts(prompt):
        raise InvalidRequestError(
            "the model thinks before it answers, so that its first token decides nothing: ask one "
            "that does not, or whose thinking chat_template_kwargs can turn off",
            "chat_template_kwargs",
        )
    return Labels(tokenizer, prompt)
