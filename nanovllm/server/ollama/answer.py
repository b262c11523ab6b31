"""The answers to conversations and prompts, whole or as JSON lines."""

import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import Request

from nanovllm.outputs import TokenLogprobs
from nanovllm.server.chat.checks import form_asked_for_by
from nanovllm.server.chat.logprobs import ChatTokenLogprob, TokenNames, chat_logprobs
from nanovllm.server.chat.plan import PlainParser
from nanovllm.server.chat.run import ChatChoice, ChatNews, Conversation
from nanovllm.server.error_shapes import ollama_error
from nanovllm.server.errors import APIError
from nanovllm.server.generation import Cursor, Generation
from nanovllm.server.ollama import requests as wire
from nanovllm.server.ollama.responses import CalledFunction, Message, ToolCall
from nanovllm.server.ollama.translate import conversation_of, model_name, sampling_params
from nanovllm.server.request_id import request_id
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import WholeOrStream, line
from nanovllm.text.deltas import ContentDelta, ReasoningDelta

LINES = "application/x-ndjson"


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


class OllamaAnswer(WholeOrStream):
    """The answer to one request.

    Args:
        request: What is asked.
        http: The connection it came by.
        state: The server.
    """

    takes_comments = False

    def __init__(
        self, request: wire.ChatRequest | wire.GenerateRequest, http: Request, state: ServerState
    ) -> None:
        self.lora_name = state.text_adapter(model_name(request.model, state))
        super().__init__(http, state, request_id(http.headers), streams=request.stream is not False)
        self.request = request
        self._names = TokenNames(state.llm.tokenizer)
        self._num_called = 0
        self._started = time.monotonic_ns()
        self._first_token: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        return super().headers | ({"Content-Type": LINES} if self.streams else {})

    def error_event(self, error: APIError) -> bytes:
        return line(ollama_error(error))

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is nothing to answer: clients ask so to have a model loaded."""

    @abstractmethod
    def said(self, content: str, thinking: str, calls: list[ToolCall]) -> dict[str, Any]:
        """What the model says, in the answer's words."""

    async def _conversation(self) -> Conversation:
        with form_asked_for_by("format"):
            return await self.start()

    async def start(self) -> Conversation:
        """Check the request and queue it."""
        asked = conversation_of(self.request, self.state, self.request_id)
        return await Conversation.start(self.state, asked)

    def _head(self) -> dict[str, Any]:
        return {"model": self.request.model, "created_at": now()}

    def _loaded(self) -> dict[str, Any]:
        reason = "unload" if self.request.keep_alive in (0, "0") else "load"
        return self._head() | self.said("", "", []) | {"done": True, "done_reason": reason}

    async def whole(self) -> dict[str, Any]:
        if self.is_empty:
            return self._loaded()
        conversation = await self._conversation()
        (choice,) = conversation.choices
        try:
            async for news in conversation.news():
                for item in news:
                    self._note_first(item)
                    if item.piece is not None and item.piece.logprobs is not None:
                        choice.logprobs += item.piece.logprobs
        finally:
            await conversation.aclose()
        calls = self._calls(choice, len(choice.tool_calls))
        body = self._head() | self.said(choice.content, choice.reasoning, calls)
        if choice.logprobs:
            body["logprobs"] = self._logprobs(choice.completion.token_ids, choice.logprobs)
        return body | self._figures(conversation)

    async def events(self) -> AsyncGenerator[bytes, None]:
        if self.is_empty:
            yield line(self._loaded())
            return
        conversation = await self._conversation()
        try:
            async for news in conversation.news():
                for item in news:
                    self._note_first(item)
                    if (body := self._addition(item)) is not None:
                        yield line(body)
            yield line(self._head() | self.said("", "", []) | self._figures(conversation))
        finally:
            await conversation.aclose()

    def _note_first(self, news: ChatNews) -> None:
        if self._first_token is None and news.piece is not None:
            self._first_token = time.monotonic_ns()

    def _addition(self, news: ChatNews) -> dict[str, Any] | None:
        """What a line adds; a call comes whole, once another one or the end follows."""
        content = "".join(d.text for d in news.deltas if isinstance(d, ContentDelta))
        thinking = "".join(d.text for d in news.deltas if isinstance(d, ReasoningDelta))
        num_whole = len(news.choice.tool_calls) - (0 if news.finished else 1)
        calls = self._calls(news.choice, num_whole)
        piece = news.piece
        logprobs = None if piece is None else piece.logprobs
        if not (content or thinking or calls or logprobs):
            return None
        body = self._head() | self.said(content, thinking, calls) | {"done": False}
        if piece is not None and logprobs is not None:
            body["logprobs"] = self._logprobs(piece.token_ids, logprobs)
        return body

    def _calls(self, choice: ChatChoice, end: int) -> list[ToolCall]:
        """The calls that have not been told of yet, but for one that was cut short."""
        calls: list[ToolCall] = []
        for index in range(self._num_called, end):
            call = choice.tool_calls[index]
            if (arguments := call.whole_arguments()) is not None:
                function: CalledFunction = {
                    "index": index,
                    "name": call.name,
                    "arguments": arguments,
                }
                calls.append({"id": call.id, "function": function})
        self._num_called = max(self._num_called, end)
        return calls

    def _logprobs(
        self, token_ids: Sequence[int], positions: Sequence[TokenLogprobs]
    ) -> list[ChatTokenLogprob]:
        num_top = self.request.top_logprobs or 0
        return chat_logprobs(token_ids, positions, num_top, self._names)

    def _figures(self, conversation: Conversation) -> dict[str, Any]:
        """What the end of an answer has."""
        (choice,) = conversation.choices
        reason = choice.finish_reason
        end, usage = time.monotonic_ns(), conversation.usage
        first = end if self._first_token is None else self._first_token
        return {
            "done": True,
            "done_reason": "stop" if reason == "tool_calls" else reason,
            "total_duration": end - self._started,
            "load_duration": 0,
            "prompt_eval_count": usage.num_prompt,
            "prompt_eval_duration": first - self._started,
            "eval_count": usage.num_completion,
            "eval_duration": end - first,
        }


class ChatAnswer(OllamaAnswer):
    """A message of the assistant."""

    request: wire.ChatRequest

    @property
    def is_empty(self) -> bool:
        return not self.request.messages

    def said(self, content: str, thinking: str, calls: list[ToolCall]) -> dict[str, Any]:
        message: Message = {"role": "assistant", "content": content}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


class GenerateAnswer(OllamaAnswer):
    """What a prompt gives."""

    request: wire.GenerateRequest

    @property
    def is_empty(self) -> bool:
        return not self.request.prompt

    def said(self, content: str, thinking: str, calls: list[ToolCall]) -> dict[str, Any]:  # noqa: ARG002
        return {"response": content} | ({"thinking": thinking} if thinking else {})

    async def start(self) -> Conversation:
        if not self.request.raw:
            return await super().start()
        prompt, params = self.request.prompt or "", sampling_params(self.request, self.state)
        generation = await Generation.start(
            self.state,
            self.request_id,
            [prompt],
            params,
            may_clip=True,
            lora_name=self.lora_name,
        )
        output = generation.outputs[0]
        cursor = Cursor(output, output.outputs[0], 0, by_token=params.num_logprobs is not None)
        return Conversation(generation, [ChatChoice(cursor, PlainParser())])
