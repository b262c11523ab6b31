"""`POST /v1/completions`."""

from typing import ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.answer import Answer
from nanovllm.server.openai.generation import Cursor, Generation, Piece
from nanovllm.server.openai.logprobs import (
    OutputOffsets,
    completion_logprobs,
    prompt_logprobs,
    prompt_offsets,
)
from nanovllm.server.openai.requests import CompletionRequest
from nanovllm.server.openai.responses import Completion, CompletionChoice, CompletionLogprobs
from nanovllm.server.openai.sampling import sampling_params
from nanovllm.server.openai.streaming import also_streams
from nanovllm.server.state import ServerState, State

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses=also_streams(Completion),
)
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Write on from one or several prompts, whole or as server-sent events."""
    return await CompletionAnswer(body, request, state).respond()


class CompletionAnswer(Answer):
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

    def choice(self, cursor: Cursor, piece: Piece) -> CompletionChoice:
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

    def opening(self, cursor: Cursor) -> CompletionChoice | None:
        if cursor.index not in self._echoes and not self.request.return_token_ids:
            return None
        choice = _chunk(cursor, self._echoes.get(cursor.index, ""), self._echoed_logprobs(cursor))
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = cursor.output.prompt_token_ids
        return choice

    def addition(self, cursor: Cursor, piece: Piece) -> CompletionChoice:
        choice = _chunk(cursor, piece.text, self._logprobs(cursor, piece))
        if self.request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def closing(self, cursor: Cursor) -> CompletionChoice:
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
