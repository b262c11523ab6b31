"""`/v1/audio/voices`: voices by name, for requests of `/v1/audio/speech`.

Who has the admin key keeps voices in the server's directory; everybody else's are in memory, and
gone when the server ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import AliasChoices, Field, ValidationError
from typing_extensions import TypedDict

from nanovllm.audio.voice_directory import MAX_TEXT_CHARS, NAME, NAME_RULE
from nanovllm.errors import InvalidRequestError
from nanovllm.server.auth import is_admin, key_needed
from nanovllm.server.errors import APIError
from nanovllm.server.fields import OrSay, WireModel
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.multipart import read_form
from nanovllm.server.speech.fields import OPENAI_VOICES, AudioFormat, PromptText
from nanovllm.server.speech.inputs import decode_recording, require_reference
from nanovllm.server.state import ServerState, State
from nanovllm.server.streaming import encode, unless_gone

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])

AUDIO_FIELDS = ("audio", "audio_sample", "file")
TEXT_FIELDS = ("text", "ref_text", "prompt_text")


class VoiceToAdd(WireModel):
    """A recording that is to be a voice."""

    name: Annotated[str, Field(pattern=NAME), OrSay(NAME_RULE)]
    audio: Annotated[str, Field(min_length=1, validation_alias=AliasChoices(*AUDIO_FIELDS))] = (
        Field(description="The recording in base64, or as a `data:` URL; no other URL.")
    )
    audio_format: AudioFormat | None = None
    text: PromptText | None = Field(
        None,
        validation_alias=AliasChoices(*TEXT_FIELDS),
        description="What the recording says; models before VoxCPM2 need it.",
    )


class Voice(TypedDict):
    """A voice that requests may name."""

    id: str
    object: Literal["audio.voice"]
    name: str
    is_default: bool


class VoiceList(TypedDict):
    """All of them; `voices` has the names alone, as other servers do."""

    object: Literal["list"]
    data: list[Voice]
    voices: list[str]


class DeletedVoice(TypedDict):
    """A voice that is no more."""

    id: str
    object: Literal["audio.voice.deleted"]
    deleted: Literal[True]


FORM: dict[str, Any] = {
    "type": "object",
    "required": ["name", "audio_sample"],
    "properties": {
        "name": {"type": "string", "pattern": NAME},
        "audio_sample": {"type": "string", "format": "binary"},
        "text": {"type": "string", "maxLength": MAX_TEXT_CHARS},
    },
}


@router.get("/v1/audio/voices", response_model=VoiceList)
async def list_voices(state: State) -> VoiceList:
    """List the voices; what `/add_prompt` keeps is known to who added it alone."""
    named = [(name, name) for name in state.speech.voices.names]
    data = [_describe(state, *voice) for voice in [*named, *state.voice_names.items()]]
    return {"object": "list", "data": data, "voices": [voice["name"] for voice in data]}


@router.post(
    "/v1/audio/voices",
    response_model=Voice,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": VoiceToAdd.model_json_schema()},
                "multipart/form-data": {"schema": FORM},
            },
        }
    },
)
async def add_voice(request: Request, state: State) -> Response:
    """Make a voice of a recording, sent as JSON or as a form."""
    voices = state.speech.voices
    name, audio, audio_format, text = await _read(request)
    if not text.strip():
        require_reference(state, "text")
    admin_key = state.config.admin_key
    by_admin = is_admin(request.scope, admin_key)
    keep = state.speech_config.voices is not None and by_admin
    if name in OPENAI_VOICES and not by_admin:
        raise InvalidRequestError(
            f"{name!r} is a voice of OpenAI's, which everybody's programs name: only who has the "
            "admin key may put another one in its place",
            "name",
        )

    async def respond() -> Response:
        with _reserved(state, name), state.metrics.audio.encoding():
            if keep:
                await voices.add_voice(name, audio, audio_format, text)
                voice_id = name
            else:
                voice_id = await voices.add_prompt(audio, audio_format, text)
                state.voice_names[voice_id] = name
        return Response(encode(_describe(state, voice_id, name)), media_type="application/json")

    return await unless_gone(request, respond())


@router.delete("/v1/audio/voices/{voice}", response_model=DeletedVoice)
async def delete_voice(voice: str, request: Request, state: State) -> DeletedVoice:
    """Forget a voice, by its id or name; what is being spoken with it goes on."""
    voices = state.speech.voices
    if voice in voices.names:
        if not is_admin(request.scope, state.config.admin_key):
            raise key_needed("admin key")
        if voice == state.speech_config.default_voice:
            raise InvalidRequestError(
                f"{voice!r} is the default voice, which the server cannot do without: start it "
                "with another one",
                "voice",
            )
        await voices.remove_voice(voice)
    elif (voice_id := state.voice_id(voice)) is not None:
        del state.voice_names[voice_id]
        voices.remove_prompt(voice_id)
        voice = voice_id
    else:
        raise APIError(404, f"there is no voice {voice!r:.200}", param="voice", code="not_found")
    return {"id": voice, "object": "audio.voice.deleted", "deleted": True}


def _describe(state: ServerState, voice_id: str, name: str) -> Voice:
    is_default = name == state.speech_config.default_voice
    return {"id": voice_id, "object": "audio.voice", "name": name, "is_default": is_default}


@contextmanager
def _reserved(state: ServerState, name: str) -> Iterator[None]:
    """Keep a name for a voice that is being encoded.

    Raises:
        InvalidRequestError: It is taken.
    """
    if name in [*state.speech.voices.names, *state.voice_names.values(), *state.voices_arriving]:
        raise InvalidRequestError(f"there is a voice {name!r} already", "name")
    state.voices_arriving.add(name)
    try:
        yield
    finally:
        state.voices_arriving.discard(name)


async def _read(request: Request) -> tuple[str, bytes, str | None, str]:
    """Name, recording, its format and what it says, whichever way they came.

    Raises:
        InvalidRequestError: The body is no form, or what it has cannot be used.
        RequestValidationError: A field is wrong.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/"):
        given = _validated(await request.json())
        audio = await decode_recording(given.audio, "audio")
        return given.name, audio, given.audio_format, given.text or ""
    form = read_form(content_type, await request.body())
    file = next((form[name] for name in AUDIO_FIELDS if name in form), None)
    texts = [form[name].text for name in TEXT_FIELDS if name in form]
    fields = {"name": form["name"].text} if "name" in form else {}
    given = _validated(fields | {"audio": "a file"} | ({"text": texts[0]} if texts else {}))
    if file is None or not file.content:
        raise InvalidRequestError("audio_sample: must be a recording", "audio_sample")
    return given.name, file.content, None, given.text or ""


def _validated(fields: Any) -> VoiceToAdd:
    try:
        return VoiceToAdd.model_validate(fields)
    except ValidationError as e:
        errors = [{**error, "loc": ("body", *error["loc"])} for error in e.errors()]
        raise RequestValidationError(errors, body=fields) from e
