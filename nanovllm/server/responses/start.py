"""How a conversation is begun, and what is tried where it cannot be as it is."""

import logging

from nanovllm.errors import InvalidRequestError
from nanovllm.server.chat.checks import form_asked_for_by
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.chat.run import Conversation
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.responses.request import ResponseRequest
from nanovllm.server.responses.translation import without_default_strictness
from nanovllm.server.responses.truncation import shortened
from nanovllm.server.state import ServerState

logger = logging.getLogger(__name__)

FIELDS = {"prompt": "input", "messages": "input", "max_tokens": "max_output_tokens"}
"""What the arguments of a generation are called here."""


async def start(state: ServerState, request: ResponseRequest, chat: ChatRequest) -> Conversation:
    """Queue a conversation.

    Args:
        state: The server.
        request: What is asked.
        chat: What has been made of it.

    Raises:
        InvalidRequestError: It cannot be answered; `param` is a field of the request.
        UnavailableError: The queue is full, or no engine is running.
        APIError: There is no such model.
    """
    with in_words_of_client(FIELDS), form_asked_for_by("text.format"):
        if request.truncation == "auto":
            chat = await shortened(state, chat)
        try:
            return await Conversation.start(state, chat)
        except InvalidRequestError as e:
            # Who did not ask for strictness gets as much of it as there is, as at OpenAI.
            lenient = without_default_strictness(request, chat) if e.param == "tools" else None
            if lenient is None:
                raise
            logger.debug("calls are not held to the schemas of the tools: %s", e)
        return await Conversation.start(state, lenient)
