"""The answer to a conversation, whole or as events."""

from collections.abc import AsyncGenerator

from fastapi import Request

from nanovllm.server.anthropic.events import BlockEvents
from nanovllm.server.anthropic.requests import MessagesRequest
from nanovllm.server.anthropic.responses import MessageResponse, Usage
from nanovllm.server.anthropic.translate import chat_request
from nanovllm.server.chat.checks import form_asked_for_by
from nanovllm.server.chat.run import ChatChoice, Conversation
from nanovllm.server.error_shapes import anthropic_error
from nanovllm.server.errors import APIError
from nanovllm.server.request_id import request_id
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import WholeOrStream, named_event

PING = named_event({"type": "ping"})


class MessageAnswer(WholeOrStream):
    """A message of the assistant.

    Args:
        request: What is asked.
        http: The connection it came by.
        state: The server.
    """

    def __init__(self, request: MessagesRequest, http: Request, state: ServerState) -> None:
        name = request_id(http.headers, request.request_id)
        super().__init__(http, state, name, streams=bool(request.stream))
        self._request = request
        thinking = request.thinking
        self._shows_thoughts = thinking is None or thinking.display != "omitted"

    @property
    def headers(self) -> dict[str, str]:
        return super().headers | {"request-id": self.request_id}

    def error_event(self, error: APIError) -> bytes:
        return named_event(anthropic_error(error))

    async def _start(self) -> Conversation:
        request = chat_request(self._request, self.state, self.request_id)
        has_older = self._request.output_format is not None
        with form_asked_for_by("output_format" if has_older else "output_config.format"):
            return await Conversation.start(self.state, request)

    async def whole(self) -> MessageResponse:
        conversation = await self._start()
        (choice,) = conversation.choices
        blocks = BlockEvents(choice, self._shows_thoughts)
        try:
            async for news in conversation.news():
                for item in news:
                    for _ in blocks.of_news(item):
                        pass
        finally:
            await conversation.aclose()
        message = self._message(conversation)
        message["content"] = blocks.content
        message["stop_reason"] = self._stop_reason(conversation)
        message["stop_sequence"] = stop_sequence(choice)
        return message

    async def events(self) -> AsyncGenerator[bytes, None]:
        conversation = await self._start()
        try:
            (choice,) = conversation.choices
            blocks = BlockEvents(choice, self._shows_thoughts)
            begun = False
            async for news in conversation.news():
                if not begun:
                    begun = True
                    message = self._message(conversation)
                    message["usage"]["output_tokens"] = 0
                    yield named_event({"type": "message_start", "message": message}) + PING
                bodies = [body for item in news for body in blocks.of_news(item)]
                if bodies:
                    yield b"".join(map(named_event, bodies))
            yield self._end(conversation)
        finally:
            await conversation.aclose()

    def _end(self, conversation: Conversation) -> bytes:
        delta = {
            "stop_reason": self._stop_reason(conversation),
            "stop_sequence": stop_sequence(conversation.choices[0]),
        }
        last = {"type": "message_delta", "delta": delta, "usage": usage(conversation)}
        return named_event(last) + named_event({"type": "message_stop"})

    def _message(self, conversation: Conversation) -> MessageResponse:
        """A message without content."""
        return {
            "id": f"msg_{self.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self.state.answering_name(self._request.model or None),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(conversation),
        }

    def _stop_reason(self, conversation: Conversation) -> str:
        (choice,) = conversation.choices
        if stop_sequence(choice) is not None:
            return "stop_sequence"
        if choice.finish_reason in ("stop", "tool_calls"):
            calls = [call.whole_arguments() for call in choice.tool_calls]
            return "tool_use" if calls and None not in calls else "end_turn"
        # Also of one that was aborted: it is not whole.
        clipped = conversation.usage.num_completion < self._request.max_tokens
        is_full = choice.finish_reason == "length" and clipped
        return "model_context_window_exceeded" if is_full else "max_tokens"


def stop_sequence(choice: ChatChoice) -> str | None:
    """The stop string that ended an answer, if one did."""
    return choice.stop_reason if isinstance(choice.stop_reason, str) else None


def usage(conversation: Conversation) -> Usage:
    """Tokens so far."""
    counts = conversation.usage
    return {
        "input_tokens": counts.num_prompt - counts.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.num_cached,
        "output_tokens": counts.num_completion,
        "output_tokens_details": {"thinking_tokens": counts.num_reasoning},
    }
