"""`truncation: "auto"`: leaving out how a conversation began, where it would be too long."""

from dataclasses import replace

from nanovllm.errors import ContextLengthError
from nanovllm.server.chat.prompt import render
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.generation import check_room
from nanovllm.server.state import ServerState


async def shortened(state: ServerState, chat: ChatRequest) -> ChatRequest:
    """Return a conversation without as many of its first turns as needs be for it to fit.

    A turn begins with a message of the user, so no result stays without its call. What the system
    says before the first one stays, and so does the last turn, whether it fits or not.
    """
    starts = [i for i, message in enumerate(chat.messages) if message["role"] == "user"]
    if len(starts) < 2 or await _fits(state, chat):
        return chat
    begin = [m for m in chat.messages[: starts[0]] if m["role"] in ("system", "developer")]

    def without(num_turns: int) -> ChatRequest:
        return replace(chat, messages=begin + chat.messages[starts[num_turns] :])

    # As few turns as possible, by bisection: each try is a whole prompt to tokenize.
    fewest, most = 1, len(starts) - 1
    while fewest < most:
        middle = (fewest + most) // 2
        if await _fits(state, without(middle)):
            most = middle
        else:
            fewest = middle + 1
    return without(fewest)


async def _fits(state: ServerState, chat: ChatRequest) -> bool:
    params = replace(chat.params, structured_outputs=None)
    try:
        prompt = await render(state, chat)
        item = await state.llm.prepare(prompt, params, add_special_tokens=chat.add_special_tokens)
        check_room(item, state.llm.max_model_len)
    except ContextLengthError:
        return False
    return True
