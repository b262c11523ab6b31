"""`POST /v1/audio/speech`: OpenAI's, and what servers of VoxCPM take besides."""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, AliasChoices, Field

from nanovllm.errors import InvalidRequestError
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.fields import ModelName, OrSay, WireModel
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.speech.fields import (
    MAX_TEXT,
    OPENAI_VOICES,
    PromptText,
    Speakable,
    SpeechOptions,
    VoiceName,
)
from nanovllm.server.speech.inputs import (
    SpeechPrompt,
    decode_recording,
    encode,
    require_reference,
)
from nanovllm.server.speech.sound import Sound
from nanovllm.server.speech.utterance import Utterance
from nanovllm.server.state import ServerState, State

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])

MAX_INPUT = 4096
"""Characters, as with OpenAI; with `split_sentences` more, up to an hour of speech."""

FIELDS = {
    "text": "input",
    "prompt_id": "voice",
    "prompt_latents": "ref_audio",
    "prompt_text": "ref_text",
    "ref_audio_latents": "ref_audio",
}
"""What the arguments of `AsyncSpeech.generate` are called here."""
FIELDS_OF_VOICE = FIELDS | dict.fromkeys(
    ("prompt_latents", "prompt_text", "ref_audio_latents"), "voice"
)
"""The same where they come of a voice."""

NO_PARENTHESES = str.maketrans("()", "[]")

Base64Audio = Annotated[str, Field(min_length=1)]


class VoiceId(WireModel):
    """OpenAI's other way of naming a voice."""

    id: VoiceName


class SpeechRequest(SpeechOptions):
    """A text to speak. Fields that OpenAI does not have are VoxCPM's and other servers'."""

    model: ModelName = None
    input: Speakable = Field(
        description="The text; 4096 characters at most unless `split_sentences` is true."
    )
    voice: Annotated[VoiceName | VoiceId | None, OrSay("must be the id or the name of a voice")] = (
        Field(None, description="See `/v1/audio/voices`; OpenAI's own names are the default voice.")
    )
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm", "raw"] | None = Field(
        "mp3",
        description="`pcm` is signed 16 bit, `raw` float32, little endian, at the rate that the "
        "header `X-Audio-Sample-Rate` has. `aac` needs the extra `audio`.",
    )
    stream_format: Literal["audio", "sse"] | None = "audio"
    stream: bool | None = Field(
        None, description="False sends the speech once it is complete, with its right length."
    )
    speed: float | None = Field(None, description="Only 1: the model speaks as fast as it does.")
    instructions: Annotated[str, Field(max_length=MAX_INPUT), AfterValidator(str.strip)] | None = (
        Field(None, description="How to speak, for models that take a description of the voice.")
    )
    split_sentences: bool | None = Field(
        None, description="Speak sentence by sentence, for long texts; the voice stays the same."
    )
    retry_badcase: bool | None = Field(
        None, description="Speak anew what went astray; needs `stream` to be false."
    )
    ref_audio: Base64Audio | None = Field(
        None,
        validation_alias=AliasChoices("ref_audio", "reference_audio"),
        description="A recording of the voice in base64, or as a `data:` URL; no other URL.",
    )
    ref_text: PromptText | None = Field(
        None, description="What the recording says; the speech then continues it."
    )


