"""`POST /v1/completions`."""

from collections.abc import AsyncIterator, Iterator
from typing import ClassVar, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.server.generation import Cursor, Generation, Piece
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.answer import Answer, Choice, usage_of
from nanovllm.server.openai.logprobs import (
    OutputOffsets,
    completion_logprobs,
    echoed_logprobs,
    joined,
    prompt_logprobs,
    prompt_offsets,
)
from nanovllm.server.openai.requests import CompletionRequest
from nanovllm.server.openai.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    Usage,
)
from nanovllm.server.openai.sampling import sampling_params
from nanovllm.server.state import ServerState, State
from nanovllm.server.streaming import also_streams

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses=also_streams(Completion),
)
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Write on from one or several prompts, whole or as server-sent events."""
    return await CompletionAnswer(body, request, state).respond()


class ToldPrompt(NamedTuple):
    """What an answer tells of a prompt, with each of its completions.

    Args:
        echo: Its text, if that comes first.
        logprobs: Those of that text, if they are asked for.
        scores: The same as `prompt_logprobs`.
    """

    echo: str | None
    logprobs: CompletionLogprobs | None
    scores: PromptLogprobs | None


class CompletionAnswer(Answer[Generation]):
    """Texts behind prompts; with `echo`, the prompts come first."""

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    request: CompletionRequest

    def __init__(self, request: CompletionRequest, http: Request, state: ServerState) -> None:
        super().__init__(request, http, state)
        self._told: dict[int, ToldPrompt] = {}
        self._offsets: dict[int, OutputOffsets] = {}

    async def start(self) -> Generation:
        request = self.request
        prompts = request.prompts
        params = sampling_params(request, self.state, len(prompts))
        if request.echo and request.logprobs is not None and params.prompt_logprobs is None:
            params.prompt_logprobs = request.logprobs
        generation = await Generation.start(
            self.state,
            self.request_id,
            prompts,
            params,
            add_special_tokens=request.add_special_tokens is not False,
            hidden=request.max_tokens == 0,
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
            lora_name=self.state.text_adapter(request.model or None),
        )
        self._params = params
        return generation

    async def choices(self, run: Generation) -> AsyncIterator[Choice]:
        await run.finish()
        for cursors in self._cursors(run):
            for cursor in cursors:
                await self._tell_prompt(cursor)
                yield self._choice(cursor, cursor.take() or Piece("", [], []))

    async def chunks(self, run: Generation) -> AsyncIterator[Iterator[Choice]]:
        cursors = self._cursors(run)
        async for index in run.news():
            await self._tell_prompt(cursors[index][0])
            yield (choice for cursor in cursors[index] for choice in self._additions(cursor))

    def usage(self, run: Generation) -> Usage:
        return usage_of(run.num_prompt_tokens, run.num_completion_tokens, run.num_cached_tokens)

    def _additions(self, cursor: Cursor) -> Iterator[Choice]:
        if not cursor.opened:
            cursor.opened = True
            if (opening := self._opening(cursor)) is not None:
                yield opening
        if (piece := cursor.take()) is not None:
            yield self._addition(cursor, piece)
        if cursor.completion.finished and not cursor.closed:
            cursor.closed = True
            yield self._closing(cursor)

    def _cursors(self, generation: Generation) -> list[list[Cursor]]:
        """A cursor for each completion of each prompt; prompts count first."""
        n = len(generation.outputs[0].outputs)
        by_token = bool(self.request.return_token_ids) or self.request.logprobs is not None
        return [
            [
                Cursor(
                    output,
                    completion,
                    prompt_index * n + completion.index,
                    hidden=generation.hidden,
                    by_token=by_token,
                )
                for completion in output.outputs
            ]
            for prompt_index, output in enumerate(generation.outputs)
        ]

    async def _tell_prompt(self, cursor: Cursor) -> None:
        """Write down what all completions of a prompt tell of it, unless that has been done."""
        prompt_index = cursor.index // self._params.n
        if prompt_index in self._told:
            return
        request, output = self.request, cursor.output
        ids, positions = output.prompt_token_ids, output.prompt_logprobs
        text, logprobs = None, None
        if request.echo:
            text = output.prompt if self._params.truncate_prompt_tokens is None else None
            if text is None:
                text = await self.state.llm.decode(ids, False)
            if positions is not None and request.logprobs is not None:
                offsets = prompt_offsets(self.state.llm.tokenizer, ids, text)
                logprobs = await echoed_logprobs(ids, positions, offsets, self.names)
        scores = None if request.prompt_logprobs is None else await prompt_logprobs(positions)
        self._told[prompt_index] = ToldPrompt(text, logprobs, scores)

    def _prompt_of(self, cursor: Cursor) -> "ToldPrompt":
        return self._told[cursor.index // self._params.n]

    def _choice(self, cursor: Cursor, piece: Piece) -> CompletionChoice:
        prompt = self._prompt_of(cursor)
        parts = [prompt.logprobs, self._logprobs(cursor, piece)]
        there = [part for part in parts if part is not None]
        choice: CompletionChoice = {
            "index": cursor.index,
            "text": (prompt.echo or "") + piece.text,
            "logprobs": joined(there) if there else None,
            "finish_reason": cursor.finish_reason,
            "stop_reason": cursor.stop_reason,
        }
        if self.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt.scores
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = cursor.output.prompt_token_ids
            choice["token_ids"] = piece.token_ids
        return choice

    def _opening(self, cursor: Cursor) -> CompletionChoice | None:
        prompt = self._prompt_of(cursor)
        if prompt.echo is None and not self.request.return_token_ids:
            return None
        choice = _chunk(cursor, prompt.echo or "", prompt.logprobs)
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = cursor.output.prompt_token_ids
        return choice

    def _addition(self, cursor: Cursor, piece: Piece) -> CompletionChoice:
        choice = _chunk(cursor, piece.text, self._logprobs(cursor, piece))
        if self.request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _closing(self, cursor: Cursor) -> CompletionChoice:
        choice = _chunk(cursor, "", None)
        choice["finish_reason"] = cursor.finish_reason
        choice["stop_reason"] = cursor.stop_reason
        return choice

    def _logprobs(self, cursor: Cursor, piece: Piece) -> CompletionLogprobs | None:
        if piece.logprobs is None or self.request.logprobs is None:
            return None
        if cursor.index not in self._offsets:
            self._offsets[cursor.index] = OutputOffsets(
                self.state.llm.tokenizer,
                cursor.output.prompt_token_ids,
                self._params,
                len(self._prompt_of(cursor).echo or ""),
            )
        offsets = map(self._offsets[cursor.index].next, piece.token_ids)
        return completion_logprobs(piece.token_ids, piece.logprobs, offsets, self.names)


def _chunk(cursor: Cursor, text: str, logprobs: CompletionLogprobs | None) -> CompletionChoice:
    return {
        "index": cursor.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": None,
        "stop_reason": None,
    }
