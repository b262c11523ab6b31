"""Voices that requests may name: recordings, encoded, and what is said in them."""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanovllm.audio.encoded_recordings import Encode
from nanovllm.audio.voice_directory import MAX_TEXT_CHARS, VoiceDirectory
from nanovllm.errors import InvalidRequestError
from nanovllm.validation import check_type

MAX_PROMPTS = 4096
MAX_PROMPT_BYTES = 256 << 20
"""Latents of the prompts that clients added; ten minutes of speech are some 4 MB."""


@dataclass(frozen=True, slots=True)
class Voice:
    """A recording that requests may name.

    Args:
        id: What they name it by: an id we gave out, or the name of a voice on disk.
        prompt_text: What is said in it. Without that it is a reference, which VoxCPM2 takes.
        latents: float32 `[frames, feat_dim]`.
    """

    id: str
    prompt_text: str
    latents: bytes

    @property
    def is_reference(self) -> bool:
        return not self.prompt_text


class VoicePrompt(NamedTuple):
    """What speech goes on from, and whose voice it takes; see `SpeechFrontend.process`."""

    prompt_latents: bytes | None = None
    prompt_text: str = ""
    ref_audio_latents: bytes | None = None


class VoiceStore:
    """The voices of a server: prompts that clients added, in memory, and those of a directory.

    The latents of a directory's voices are kept once they have been used: there are as many as
    whoever runs the server put there. Prompts are limited in number and size.

    Args:
        encode: Makes latents of a recording.
        directory: Where the named voices are; more come with `open_directory`.

    Raises:
        FileNotFoundError: There is no such directory.
    """

    def __init__(self, encode: Encode, directory: Path | None = None) -> None:
        self._encode = encode
        self._prompts: dict[str, Voice] = {}
        self._num_prompt_bytes = 0
        self._directory: VoiceDirectory | None = None
        self._named: dict[str, Voice] = {}
        self._changing: set[str] = set()
        if directory is not None:
            self.open_directory(directory)

    def open_directory(self, directory: Path) -> None:
        """Take the voices of a directory: `NAME.wav` (or flac, mp3, ogg) and `NAME.txt` beside it.

        Raises:
            FileNotFoundError: There is no such directory.
        """
        self._directory = VoiceDirectory(directory)
        self._named.clear()

    @property
    def names(self) -> list[str]:
        """The named voices, in order."""
        return [] if self._directory is None else self._directory.names

    def __contains__(self, voice: object) -> bool:
        return voice in self._prompts or voice in self.names

    def __iter__(self) -> Iterator[str]:
        """Names and ids."""
        return iter([*self.names, *self._prompts])

    def text_of(self, voice: str) -> str:
        """What is said in a voice's recording, "" in a reference.

        Raises:
            InvalidRequestError: There is no such voice.
        """
        if voice in self._prompts:
            return self._prompts[voice].prompt_text
        if self._directory is not None and (file := self._directory.find(voice)) is not None:
            return file.text
        raise _not_found(voice)

    async def get(self, voice: str) -> Voice:
        """A voice by its id or name; one on disk is read and encoded when it is first asked for.

        Raises:
            InvalidRequestError: There is no such voice, or its recording cannot be used.
        """
        found = self._prompts.get(voice) or self._named.get(voice)
        if found is not None:
            return found
        directory = self._directory
        if directory is None or (file := directory.find(voice)) is None:
            raise _not_found(voice)
        data = await asyncio.to_thread(directory.read, file)
        try:
            made = await self._voice(voice, data, None, file.text)
        except InvalidRequestError as e:
            raise InvalidRequestError(f"voice {voice!r} cannot be used: {e}", "prompt_id") from e
        if directory.find(voice) is file:  # it may have been removed meanwhile
            self._named[voice] = made
        return made

    async def resolve(self, voice: str, prompt: VoicePrompt | None = None) -> VoicePrompt:
        """What a voice adds to a prompt that may have no recording of that kind itself.

        Raises:
            InvalidRequestError: There is no such voice, or the prompt has one.
        """
        check_type("prompt_id", voice, str, "a string")
        prompt = prompt or VoicePrompt()
        if voice not in self:
            raise _not_found(voice)
        if prompt.prompt_latents is not None:
            raise InvalidRequestError(
                "Prompt latents and prompt id cannot be provided at the same time", "prompt_id"
            )
        if prompt.prompt_text:
            raise InvalidRequestError(
                "Prompt text and prompt id cannot be provided at the same time", "prompt_id"
            )
        found = await self.get(voice)
        if not found.is_reference:
            return VoicePrompt(found.latents, found.prompt_text, prompt.ref_audio_latents)
        if prompt.ref_audio_latents is not None:
            raise InvalidRequestError(
                "Reference audio and a prompt without text cannot be provided at the same time",
                "prompt_id",
            )
        return VoicePrompt(ref_audio_latents=found.latents)

    async def add_prompt(self, data: bytes, wav_format: str | None, prompt_text: str = "") -> str:
        """Encode a recording and keep it until it is removed, or this process ends.

        Args:
            data: A file; see `read_audio`.
            wav_format: What the sender says it is.
            prompt_text: What is said in it, as the text to speak will follow it; if that is blank
                the recording is a reference.

        Returns:
            Its id.

        Raises:
            InvalidRequestError: The recording cannot be used, or there are too many prompts.
        """
        self._check_room()
        prompt_id = uuid.uuid4().hex
        voice = await self._voice(prompt_id, data, wav_format, prompt_text)
        self._check_room(len(voice.latents))
        self._prompts[prompt_id] = voice
        self._num_prompt_bytes += len(voice.latents)
        return prompt_id

    def remove_prompt(self, prompt_id: str) -> None:
        """Forget a prompt; what is spoken with it already goes on.

        Raises:
            InvalidRequestError: There is none with this id.
        """
        check_type("prompt_id", prompt_id, str, "a string")
        if prompt_id not in self._prompts:
            raise _not_found(prompt_id)
        self._num_prompt_bytes -= len(self._prompts.pop(prompt_id).latents)

    async def add_voice(
        self, name: str, data: bytes, wav_format: str | None, prompt_text: str = ""
    ) -> None:
        """Encode a recording and keep it in the directory under a name.

        Args:
            name: Letters, digits, spaces and any of `._-`.
            data: A WAV, FLAC, MP3 or Ogg file.
            wav_format: What the sender says it is.
            prompt_text: What is said in it; without that it is a reference.

        Raises:
            InvalidRequestError: There is no directory, the name is taken or none, or the recording
                cannot be used.
        """
        directory = self._require_directory()
        with self._alone_with(name):
            directory.check_new(name, data)
            # Without the white space around it, as the file's text is read.
            voice = await self._voice(name, data, wav_format, prompt_text.strip())
            await asyncio.to_thread(directory.add, name, data, voice.prompt_text)
            self._named[name] = voice

    async def remove_voice(self, name: str) -> None:
        """Remove a voice from the directory.

        Raises:
            InvalidRequestError: There is none of this name.
        """
        directory = self._require_directory()
        with self._alone_with(name):
            if name not in directory.names:
                raise _not_found(name)
            await asyncio.to_thread(directory.remove, name)
            self._named.pop(name, None)

    def _check_room(self, num_bytes: int = 0) -> None:
        """Refuse a prompt that does not fit.

        Raises:
            InvalidRequestError: It does not; there is room only once others are removed.
        """
        if len(self._prompts) >= MAX_PROMPTS:
            raise InvalidRequestError(
                f"there are {len(self._prompts)} prompts, of {MAX_PROMPTS} that are kept: remove "
                "one first"
            )
        if (num_bytes := num_bytes + self._num_prompt_bytes) > MAX_PROMPT_BYTES:
            raise InvalidRequestError(
                f"the latents of all prompts would have {num_bytes} bytes, of {MAX_PROMPT_BYTES} "
                "that are kept: remove a prompt first, or give a shorter recording"
            )

    @contextmanager
    def _alone_with(self, name: str) -> Iterator[None]:
        """Keep others from adding or removing a voice that is being added or removed.

        Raises:
            InvalidRequestError: It is.
        """
        if name in self._changing:
            raise InvalidRequestError(
                f"the voice {name!r:.80} is being added or removed already", "name"
            )
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    async def _voice(self, voice: str, data: bytes, wav_format: str | None, text: str) -> Voice:
        text = text if text.strip() else ""
        if len(text) > MAX_TEXT_CHARS:
            raise InvalidRequestError(
                f"prompt_text may have {MAX_TEXT_CHARS} characters at most, got {len(text)}",
                "prompt_text",
            )
        return Voice(voice, text, await self._encode(data, wav_format, "left" if text else "right"))

    def _require_directory(self) -> VoiceDirectory:
        if self._directory is None:
            raise InvalidRequestError("named voices need a directory: start the server with voices")
        return self._directory


def _not_found(voice: str) -> InvalidRequestError:
    return InvalidRequestError(f"Prompt with id {voice:.200} not found", "prompt_id")
