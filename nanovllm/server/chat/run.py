"""A conversation that is being answered: thoughts, text and calls as they come."""

from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, NamedTuple

from pydantic_core import from_json

from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from nanovllm.server.chat.plan import Parser, make_plan, new_call_id
from nanovllm.server.chat.request import ChatRequest
from nanovllm.server.generation import Cursor, Generation, Piece
from nanovllm.server.state import ServerState
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta


class ChatUsage(NamedTuple):
    """Tokens so far, of all choices.

    Args:
        num_prompt: Of the prompt.
        num_completion: Generated, those of thoughts and calls included.
        num_cached: Of the prompt, those that the prefix cache had.
        num_reasoning: Generated for thoughts.
    """

    num_prompt: int
    num_completion: int
    num_cached: int
    num_reasoning: int


class MadeCall:
    """A call of the model.

    Args:
        id: What the message with the result refers to.
        name: The function.
    """

    def __init__(self, id: str, name: str) -> None:  # noqa: A002  # the name everybody has for it
        self.id = id
        self.name = name
        self.parts: list[str] = []

    @property
    def arguments(self) -> str:
        """JSON text; of a call that was cut short, what there is of it."""
        return "".join(self.parts)

    def whole_arguments(self) -> dict[str, Any] | None:
        """The arguments; None of a call that was cut short, or that the model got wrong."""
        try:
            arguments = from_json(self.arguments)
        except ValueError:
            return None
        return arguments if isinstance(arguments, dict) else None


class ChatNews(NamedTuple):
    """What has been added to a choice.

    Args:
        choice: Which one; it has been added already.
        deltas: What is added, which may be nothing while a token may yet become part of a call.
        piece: The tokens behind it; None if there are none.
        finished: Whether this is the end of the choice.
    """

    choice: "ChatChoice"
    deltas: list[Delta]
    piece: Piece | None
    finished: bool


class ChatChoice:
    """One answer to a conversation.

    Args:
        cursor: The completion that it is made of.
        parser: What tells thoughts, text and calls apart.
        new_call_id: Names its calls.

    Attributes:
        tool_calls: The calls so far.
        num_reasoning: Tokens of thoughts, as near as their text tells.
        logprobs: Of all tokens, of a choice that was waited for as a whole.
    """

    def __init__(
        self, cursor: Cursor, parser: Parser, new_call_id: Callable[[], str] = new_call_id
    ) -> None:
        self.tool_calls: list[MadeCall] = []
        self.num_reasoning = 0
        self.logprobs: list[TokenLogprobs] = []
        self._cursor = cursor
        self._parser = parser
        self._new_call_id = new_call_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._num_undecided = 0
        self._begun = False
        self._ended = False

    @property
    def index(self) -> int:
        return self._cursor.index

    @property
    def completion(self) -> CompletionOutput:
        return self._cursor.completion

    @property
    def content(self) -> str:
        """The answer's text so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return "".join(self._reasoning)

    @property
    def finish_reason(self) -> str | None:
        """One of "stop", "length", "tool_calls" and "abort"; None while it goes on."""
        reason = self._cursor.finish_reason
        if reason != "stop" or not self.tool_calls:
            return reason
        cut = isinstance(self.stop_reason, str) and self.tool_calls[-1].whole_arguments() is None
        return "stop" if cut else "tool_calls"

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or token id that ended it, if one did."""
        return self._cursor.stop_reason

    def advance(self) -> ChatNews | None:
        """Take what has come since the last time; None if there is nothing."""
        piece = self._cursor.take()
        ends = self.completion.finished and not self._ended
        if piece is None and not ends and self._begun:
            return None
        self._begun, self._ended = True, self._ended or ends
        deltas = [] if piece is None else self._parser.push(piece.text)
        if ends:
            deltas += self._parser.finish()
        self._count_reasoning(0 if piece is None else len(piece.token_ids), deltas)
        for delta in deltas:
            self._add(delta)
        return ChatNews(self, deltas, piece, ends)

    def _add(self, delta: Delta) -> None:
        if isinstance(delta, ContentDelta):
            self._content.append(delta.text)
        elif isinstance(delta, ReasoningDelta):
            self._reasoning.append(delta.text)
        else:
            if delta.name is not None:
                self.tool_calls.append(MadeCall(self._new_call_id(), delta.name))
            self.tool_calls[delta.index].parts.append(delta.arguments)

    def _count_reasoning(self, num_tokens: int, deltas: list[Delta]) -> None:
        """Count tokens by the share that thoughts have in what they have become."""
        self._num_undecided += num_tokens
        num_chars = sum(map(_num_chars, deltas))
        if num_chars == 0:
            return
        thought = sum(_num_chars(delta) for delta in deltas if isinstance(delta, ReasoningDelta))
        self.num_reasoning += round(self._num_undecided * thought / num_chars)
        self._num_undecided = 0


