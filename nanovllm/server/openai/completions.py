"""`POST /v1/completions`."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.server.generation import Cursor, Generation, Piece
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.answer import Answer, Choice, usage_of
from nanovllm.server.openai.logprobs import (
    OutputOffsets,
    completion_logprobs,
    prompt_logprobs,
    prompt_offsets,
)
from nanovllm.server.openai.requests import CompletionRequest
from nanovllm.server.openai.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
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


class CompletionAnswer(Answer[Generation]):
    """Texts behind prompts; with `echo`, the prompts come first."""

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    request: CompletionRequest

    def __init__(self, request: CompletionRequest, http: Request, state: ServerState) -> None:
        super().__init__(request, http, state)
        self._echoes: dict[int, str] = {}
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
        if request.echo:
            for index, output in enumerate(generation.outputs):
                whole = output.prompt is not None and params.truncate_prompt_tokens is None
                text = output.prompt if whole else None
                if text is None:
                    text = await self.state.llm.decode(output.prompt_token_ids, False)
                for completion in output.outputs:
                    self._echoes[index * params.n + completion.index] = text
        self._params = params
        return generation

    async def choices(self, run: Generation) -> list[Choice]:
        await run.finish()
        choices: list[Choice] = []
        for cursors in self._cursors(run):
            for cursor in cursors:
                choices.append(self._choice(cursor, cursor.take() or Piece("", [], [])))
            await asyncio.sleep(0)  # log probabilities of many prompts take long together
        return choices

    async def chunks(self, run: Generation) -> AsyncIterator[Iterator[Choice]]:
        cursors = self._cursors(run)
        async for index in run.news():
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

    def _choice(self, cursor: Cursor, piece: Piece) -> CompletionChoice:
        echoed, added = self._echoed_logprobs(cursor), self._logprobs(cursor, piece)
        if echoed is not None and added is not None:
            for name, values in added.items():
                echoed[name] += values  # type: ignore[literal-required]
        choice: CompletionChoice = {
            "index": cursor.index,
            "text": self._echoes.get(cursor.index, "") + piece.text,
            "logprobs": added if echoed is None else echoed,
            "finish_reason": cursor.finish_reason,
            "stop_reason": cursor.stop_reason,
        }
        if self.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(cursor.output.prompt_logprobs)
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = cursor.output.prompt_token_ids
            choice["token_ids"] = piece.token_ids
        return choice

    def _opening(self, cursor: Cursor) -> CompletionChoice | None:
        if cursor.index not in self._echoes and not self.request.return_token_ids:
            return None
        choice = _chunk(cursor, self._echoes.get(cursor.index, ""), self._echoed_logprobs(cursor))
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

    def _echoed_logprobs(self, cursor: Cursor) -> CompletionLogprobs | None:
        """Those of the prompt, if it comes back."""
        text, positions = self._echoes.get(cursor.index), cursor.output.prompt_logprobs
        if text is None or positions is None or self.request.logprobs is None:
            return None
        token_ids = cursor.output.prompt_token_ids
        offsets = prompt_offsets(self.state.llm.tokenizer, token_ids, text)
        return completion_logprobs(token_ids, positions, offsets, self.names)

    def _logprobs(self, cursor: Cursor, piece: Piece) -> CompletionLogprobs | None:
        if piece.logprobs is None or self.request.logprobs is None:
            return None
        if cursor.index not in self._offsets:
            self._offsets[cursor.index] = OutputOffsets(
                self.state.llm.tokenizer,
                cursor.output.prompt_token_ids,
                self._params,
                len(self._echoes.get(cursor.index, "")),
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
