"""Fields that requests for speech share, and what base64 in them becomes."""

import asyncio
import base64
import string
from typing import Annotated

from pydantic import AfterValidator, Field

from nanovllm.audio.latents import latents_fault
from nanovllm.audio.voice_directory import MAX_TEXT_CHARS
from nanovllm.errors import InvalidRequestError
from nanovllm.server.fields import WHOLE, Int64, NumTokens, TokenCount, WireModel
from nanovllm.server.state import ServerState
from nanovllm.speech_params import SpeechParams

MAX_TEXT = 1 << 16
"""Characters of a text; far more than any context holds."""
LARGE_BASE64 = 64 << 10
"""Characters from which decoding goes to a thread."""

Speakable = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
VoiceName = Annotated[str, Field(min_length=1, max_length=256)]
PromptText = Annotated[
    str,
    Field(max_length=MAX_TEXT_CHARS),
    AfterValidator(lambda text: text if text.strip() else ""),
]
"""What a recording says; blank is nothing."""
AudioFormat = Annotated[str, Field(max_length=64)]
"""What a recording is said to be, such as "wav"; its first bytes decide."""

OPENAI_VOICES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx"),
    *("sage", "shimmer", "verse", "default"),
)
"""Voices that clients name without being asked; unless there is one of that name, they get the
default one."""


class SpeechOptions(WireModel):
    """How to speak; names and defaults are VoxCPM's."""

    cfg_value: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None, description="How closely the speech follows the text; by default 2."
    )
    inference_timesteps: Annotated[int, Field(ge=2, le=100), WHOLE] | None = Field(
        None, description="Steps of the sampler; by default the server's, which is 10."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Factor on the sampler's noise; by default 1."
    )
    seed: Int64 | None = Field(None, description="Makes the speech reproducible.")
    min_len: NumTokens | None = Field(
        None, description="The model may stop after so many patches and two; by default 2."
    )
    max_generate_length: TokenCount | None = Field(
        None,
        description="Patches at most, of 80 or 160 ms; by default 2000, or what "
        "the context leaves.",
    )
    lora_name: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="A registered adapter; see `/loras`."
    )

    def params(self, state: ServerState, *, retry_badcase: bool = False) -> SpeechParams:
        """What the model is asked for.

        Raises:
            InvalidRequestError: A value cannot be used.
        """
        fields = set(SpeechOptions.model_fields) - {"lora_name"}
        given = self.model_dump(include=fields, exclude_none=True)
        defaults = {"inference_timesteps": state.speech_config.inference_timesteps}
        return SpeechParams(**defaults | given, retry_badcase=retry_badcase)


async def decode_base64(text: str, field: str) -> bytes:
    """The bytes of a field; line breaks do not matter.

    Raises:
        InvalidRequestError: It is not base64.
    """

    def decode() -> bytes:
        data = text.encode().translate(None, string.whitespace.encode())
        return base64.b64decode(data, validate=True)

    try:
        return await asyncio.to_thread(decode) if len(text) > LARGE_BASE64 else decode()
    except ValueError as e:
        raise InvalidRequestError(f"Invalid base64 in {field}: {e}", field) from e


async def decode_latents(text: str, field: str, state: ServerState) -> bytes:
    """The latents of a field: float32 `[num_patches, patch_size, feat_dim]`.

    Raises:
        InvalidRequestError: It is not base64, or not latents of this model.
    """
    latents = await decode_base64(text, field)
    info = state.speech.info
    if why := latents_fault(latents, info.patch_size, info.feat_dim):
        raise InvalidRequestError(f"Invalid latent payload in {field}: {why}", field)
    return latents
