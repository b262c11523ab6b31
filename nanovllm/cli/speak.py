"""`nanovllm speak`: a text, as a file of speech."""

import asyncio
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

from cyclopts import Group, Parameter

from nanovllm.cli.generate import read_prompt
from nanovllm.cli.options import DEFAULT_CONFIG, Engine
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from nanovllm.async_speech import AsyncSpeech
    from nanovllm.audio.containers import AudioWriter
    from nanovllm.outputs import SpeechOutput

FORMAT_OF_SUFFIX = {
    ".wav": "wav",
    ".flac": "flac",
    ".mp3": "mp3",
    ".opus": "opus",
    ".ogg": "opus",
    ".aac": "aac",
    ".pcm": "pcm",
    ".raw": "raw",
}
STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True, kw_only=True)
class SpeakingFlags:
    """How to speak.

    Args:
        cfg_value: How closely the speech follows the text, in [0, 10]; at 1 it takes half the time.
        inference_timesteps: Steps of the sampler, 2 to 100; fewer are faster and rougher.
        temperature: Factor on the sampler's noise.
        min_len: The speech has two patches more than this at least.
        max_generate_length: Patches at most; None is 2000, or what the context leaves.
        retry_badcase: Whether speech that goes astray is tried again.
    """

    cfg_value: float = 2.0
    inference_timesteps: int = 10
    temperature: float = 1.0
    min_len: int = 2
    max_generate_length: int | None = None
    retry_badcase: bool = False


Speaking = Annotated[SpeakingFlags, Parameter(name="*", group=Group("Speech", sort_key=2))]
DEFAULT_SPEAKING = SpeakingFlags()


class Recording(NamedTuple):
    """A file, read before the model is: loading that may take minutes."""

    data: bytes
    kind: str

    @classmethod
    def read(cls, path: Path | None) -> "Recording | None":
        """Read a file, if one was given."""
        return None if path is None else cls(path.read_bytes(), path.suffix[1:])


@dataclass(frozen=True)
class VoiceFiles:
    """Recordings to speak like, and an adapter."""

    prompt: Recording | None
    prompt_text: str | None
    reference: Recording | None
    lora: Path | None


def speak(
    text: str | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)],
    file: Path | None = None,
    format: str | None = None,  # noqa: A002
    voice: Path | None = None,
    voice_text: str | None = None,
    reference: Path | None = None,
    lora: Path | None = None,
    split_sentences: bool = False,
    speaking: Speaking = DEFAULT_SPEAKING,
    engine: Engine = DEFAULT_CONFIG,
) -> None:
    """Speak a text with a VoxCPM model; the real-time factor goes to standard error.

    Args:
        text: The text. Without one, and without `--file`, it is read from standard input.
        output: File to write; its suffix says the format: wav, flac, mp3, opus, ogg, aac, pcm (16
            bit) or raw (float32). `-` is standard output, as it comes.
        file: File whose whole text is spoken.
        format: Format in place of the suffix's.
        voice: Recording to go on from, in its voice; needs `--voice-text`.
        voice_text: What is said in it.
        reference: Recording whose voice is taken, whatever it says; VoxCPM2 only.
        lora: Directory of a LoRA adapter.
        split_sentences: Whether a long text is spoken sentence by sentence, in one voice.
        speaking: How to speak.
        engine: The engine; `--model` is needed.
    """
    if engine.model is None:
        raise InvalidRequestError("no model: give --model, such as openbmb/VoxCPM-0.5B", "model")
    if (voice is None) != (voice_text is None):
        raise InvalidRequestError(
            "--voice and --voice-text go together: a recording and what is said in it", "voice"
        )
    if voice_text is not None and not voice_text.strip():
        raise InvalidRequestError(
            "--voice-text is blank: give what is said in the recording, or take it as --reference",
            "voice_text",
        )
    if split_sentences and speaking.retry_badcase:
        raise InvalidRequestError(
            "--retry-badcase and --split-sentences do not go together", "retry_badcase"
        )
    spoken = read_prompt(text, file, 'nanovllm speak "Good morning." -o out.wav')
    if not spoken.strip():
        raise InvalidRequestError("target text must be a non-empty string", "text")
    target = Target(output, _format_of(output, format))
    voices = VoiceFiles(Recording.read(voice), voice_text, Recording.read(reference), lora)
    engine = replace(engine, enable_lora=engine.enable_lora or lora is not None)
    try:
        said = asyncio.run(_speak(spoken, target, voices, speaking, engine, split_sentences))
    except RuntimeError as e:
        _fail(str(e))
    sys.stderr.write(said)


