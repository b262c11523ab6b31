"""`/encode_latents`, `/add_prompt` and `/remove_prompt`: recordings, in the family's words."""

import base64
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from nanovllm.server.errors import in_words_of_client
from nanovllm.server.family_route import FamilyRoute
from nanovllm.server.fields import WireModel
from nanovllm.server.health import Status
from nanovllm.server.speech.fields import AudioFormat, PromptText, VoiceName, decode_base64
from nanovllm.server.speech.inputs import encode
from nanovllm.server.state import State
from nanovllm.server.streaming import unless_gone

router = APIRouter(route_class=FamilyRoute, tags=["speech"])


class Recording(WireModel):
    """A file with a voice."""

    wav_base64: Annotated[str, Field(min_length=1)] = Field(
        description="WAV, FLAC, MP3, Ogg; with the extra `audio` also AAC, MP4 and WebM."
    )
    wav_format: AudioFormat = Field(description="What it is said to be; its first bytes decide.")


class Latents(BaseModel):
    """A recording as the model reads it."""

    prompt_latents_base64: str = Field(description="Frames of `feat_dim` values.")
    feat_dim: int
    latents_dtype: Literal["float32"] = "float32"
    sample_rate: int = Field(description="Of the speech that is made, in Hz.")
    channels: int = 1


@router.post("/encode_latents", response_model=Latents)
async def encode_latents(body: Recording, request: Request, state: State) -> Response:
    """Encode a recording, for `prompt_latents_base64` of as many requests as you like."""
    info = state.speech.info
    audio = await decode_base64(body.wav_base64, "wav_base64")

    async def respond() -> Response:
        latents = await encode(state, audio, body.wav_format, "left", "wav_base64")
        answer = Latents(
            prompt_latents_base64=base64.b64encode(latents).decode(),
            feat_dim=info.feat_dim,
            sample_rate=info.sample_rate,
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    return await unless_gone(request, respond())


class PromptToAdd(Recording):
    """A recording to keep, and what it says."""

    prompt_text: PromptText


class PromptId(WireModel):
    """A recording that is kept."""

    prompt_id: VoiceName


@router.post("/add_prompt", response_model=PromptId)
async def add_prompt(body: PromptToAdd, request: Request, state: State) -> Response:
    """Keep a recording for `prompt_id` of as many requests as you like, until the server ends."""
    speech = state.speech
    audio = await decode_base64(body.wav_base64, "wav_base64")

    async def respond() -> Response:
        with state.metrics.audio.encoding(), in_words_of_client({"audio": "wav_base64"}):
            prompt_id = await speech.add_prompt(audio, body.wav_format, body.prompt_text)
        answer = PromptId(prompt_id=prompt_id)
        return Response(answer.model_dump_json(), media_type="application/json")

    return await unless_gone(request, respond())


@router.post("/remove_prompt")
async def remove_prompt(body: PromptId, state: State) -> Status:
    """Forget a recording; what is being spoken with it goes on."""
    state.speech.remove_prompt(body.prompt_id)
    state.voice_names.pop(body.prompt_id, None)
    return Status()
