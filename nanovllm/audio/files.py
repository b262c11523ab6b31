"""Recordings as bytes, made into mono samples at a model's rate. The bytes are not to be trusted.

Decoding is CPU work: an event loop leaves it to a thread.
"""

import io
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from nanovllm.errors import InvalidRequestError

Samples = NDArray[np.float32]
Side = Literal["left", "right"]

MAX_FILE_BYTES = 25 << 20
MAX_SECONDS = 600.0
MIN_SECONDS = 0.01
MAX_DECODED_BYTES = 256 << 20
"""Of all channels, as float32: what a small file may make us decode."""
MAX_AMPLITUDE = 8.0
"""Full scale is 1; what is far beyond it was never scaled to it, and would be noise."""
MIN_RATE, MAX_RATE = 2000, 384000
BLOCK_FRAMES = 1 << 15
MISLEADING = ("File does not exist", "Internal error")
"""How libsndfile begins to speak of some damaged files."""

Reader = Literal["soundfile", "mov", "matroska", "aac"]

RESAMPLER_QUALITY = "HQ"


class _Block(NamedTuple):
    """Some of a recording's samples, `[frames, channels]`, and their rate in Hz."""

    samples: Samples
    rate: int


def read_audio(data: bytes, wav_format: str | None, rate: int) -> Samples:
    """Decode a recording: channels averaged, resampled.

    Args:
        data: A file: WAV, FLAC, MP3, Ogg (Opus or Vorbis), AIFF, AU or CAF; with the extra `audio`
            also AAC, and the sound of MP4 and WebM.
        wav_format: What the sender says it is. What it is, its first bytes tell.
        rate: Rate to resample to, in Hz.

    Returns:
        Samples `[num_samples]`.

    Raises:
        InvalidRequestError: It cannot be decoded, or is too long, too short or no sound; `param` is
            "audio".
    """
    try:
        return _read_audio(data, wav_format, rate)
    except InvalidRequestError as e:
        e.param = "audio"
        raise


def _read_audio(data: bytes, wav_format: str | None, rate: int) -> Samples:
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequestError(
            f"a recording may have {MAX_FILE_BYTES} bytes at most, got {len(data)}"
        )
    reader = _reader(data, wav_format)
    blocks = _soundfile_blocks(data) if reader == "soundfile" else _av_blocks(data, reader)
    audio = _resampled(_checked(blocks), rate)
    if len(audio) < MIN_SECONDS * rate:
        raise InvalidRequestError(
            f"the recording is too short: it must last at least {MIN_SECONDS} s, "
            f"got {len(audio)} samples at {rate} Hz"
        )
    return audio


def pad(audio: Samples, multiple: int, side: Side) -> Samples:
    """Add zeros before or after some samples, so that their number is a multiple of `multiple`."""
    missing = -len(audio) % multiple
    return np.pad(audio, (missing, 0) if side == "left" else (0, missing))


def _reader(data: bytes, wav_format: str | None) -> Reader:
    """What can read the file. Nothing guesses: a guess may end in a parser that nobody tends.

    Raises:
        InvalidRequestError: Nothing we know begins like this.
    """
    start = data[:12]
    if start.startswith((b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"ID3")):
        return "soundfile"
    if start.startswith((b"FORM", b".snd", b"caff")):
        return "soundfile"
    if start[4:8] == b"ftyp":
        return "mov"
    if start.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if len(start) > 1 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0:
        # MPEG audio, whose layer 0 is what ADTS has.
        return "soundfile" if start[1] & 0x06 else "aac"
    said = f" (said to be {wav_format[:16]!r})" if wav_format else ""
    raise InvalidRequestError(
        f"the recording{said} is in none of the formats that can be read: WAV, FLAC, MP3, Ogg, "
        "AIFF, AU, CAF, AAC, MP4, WebM"
    )


class _Bytes(io.BytesIO):
    """A file in memory that forgives what broken headers make libsndfile ask for."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: len(self.getbuffer())}
        return super().seek(max(base[whence] + offset, 0))


class _ForwardSoundFile(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read from start to end.

    soundfile would otherwise trust the header's length, and seek after every block, which FLAC
    of unknown length does not allow.
    """

    def seekable(self) -> bool:
        return False


