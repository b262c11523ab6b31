"""`POST /generate`: what the engines that this one descends from answer there.

One path, and four dialects, told apart by what the request has:

* `target_text`, to speak it: see `speech.generate`. The others are for text.
* `ignore_eos`, as mini-sglang's clients send it: server-sent events with the bare text, then
  `[DONE]`.
* `max_tokens`, `temperature`, `top_p`, `stop` or `repetition_penalty`: `{"generated_text": ...}`.
* Anything else, such as `max_new_tokens`, `mode` or a mere `prompt`: JSON lines, each
  `{"text_delta": ...}` and the last one `{"event": "done"}`, of type `text/event-stream`.

Where `stream` is given it decides: true is JSON lines, unless `ignore_eos` makes it events, and
false is `{"generated_text": ...}`. Errors have a `detail` beside the `error` of our other routes.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from nanovllm.server.errors import APIError
from nanovllm.server.family_route import FamilyRoute
from nanovllm.server.fields import (
    OrSay,
    RepetitionPenalty,
    Share,
    Stop,
    Temperature,
    Text,
    TokenCount,
    WireModel,
)
from nanovllm.server.generation import Cursor, Generation
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.sampling import sampling_from
from nanovllm.server.speech.generate import SpeechGenerateRequest, answer_speech
from nanovllm.server.state import ServerState, State
from nanovllm.server.streaming import (
    DONE,
    also_streams,
    encode,
    event,
    stream_unless_gone,
    unless_gone,
)

EITHER = OrSay("must be left out: send either prompt, to write, or target_text, to speak")

DEFAULT_MAX_TOKENS = 128
DEFAULT_MAX_NEW_TOKENS = 512


router = APIRouter(route_class=FamilyRoute, tags=["the family"])


class GenerateRequest(WireModel):
    """A prompt to write on from, in any of the dialects."""

    target_text: Annotated[None, EITHER] = None
    prompt: Text
    max_tokens: TokenCount | None = Field(None, description="By default 128.")
    max_new_tokens: TokenCount | None = Field(None, description="By default 512.")
    stream: bool | None = None
    mode: Literal["sglang", "hf"] | None = Field(None, description="There is one engine.")
    ignore_eos: bool | None = None
    temperature: Temperature | None = None
    top_p: Annotated[Share, Field(gt=0)] | None = None
    stop: Stop = None
    repetition_penalty: RepetitionPenalty | None = None

    @property
    def dialect(self) -> Literal["lines", "events", "whole"]:
        """How the answer is written."""
        if self.stream is False:
            return "whole"
        if self.ignore_eos is not None:
            return "events"
        sampling = (self.max_tokens, self.temperature, self.top_p, self.stop)
        plain = all(value is None for value in (*sampling, self.repetition_penalty))
        return "lines" if plain or self.stream else "whole"


class Generated(TypedDict):
    """A text at once."""

    generated_text: str


ANSWERS = also_streams(Generated)
for media_type in ("audio/raw", "audio/L16", "audio/mpeg"):
    ANSWERS[200]["content"][media_type] = {"schema": {"type": "string", "format": "binary"}}


def _kind(body: Any) -> str:
    # Names with a space, so that they are no part of the path in an error's `param`.
    speaks = isinstance(body, Mapping) and body.get("target_text") is not None
    return "a speech" if speaks else "a text"


AnyGenerateRequest = Annotated[
    Annotated[GenerateRequest, Tag("a text")] | Annotated[SpeechGenerateRequest, Tag("a speech")],
    Discriminator(_kind),
    Body(),
]


@router.post("/generate", response_model=Generated, responses=ANSWERS)
async def generate(body: AnyGenerateRequest, request: Request, state: State) -> Response:
    """Write on from a prompt, or speak a text, in the dialect that the request is in."""
    if isinstance(body, SpeechGenerateRequest):
        return await answer_speech(body, request, state)
    dialect, name = body.dialect, request_id(request.headers)
    if dialect == "whole":
        return await unless_gone(request, _respond_whole(body, state, name))
    as_lines = dialect == "lines"
    return await stream_unless_gone(
        request,
        _lines(body, state, name) if as_lines else _events(body, state, name),
        _error_line if as_lines else _error_event,
        # A comment is nothing that a reader of JSON lines would understand.
        keep_alive=None if as_lines else state.config.sse_keep_alive_interval,
        headers={HEADER: name},
    )


async def _respond_whole(body: GenerateRequest, state: ServerState, name: str) -> Response:
    generation = await _start(body, state, name)
    try:
        await generation.finish()
    finally:
        await generation.aclose()
    text = generation.outputs[0].outputs[0].text
    content = encode({"generated_text": text})
    return Response(content, media_type="application/json", headers={HEADER: name})


async def _lines(
    body: GenerateRequest, state: ServerState, name: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(_texts(body, state, name)) as texts:
        async for text in texts:
            yield _line({"text_delta": text})
    yield _line({"event": "done"})


async def _events(
    body: GenerateRequest, state: ServerState, name: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(_texts(body, state, name)) as texts:
        async for text in texts:
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            yield "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
    yield DONE


async def _texts(body: GenerateRequest, state: ServerState, name: str) -> AsyncGenerator[str, None]:
    generation = await _start(body, state, name)
    try:
        output = generation.outputs[0]
        cursor = Cursor(output, output.outputs[0], 0)
        async for _ in generation.news():
            if (piece := cursor.take()) is not None:
                yield piece.text
    finally:
        await generation.aclose()


async def _start(body: GenerateRequest, state: ServerState, name: str) -> Generation:
    limit = body.max_tokens or body.max_new_tokens
    default = DEFAULT_MAX_NEW_TOKENS if body.dialect == "lines" else DEFAULT_MAX_TOKENS
    params = sampling_from(state, body, max_tokens=limit or default)
    return await Generation.start(state, name, [body.prompt], params, may_clip=limit is None)


def _line(body: Mapping[str, Any]) -> bytes:
    return encode(body) + b"\n"


def _error_line(error: APIError) -> bytes:
    return _line({"event": "error", "detail": error.message} | error.body())


def _error_event(error: APIError) -> bytes:
    return event({"detail": error.message} | error.body()) + DONE
