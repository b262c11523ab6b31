"""`POST /v1/chat/completions`."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import TokenLogprobs
from nanovllm.server.chat.logprobs import chat_logprobs
from nanovllm.server.chat.run import ChatChoice, ChatNews, Conversation
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.answer import Answer, Choice, usage_of
from nanovllm.server.openai.conversation import chat_request
from nanovllm.server.openai.logprobs import prompt_logprobs
from nanovllm.server.openai.requests import ChatCompletionRequest
from nanovllm.server.openai.responses import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChoice,
    ChatDeltaChoice,
    ChatLogprobs,
    MessageDelta,
    ToolCallChunk,
    Usage,
)
from nanovllm.server.openai.sampling import sampling_params
from nanovllm.server.state import State
from nanovllm.server.streaming import also_streams
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=also_streams(ChatCompletion),
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    return await ChatAnswer(body, request, state).respond()


class ChatAnswer(Answer[Conversation]):
    """Messages of the assistant."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    request: ChatCompletionRequest
    _continued_text = ""
    """With `echo`, what the answer goes on from."""

    async def start(self) -> Conversation:
        request = self.request
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
        params = sampling_params(request, self.state)
        asked = chat_request(request, self.state, params, self.request_id)
        last = asked.messages[-1]
        if request.echo and last["role"] == "assistant":
            self._continued_text = last["content"]
        fields = {"prompt": "messages"}
        if request.max_completion_tokens is not None:
            fields["max_tokens"] = "max_completion_tokens"
        with in_words_of_client(fields):
            return await Conversation.start(
                self.state, asked, by_token=bool(request.return_token_ids)
            )

    async def choices(self, run: Conversation) -> AsyncIterator[Choice]:
        await run.finish()
        for choice in run.choices:
            yield self._choice(choice)

    async def chunks(self, run: Conversation) -> AsyncIterator[Iterator[Choice]]:
        opened: set[int] = set()
        async for news in run.news():
            yield (choice for item in news for choice in self._additions(item, opened))

    def usage(self, run: Conversation) -> Usage:
        used = run.usage
        usage = usage_of(used.num_prompt, used.num_completion, used.num_cached)
        if run.reasons:
            usage["completion_tokens_details"] = {"reasoning_tokens": used.num_reasoning}
        return usage

    async def whole_extras(self, run: Conversation) -> dict[str, Any]:
        output = run.output
        extras: dict[str, Any] = {}
        if self.request.prompt_logprobs is not None:
            extras["prompt_logprobs"] = await prompt_logprobs(output.prompt_logprobs)
        if self.request.return_token_ids:
            extras["prompt_token_ids"] = output.prompt_token_ids
        return extras

    def _choice(self, choice: ChatChoice) -> ChatCompletionChoice:
        content = self._continued_text + choice.content
        message: AssistantMessage = {
            "role": "assistant",
            "content": content if content or not choice.tool_calls else None,
            "refusal": None,
        }
        if choice.reasoning and self._shows_reasoning:
            message["reasoning"] = message["reasoning_content"] = choice.reasoning
        if choice.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in choice.tool_calls
            ]
        token_ids = choice.completion.token_ids
        answer: ChatCompletionChoice = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(token_ids, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.request.return_token_ids:
            answer["token_ids"] = token_ids
        return answer

    def _additions(self, news: ChatNews, opened: set[int]) -> Iterator[ChatDeltaChoice]:
        """The chunks that tell of news: log probabilities go with the first of a piece."""
        choice, piece = news.choice, news.piece
        if choice.index not in opened:
            opened.add(choice.index)
            yield _addition(choice, {"role": "assistant", "content": self._continued_text})
        told = [delta for delta in (self._delta(choice, d) for d in news.deltas) if delta]
        if piece is not None and self._tells_tokens:
            first, *told = told or [{"content": ""}]
            addition = _addition(choice, first)
            addition["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
            if self.request.return_token_ids:
                addition["token_ids"] = piece.token_ids
            yield addition
        for delta in told:
            yield _addition(choice, delta)
        if news.finished:
            closing = _addition(choice, {})
            closing["finish_reason"] = choice.finish_reason
            closing["stop_reason"] = choice.stop_reason
            yield closing

    @property
    def _shows_reasoning(self) -> bool:
        return self.request.include_reasoning is not False

    @property
    def _tells_tokens(self) -> bool:
        return bool(self.request.return_token_ids) or self.request.num_logprobs is not None

    def _delta(self, choice: ChatChoice, delta: Delta) -> MessageDelta | None:
        """What a client is told of a delta, if anything."""
        if isinstance(delta, ContentDelta):
            return {"content": delta.text}
        if isinstance(delta, ReasoningDelta):
            told: MessageDelta = {"reasoning": delta.text, "reasoning_content": delta.text}
            return told if self._shows_reasoning else None
        call: ToolCallChunk = {
            "index": delta.index,
            "function": {"arguments": delta.arguments},
        }
        if delta.name is not None:
            call["id"] = choice.tool_calls[delta.index].id
            call["type"] = "function"
            call["function"]["name"] = delta.name
        return {"tool_calls": [call]}

    def _logprobs(
        self, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> ChatLogprobs | None:
        request = self.request
        if request.num_logprobs is None or logprobs is None:
            return None
        num_top = None if request.logprob_token_ids else request.num_logprobs
        content = chat_logprobs(token_ids, logprobs, num_top, self.names)
        return {"content": content, "refusal": None}


def _addition(choice: ChatChoice, delta: MessageDelta) -> ChatDeltaChoice:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
