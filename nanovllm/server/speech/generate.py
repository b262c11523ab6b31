"""`POST /generate` for speech: what the family's engine answers there.

The answer is bare float32 at the model's rate unless `response_format` asks for something else, and
comes while it is made. Requests are told from those for text by their `target_text`.
"""

from typing import Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import Field

from nanovllm.errors import InvalidRequestError
from nanovllm.server.fields import WireModel
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.speech.fields import (
    AudioFormat,
    PromptText,
    Speakable,
    SpeechOptions,
    VoiceName,
    decode_base64,
    decode_latents,
)
from nanovllm.server.speech.inputs import SpeechPrompt, encode, require_reference
from nanovllm.server.speech.sound import Sound
from nanovllm.server.speech.utterance import Utterance
from nanovllm.server.state import ServerState

FIELDS = {
    "text": "target_text",
    "prompt_latents": "prompt_latents_base64",
    "ref_audio_latents": "ref_audio_latents_base64",
}
"""What the arguments of `AsyncSpeech.generate` are called here."""

Format = Literal["raw", "f32le", "pcm", "mp3", "wav", "flac", "opus", "aac"]


class SpeechGenerateRequest(SpeechOptions, WireModel):
    """A text to speak, in the words of the family's engine for speech."""

    target_text: Speakable
    model: str | None = None
    prompt_id: VoiceName | None = Field(None, description="What `/add_prompt` returned.")
    prompt_text: PromptText | None = Field(None, description="What the prompt's recording says.")
    prompt_wav_base64: str | None = None
    prompt_wav_format: AudioFormat | None = None
    prompt_latents_base64: str | None = Field(None, description="What `/encode_latents` returned.")
    ref_audio_wav_base64: str | None = None
    ref_audio_wav_format: AudioFormat | None = None
    ref_audio_latents_base64: str | None = None
    response_format: Format | None = Field(
        None, description="By default `raw`, also called `f32le`: float32, little endian."
    )


async def answer_speech(body: SpeechGenerateRequest, http: Request, state: ServerState) -> Response:
    """Speak.

    Raises:
        InvalidRequestError: The request cannot be used.
        UnavailableError: The server is too busy, or its engine died before the first sound.
        APIError: There is no model that speaks.
    """
    if state.speech_model is None:
        raise InvalidRequestError(
            "target_text: not supported: this model writes text and does not speak", "target_text"
        )
    state.check_model(body.model or None, "speech")
    _check_consistent(body)
    name = request_id(http.headers)

    async def ask() -> Utterance:
        prompt = await _prompt(body, state)
        params = body.params(state)
        text = body.target_text
        fields = _fields(body)
        return await Utterance(state, name, text, params, prompt, body.lora_name, fields).start()

    asked = body.response_format or "raw"
    wire_format = "raw" if asked == "f32le" else asked
    sound = Sound(http, state, ask, wire_format)
    return await sound.stream({HEADER: name, **_described(wire_format, sound.rate)})


def _fields(body: SpeechGenerateRequest) -> dict[str, str]:
    """What the client calls the arguments of `AsyncSpeech.generate`, by what it gave."""
    fields = dict(FIELDS)
    if body.prompt_wav_base64 is not None:
        fields["prompt_latents"] = "prompt_wav_base64"
    if body.ref_audio_wav_base64 is not None:
        fields["ref_audio_latents"] = "ref_audio_wav_base64"
    if body.prompt_id is not None:
        fields |= dict.fromkeys(("prompt_latents", "prompt_text"), "prompt_id")
        if body.ref_audio_wav_base64 is None and body.ref_audio_latents_base64 is None:
            fields["ref_audio_latents"] = "prompt_id"
    return fields


def _described(wire_format: str, rate: int) -> dict[str, str]:
    """The family's headers for a format."""
    if wire_format == "raw":
        return {"X-Audio-DType": "float32", "X-Audio-Encoding": "f32le"}
    if wire_format == "pcm":
        media_type = f"audio/L16;rate={rate};channels=1"
        return {"Content-Type": media_type, "X-Audio-Encoding": "s16le"}
    return {"X-Audio-Encoding": wire_format}


def _check_consistent(body: SpeechGenerateRequest) -> None:
    """Refuse prompts that exclude each other or are half there, in the family's words.

    Raises:
        InvalidRequestError: The prompt is so.
    """
    has_wav = body.prompt_wav_base64 is not None or body.prompt_wav_format is not None
    has_reference = body.ref_audio_wav_base64 is not None or body.ref_audio_wav_format is not None
    has_latents = body.prompt_latents_base64 is not None
    text = body.prompt_text
    refused = [
        (
            has_wav and has_latents,
            "prompt_wav_* and prompt_latents_base64 are mutually exclusive",
        ),
        (
            has_reference and body.ref_audio_latents_base64 is not None,
            "ref_audio_wav_* and ref_audio_latents_base64 are mutually exclusive",
        ),
        (
            has_reference and not (body.ref_audio_wav_base64 and body.ref_audio_wav_format),
            "reference wav requires ref_audio_wav_base64 + ref_audio_wav_format",
        ),
        (
            has_wav and not (body.prompt_wav_base64 and body.prompt_wav_format),
            "wav prompt requires prompt_wav_base64 + prompt_wav_format",
        ),
        (
            body.prompt_id is not None and (has_wav or has_latents),
            "Prompt latents and prompt id cannot be provided at the same time",
        ),
        (
            body.prompt_id is not None and bool(text),
            "Prompt text and prompt id cannot be provided at the same time",
        ),
        (has_wav and not text, "wav prompt requires non-empty prompt_text"),
        (has_latents and not text, "latents prompt requires non-empty prompt_text"),
        (
            bool(text) and not (has_wav or has_latents),
            "prompt_text is not allowed for zero-shot",
        ),
    ]
    for is_so, message in refused:
        if is_so:
            raise InvalidRequestError(message)


async def _prompt(body: SpeechGenerateRequest, state: ServerState) -> SpeechPrompt:
    """Read the recordings of a request; the text alone decides nothing any more."""
    reference = await _reference(body, state)
    text = body.prompt_text or ""
    latents = None
    if body.prompt_wav_base64 is not None:
        audio = await decode_base64(body.prompt_wav_base64, "prompt_wav_base64")
        form = body.prompt_wav_format
        latents = await encode(state, audio, form, "left", "prompt_wav_base64")
    elif body.prompt_latents_base64 is not None:
        latents = await decode_latents(body.prompt_latents_base64, "prompt_latents_base64", state)
    return SpeechPrompt(body.prompt_id, latents, text, reference)


async def _reference(body: SpeechGenerateRequest, state: ServerState) -> bytes | None:
    if body.ref_audio_wav_base64 is not None:
        require_reference(state, "ref_audio_wav_base64")
        audio = await decode_base64(body.ref_audio_wav_base64, "ref_audio_wav_base64")
        form = body.ref_audio_wav_format
        return await encode(state, audio, form, "right", "ref_audio_wav_base64")
    if body.ref_audio_latents_base64 is not None:
        require_reference(state, "ref_audio_latents_base64")
        latents = body.ref_audio_latents_base64
        return await decode_latents(latents, "ref_audio_latents_base64", state)
    return None