class Conversation:
    """A conversation that is being answered.

    Closing or dropping it aborts what has not ended.

    Args:
        generation: What the engine generates.
        choices: The answers.
        reasons: Whether the model may think before it answers.
        left_out: Ids of tokens that are no part of any text.
    """

    def __init__(
        self,
        generation: Generation,
        choices: list[ChatChoice],
        reasons: bool = False,
        left_out: Collection[int] = (),
    ) -> None:
        self._generation = generation
        self.choices = choices
        self.reasons = reasons
        self.left_out = left_out

    @classmethod
    async def start(
        cls, state: ServerState, request: ChatRequest, *, by_token: bool = False
    ) -> "Conversation":
        """Check a request and queue it.

        Args:
            state: The server.
            request: The conversation.
            by_token: Whether tokens are news even if they add no text yet.

        Raises:
            InvalidRequestError: The request cannot be used.
            ContextLengthError: The prompt and the answer would not fit the context.
            APIError: There is no such model.
            UnavailableError: The queue is full, or no engine is running.
        """
        lora_name = state.text_adapter(request.model)
        plan = await make_plan(state, request)
        try:
            generation = await Generation.start(
                state,
                request.request_id,
                [plan.prompt],
                plan.params,
                add_special_tokens=request.add_special_tokens,
                may_clip=request.may_clip,
                priority=request.priority,
                cache_salt=request.cache_salt,
                lora_name=lora_name,
            )
        except InvalidRequestError as e:
            if plan.functions and e.param == "grammar":  # ours, made of the tools
                raise InvalidRequestError(f"tools: {e}", "tools") from e
            raise
        (output,) = generation.outputs
        by_token = by_token or request.params.num_logprobs is not None
        choices = [
            ChatChoice(
                Cursor(output, completion, completion.index, by_token=by_token),
                plan.parser(),
                plan.new_call_id,
            )
            for completion in output.outputs
        ]
        tokenizer = state.llm.tokenizer
        left_out: Collection[int] = ()
        if tokenizer is not None and plan.params.skip_special_tokens:
            left_out = tokenizer.special_ids
        return cls(generation, choices, plan.reasons, left_out)

    async def news(self) -> AsyncIterator[list[ChatNews]]:
        """Yield what is new of each choice that there is something new of, until all have ended.

        Raises:
            UnavailableError: The engine has died.
            APIError: A completion could not be computed.
        """
        async for _ in self._generation.news():
            news = [choice.advance() for choice in self.choices]
            if there := [item for item in news if item is not None]:
                yield there

    async def finish(self) -> None:
        """Wait until all of it is there; raises what `news` does."""
        async for news in self.news():
            for item in news:
                if item.piece is not None and item.piece.logprobs is not None:
                    item.choice.logprobs += item.piece.logprobs

    @property
    def output(self) -> RequestOutput:
        """What the engine makes of the prompt."""
        return self._generation.outputs[0]

    @property
    def names(self) -> set[str]:
        """All that `/abort` finds it by."""
        return self._generation.names

    @property
    def usage(self) -> ChatUsage:
        """Tokens so far."""
        generation = self._generation
        return ChatUsage(
            generation.num_prompt_tokens,
            generation.num_completion_tokens,
            generation.num_cached_tokens,
            sum(choice.num_reasoning for choice in self.choices),
        )

    async def abort(self) -> bool:
        """End it; its client gets what there is. False if it has ended already."""
        return await self._generation.abort()

    async def aclose(self) -> None:
        """Abort what has not ended."""
        await self._generation.aclose()


def _num_chars(delta: Delta) -> int:
    return len(delta.arguments if isinstance(delta, ToolCallDelta) else delta.text)
