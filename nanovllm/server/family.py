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
from nanovllm.server.request_id import request_id
from nanovllm.server.sampling import sampling_from
from nanovllm.server.speech.generate import SpeechGenerateRequest, answer_speech
from nanovllm.server.state import ServerState, State
from nanovllm.server.streaming import DONE, WholeOrStream, also_streams, event, line

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
    return await TextAnswer(body, request, state).respond()


class TextAnswer(WholeOrStream):
    """What a prompt gives, in the dialect that the request is in.

    Args:
        body: What is asked.
        http: The connection it came by.
        state: The server.
    """

    def __init__(self, body: GenerateRequest, http: Request, state: ServerState) -> None:
        streams = body.dialect != "whole"
        super().__init__(http, state, request_id(http.headers), streams)
        self._body = body
        self._as_lines = body.dialect == "lines"
        self.takes_comments = not self._as_lines

    async def whole(self) -> Generated:
        generation = await self._start()
        try:
            await generation.finish()
        finally:
            await generation.aclose()
        return {"generated_text": generation.outputs[0].outputs[0].text}

    async def events(self) -> AsyncGenerator[bytes, None]:
        generation = await self._start()
        try:
            output = generation.outputs[0]
            cursor = Cursor(output, output.outputs[0], 0)
            async for _ in generation.news():
                if (piece := cursor.take()) is not None:
                    yield self._event(piece.text)
        finally:
            await generation.aclose()
        yield line({"event": "done"}) if self._as_lines else DONE

    def error_event(self, error: APIError) -> bytes:
        body = {"detail": error.message} | error.body()
        return line({"event": "error"} | body) if self._as_lines else event(body) + DONE

    def _event(self, text: str) -> bytes:
        if self._as_lines:
            return line({"text_delta": text})
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return "".join(f"data: {written}\n" for written in lines).encode() + b"\n"

    async def _start(self) -> Generation:
        body = self._body
        limit = body.max_tokens or body.max_new_tokens
        default = DEFAULT_MAX_NEW_TOKENS if self._as_lines else DEFAULT_MAX_TOKENS
        params = sampling_from(self.state, body, max_tokens=limit or default)
        return await Generation.start(
            self.state, self.request_id, [body.prompt], params, may_clip=limit is None
        )