@router.post(
    "/v1/audio/speech",
    response_class=Response,
    responses={
        200: {
            "description": "The speech, while it is made; or server-sent events with it.",
            "content": {
                "audio/mpeg": {"schema": {"type": "string", "format": "binary"}},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        }
    },
)
async def create_speech(body: SpeechRequest, request: Request, state: State) -> Response:
    """Speak a text, in any format, while the speech is still being made."""
    state.check_model(body.model or None, "speech")
    _check_served(body, state)
    name = request_id(request.headers)
    whole = body.stream is False and body.stream_format != "sse"

    async def ask() -> Utterance:
        prompt = await _voice(body, state)
        text = _described(body.instructions) + body.input
        params = body.params(state, retry_badcase=bool(body.retry_badcase))
        fields = FIELDS if body.ref_audio else FIELDS_OF_VOICE
        by_sentence = bool(body.split_sentences)
        utterance = Utterance(
            state, name, text, params, prompt, body.lora_name, fields, by_sentence=by_sentence
        )
        return await utterance.start()

    sound = Sound(request, state, ask, body.response_format or "mp3", streaming=not whole)
    headers = {HEADER: name}
    if body.stream_format == "sse":
        return await sound.stream_events(headers)
    return await (sound.whole if whole else sound.stream)(headers)


def _described(instructions: str | None) -> str:
    """The description of a voice as VoxCPM2 takes it: in parentheses before the text.

    It ends at the first closing one, so that there must be none within.
    """
    return f"({instructions.translate(NO_PARENTHESES)})" if instructions else ""


def _check_served(body: SpeechRequest, state: ServerState) -> None:
    """Refuse what no field by itself is wrong about.

    Raises:
        InvalidRequestError: Something is.
    """
    if body.speed not in (None, 1):
        raise InvalidRequestError(
            f"speed must be 1, got {body.speed:g}: the model speaks as fast as it does", "speed"
        )
    if body.instructions and not state.speech.info.supports_reference:
        raise InvalidRequestError(
            "instructions are not supported by the loaded model: VoxCPM2 takes them", "instructions"
        )
    if len(body.input) > MAX_INPUT and not body.split_sentences:
        raise InvalidRequestError(
            f"input may have {MAX_INPUT} characters, got {len(body.input)}: with split_sentences "
            f"it may have {MAX_TEXT}",
            "input",
        )
    streams = body.stream is not False or body.stream_format == "sse"
    if body.retry_badcase and (streams or body.split_sentences):
        raise InvalidRequestError(
            "retry_badcase needs stream=false, and no split_sentences", "retry_badcase"
        )
    if body.ref_audio and body.voice is not None and _name_of(body.voice) not in OPENAI_VOICES:
        raise InvalidRequestError("give either voice or ref_audio", "ref_audio")
    if body.ref_text and not body.ref_audio:
        raise InvalidRequestError("ref_text needs ref_audio: it is what that says", "ref_text")


async def _voice(body: SpeechRequest, state: ServerState) -> SpeechPrompt:
    """In whose voice to speak.

    With instructions a recording is a reference: speech that continues one would read them aloud.

    Raises:
        InvalidRequestError: There is no such voice, or the recording cannot be used.
    """
    if body.ref_audio is None:
        voice = _known_voice(body, state)
        if voice is None or not body.instructions:
            return SpeechPrompt(voice)
        with in_words_of_client(FIELDS):
            found = await state.speech.voices.get(voice)
        return SpeechPrompt(ref_audio_latents=found.latents)
    if not body.ref_text:
        require_reference(state, "ref_audio")
    audio = await decode_recording(body.ref_audio, "ref_audio")
    if body.ref_text and not body.instructions:
        latents = await encode(state, audio, None, "left", "ref_audio")
        return SpeechPrompt(prompt_latents=latents, prompt_text=body.ref_text)
    latents = await encode(state, audio, None, "right", "ref_audio")
    return SpeechPrompt(ref_audio_latents=latents)


def _known_voice(body: SpeechRequest, state: ServerState) -> str | None:
    name, voices = _name_of(body.voice), state.speech.voices
    if name is not None and name in voices:
        return name
    if name is not None and (voice_id := state.voice_id(name)) is not None:
        return voice_id
    if name is None or name in OPENAI_VOICES:
        return state.speech_config.default_voice
    raise InvalidRequestError(
        f"there is no voice {name!r:.200}: GET /v1/audio/voices lists them", "voice"
    )


def _name_of(voice: str | VoiceId | None) -> str | None:
    return voice.id if isinstance(voice, VoiceId) else voice
