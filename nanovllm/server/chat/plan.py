"""What is to be generated for a conversation, and how what comes is read."""

import asyncio
import logging
import secrets
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.chat.prompt import render, template_kwargs
from nanovllm.server.chat.request import ChatRequest, ToolChoice
from nanovllm.server.state import ServerState
from nanovllm.text.chat_template import select_chat_template
from nanovllm.text.deltas import ContentDelta, Delta
from nanovllm.text.message_format import MessageFormat
from nanovllm.text.message_parser import MessageParser
from nanovllm.text.parsers.calls import Function
from nanovllm.text.parsers.json_calls import MistralParser

logger = logging.getLogger(__name__)


class PlainParser:
    """Takes all for text."""

    def push(self, text: str) -> list[Delta]:
        """Return what the text adds."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """Return what has been held back."""
        return []


Parser = MessageParser | PlainParser


class Plan(NamedTuple):
    """What is to be generated for a conversation, and how what comes is read.

    Args:
        prompt: The conversation as the model reads it.
        params: What to sample, in the form that the whole message has to have.
        format: How the model writes messages.
        functions: What may be called; without any, nothing is read as a call.
        choice: Whether and how.
    """

    prompt: str
    params: SamplingParams
    format: MessageFormat
    functions: list[Function]
    choice: ToolChoice

    @property
    def reasons(self) -> bool:
        """Whether the model is one that thinks."""
        return self.format.thoughts is not None

    def new_call_id(self) -> str:
        """Name a call; Mistral's templates take nine letters and digits and nothing else."""
        if issubclass(self.format.calls.parser, MistralParser):
            return secrets.token_hex(5)[:9]
        return new_call_id()

    def parser(self) -> Parser:
        """Make what tells thoughts, text and calls of one answer apart."""
        if not (self.functions or self.reasons):
            return PlainParser()
        return self.format.parser(
            self.prompt,
            tools=bool(self.functions),
            reasoning=self.reasons,
            parallel=self.choice.parallel,
            only_calls=self.choice.forced,
            functions=self.functions,
        )


def new_call_id() -> str:
    """A name for a call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


async def make_plan(state: ServerState, request: ChatRequest) -> Plan:
    """Render a conversation, and settle what form the answer has.

    Raises:
        InvalidRequestError: The template does not take the conversation, or the choice of tools is
            none that there is.
    """
    functions = _callable(request)
    prompt = await render(state, request)
    message_format = format_of(state, with_tools=bool(request.tools))
    choice, params = request.tool_choice, request.params
    # In a thread, as a hundred tools take a tenth of a second.
    structure = await asyncio.to_thread(
        message_format.constrain,
        params.structured_outputs,
        functions,
        forced=choice.forced,
        parallel=choice.parallel and choice.mode != "function",
        prompt=prompt,
        thinking=template_kwargs(state, request).get("enable_thinking") is not False,
    )
    told_apart = bool(functions) or message_format.thoughts is not None
    spelled_out = told_apart and message_format.needs_special_tokens
    params = replace(
        params,
        structured_outputs=structure,
        skip_special_tokens=params.skip_special_tokens and not spelled_out,
    )
    return Plan(prompt, params, message_format, functions, choice)


def format_of(state: ServerState, with_tools: bool = False) -> MessageFormat:
    """How the model writes messages.

    Raises:
        InvalidRequestError: An option names a parser that there is none of, or the model has no
            chat template.
    """
    tokenizer, config = state.llm.tokenizer, state.config
    if tokenizer is None:
        raise InvalidRequestError("the model has no tokenizer, and no chat template", "messages")
    template = select_chat_template(tokenizer.chat_templates, with_tools)
    if with_tools and "tools" not in template:
        _warn_of_deafness(template)
    if template not in state.message_formats:
        state.message_formats[template] = MessageFormat.detect(
            template, tokenizer, config.tool_call_parser, config.reasoning_parser
        )
    return state.message_formats[template]


@lru_cache(maxsize=8)
def _warn_of_deafness(template: str) -> None:  # noqa: ARG001  # once for each
    logger.warning(
        "the chat template does not show tools to the model: it calls them only where it has to"
    )


def _callable(request: ChatRequest) -> list[Function]:
    """The functions that the choice among the tools leaves to be called.

    Raises:
        InvalidRequestError: It asks for a call of what is not there.
    """
    choice = request.tool_choice
    functions = [tool["function"] for tool in request.tools]
    if choice.mode == "none":
        return []
    if choice.mode == "required" and not functions:
        raise InvalidRequestError(
            "tool_choice: a call is required, and there are no tools", "tool_choice"
        )
    if choice.mode != "function":
        return functions
    named = [function for function in functions if function["name"] == choice.name]
    if not named:
        names = ", ".join(function["name"] for function in functions)
        raise InvalidRequestError(
            f"tool_choice: {choice.name!r} is none of the tools: {names or 'none'}", "tool_choice"
        )
    return named