def _soundfile_blocks(data: bytes) -> Iterator[_Block]:
    try:
        with _ForwardSoundFile(_Bytes(data)) as file:
            _check_rate(file.samplerate)
            while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                yield _Block(block, file.samplerate)
    except soundfile.LibsndfileError as e:
        # The exception's own text has the address of the object we read from.
        reason = e.error_string
        if reason.startswith(MISLEADING):
            reason = "it is damaged"
        raise InvalidRequestError(f"cannot decode the recording: {reason}") from e
    except (soundfile.SoundFileError, RuntimeError, ValueError) as e:
        if isinstance(e, InvalidRequestError):
            raise
        raise InvalidRequestError("cannot decode the recording: its header is broken") from e


def _av_blocks(data: bytes, container_format: str) -> Iterator[_Block]:
    """Decode with PyAV.

    The format is given, not probed: FFmpeg also has formats that are lists of other files.
    """
    av = import_av("a recording in this format")
    try:
        with av.open(io.BytesIO(data), format=container_format, metadata_errors="replace") as file:
            if not file.streams.audio:
                raise InvalidRequestError("the recording has no sound")
            # Mixed by FFmpeg: PyAV (18.1) reads beyond the planes of a frame with 8 channels. It
            # also lets all frames pass as they are if the first is mono.
            mixer = av.AudioResampler(format="fltp", layout="mono")
            for frame in file.decode(file.streams.audio[0]):
                _check_rate(frame.sample_rate)
                for mixed in mixer.resample(frame):
                    if mixed.layout.nb_channels != 1 or mixed.format.name != "fltp":
                        raise InvalidRequestError("the recording's format changes on the way")
                    yield _Block(mixed.to_ndarray().T, mixed.sample_rate)
    except (av.FFmpegError, RuntimeError, ValueError, OverflowError) as e:
        if isinstance(e, InvalidRequestError):
            raise
        reason = getattr(e, "strerror", None) or "its header is broken"
        raise InvalidRequestError(f"cannot decode the recording: {reason}") from e


def import_av(what: str) -> ModuleType:
    """PyAV, which comes with the extra `audio`.

    Raises:
        InvalidRequestError: It is not installed.
    """
    try:
        return import_module("av")
    except ImportError as e:
        raise InvalidRequestError(
            f"{what} needs PyAV, which is not installed here: pip install 'nanovllm[audio]'"
        ) from e


def _check_rate(rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidRequestError(
            f"the recording's sample rate must be in [{MIN_RATE}, {MAX_RATE}] Hz, got {rate}"
        )


def _checked(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Pass blocks on until there are too many: a header's length is only a claim."""
    seconds, num_bytes = 0.0, 0
    for block in blocks:
        seconds += len(block.samples) / block.rate
        num_bytes += block.samples.nbytes
        if seconds > MAX_SECONDS:
            raise InvalidRequestError(f"a recording may last {MAX_SECONDS:.0f} s at most")
        if num_bytes > MAX_DECODED_BYTES:
            raise InvalidRequestError(
                f"a recording may decode to {MAX_DECODED_BYTES >> 20} MiB of samples at most"
            )
        if not np.isfinite(block.samples).all():
            raise InvalidRequestError("the recording has samples that are NaN or infinite")
        if block.samples.size and np.abs(block.samples).max() > MAX_AMPLITUDE:
            raise InvalidRequestError("the recording's samples must be in [-1, 1]")
        yield block


def _resampled(blocks: Iterator[_Block], rate: int) -> Samples:
    """Mono samples at one rate; resampled block by block, so that the original is never held."""
    parts: list[Samples] = []
    resampler: soxr.ResampleStream | None = None
    source = 0
    for block in blocks:
        mono = block.samples.mean(axis=1, dtype=np.float32)
        if source not in (0, block.rate):
            raise InvalidRequestError("the recording's sample rate changes on the way")
        if not source and block.rate != rate:
            resampler = resample_stream(block.rate, rate)
        source = block.rate
        parts.append(mono if resampler is None else resampler.resample_chunk(mono))
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def resample_stream(source: int, target: int) -> soxr.ResampleStream:
    """A resampler of mono samples that come in chunks; rates in Hz."""
    return soxr.ResampleStream(source, target, 1, dtype="float32", quality=RESAMPLER_QUALITY)
