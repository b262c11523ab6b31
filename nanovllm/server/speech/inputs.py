"""The voice of a request: a recording, its latents, or the name of either."""

from typing import NamedTuple

from nanovllm.audio.files import Side
from nanovllm.errors import InvalidRequestError
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.speech.fields import decode_base64
from nanovllm.server.state import ServerState


class SpeechPrompt(NamedTuple):
    """What the speech goes on from, or takes its voice from; see `AsyncSpeech.generate`."""

    voice: str | None = None
    prompt_latents: bytes | None = None
    prompt_text: str = ""
    ref_audio_latents: bytes | None = None


async def decode_recording(text: str, field: str) -> bytes:
    """The bytes of base64 or of a `data:` URL; nothing is fetched.

    Raises:
        InvalidRequestError: It is neither.
    """
    head, comma, data = text.partition(",")
    if comma and head.lstrip()[:5].lower() == "data:":
        if not head.lower().endswith(";base64"):
            raise InvalidRequestError(
                f"{field} must be a data: URL in base64: data:audio/wav;base64,...", field
            )
        return await decode_base64(data, field)
    if "://" in text[:16]:
        raise InvalidRequestError(
            f"{field} must be base64 or a data: URL: this server fetches nothing", field
        )
    return await decode_base64(text, field)


async def encode(
    state: ServerState, audio: bytes, audio_format: str | None, side: Side, field: str
) -> bytes:
    """The latents of a recording, counted and timed.

    Args:
        state: The server.
        audio: A file.
        audio_format: What the client says it is.
        side: Where it is padded: "left" of a recording to go on from, "right" of a reference.
        field: Where in the request it was.

    Raises:
        InvalidRequestError: It cannot be decoded, or is too long or too short.
        UnavailableError: No engine is running.
    """
    with state.metrics.audio.encoding(), in_words_of_client({"audio": field}):
        return await state.speech.encode(audio, audio_format, side)


def require_reference(state: ServerState, param: str) -> None:
    """Refuse a voice without its text where the model cannot use it.

    Raises:
        InvalidRequestError: It cannot.
    """
    if not state.speech.info.supports_reference:
        raise InvalidRequestError("Reference audio is not supported by the loaded model", param)