class Target:
    """Where speech goes, a file when it is complete or standard output as it comes.

    Args:
        path: The file; "-" is standard output.
        response_format: Its format.
    """

    def __init__(self, path: Path, response_format: str) -> None:
        self._path = path
        self._format = response_format
        self._streams = path == STANDARD_OUTPUT
        self._parts: list[bytes] = []
        if not self._streams and path.is_dir():
            raise InvalidRequestError(f"cannot write {path}: that is a directory", "output")
        if not self._streams and not path.absolute().parent.is_dir():
            raise InvalidRequestError(
                f"cannot write {path}: there is no directory {path.parent}", "output"
            )
        if not self._streams and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidRequestError(f"cannot write {path}: permission denied", "output")

    def open(self, rate: int) -> "AudioWriter":
        """Begin, now that the sample rate is known."""
        from nanovllm.audio.containers import make_writer

        return make_writer(self._format, rate, streaming=self._streams)

    def add(self, data: bytes) -> None:
        """Take what is ready."""
        if self._streams:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            self._parts.append(data)

    def close(self) -> None:
        """Write the file."""
        if not self._streams:
            self._path.write_bytes(b"".join(self._parts))


async def _speak(
    text: str,
    target: Target,
    voices: VoiceFiles,
    speaking: SpeakingFlags,
    config: EngineConfig,
    split_sentences: bool,
) -> str:
    """Speak and write; returns what is said about it."""
    from nanovllm.async_speech import AsyncSpeech
    from nanovllm.speech_params import SpeechParams

    params = SpeechParams(**asdict(speaking))
    async with AsyncSpeech.from_config(config) as speech:
        writer = target.open(speech.info.sample_rate)
        options = await _options(speech, voices)
        began = time.perf_counter()
        if params.retry_badcase:
            audio, output = await speech.speak(text, params, **options)
            first = time.perf_counter()
            target.add(writer.write(audio))
        else:
            begin = speech.generate_long if split_sentences else speech.generate
            stream = await begin(text, params, **options)
            first = 0.0
            async for chunk in stream:
                first = first or time.perf_counter()
                target.add(writer.write(chunk))
            output = stream.output
        target.add(writer.close())
        elapsed = time.perf_counter() - began
    target.close()
    return describe(output, elapsed, first - began)


async def _options(speech: "AsyncSpeech", voices: VoiceFiles) -> dict[str, Any]:
    """Encode the recordings and load the adapter; returns what `generate` takes."""
    options: dict[str, Any] = {}
    if voices.prompt is not None:
        latents = await speech.encode(voices.prompt.data, voices.prompt.kind)
        options |= {"prompt_latents": latents, "prompt_text": voices.prompt_text}
    if voices.reference is not None:
        data, kind = voices.reference
        options["ref_audio_latents"] = await speech.encode(data, kind, "right")
    if voices.lora is not None:
        await speech.register_lora("lora", str(voices.lora.absolute()))
        options["lora_name"] = "lora"
    return options


def describe(output: "SpeechOutput", elapsed: float, until_first: float) -> str:
    """What there is to say about speech: how long it is, and how long it took."""
    duration = output.duration
    factor = elapsed / duration if duration else float("inf")
    lines = [
        f"{duration:.2f} s of speech at {output.sample_rate} Hz in {elapsed:.2f} s: RTF "
        f"{factor:.3f}, first sound after {until_first:.2f} s"
    ]
    if output.finish_reason == "length":
        lines.append(
            "the speech did not end by itself, and was cut: try another --seed, --retry-badcase, "
            "or --split-sentences if the text is long"
        )
    return "".join(f"{line}\n" for line in lines)


def _format_of(output: Path, given: str | None) -> str:
    """The format of a file.

    Raises:
        InvalidRequestError: Its suffix is none that we write.
    """
    known = FORMAT_OF_SUFFIX | {name: name for name in FORMAT_OF_SUFFIX.values()}
    default = "wav" if output == STANDARD_OUTPUT else output.suffix.lower()
    name = (given or default).lower()
    if name not in known:
        raise InvalidRequestError(
            f"cannot tell the format of {str(output)!r}: end it in "
            f"{', '.join(FORMAT_OF_SUFFIX)}, or give --format",
            "output" if given is None else "format",
        )
    return known[name]


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"nanovllm: error: {' '.join(message.split())}\n")
    sys.exit(1)
