"""Speech as a file, written while it is generated: a writer for each response format.

Encoding MP3, Opus, FLAC and AAC is CPU work: an event loop leaves it to a thread.
"""

import struct
from types import TracebackType

import numpy as np

from nanovllm.audio.encoders import (
    AacEncoder,
    Encoder,
    FlacEncoder,
    Mp3Encoder,
    Mp3Options,
    OpusEncoder,
)
from nanovllm.audio.files import Samples, resample_stream
from nanovllm.errors import InvalidRequestError

MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "raw": "audio/raw",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}
RESPONSE_FORMATS = tuple(MEDIA_TYPES)

UNKNOWN_SIZE = 0xFFFFFFFF
"""What the sizes in a WAV header are while nobody knows them, with OpenAI too."""


class AudioWriter:
    """Makes a file of mono samples as they come: the bytes of all calls, joined, are the file.

    Args:
        media_type: MIME type of the file.
        encoder: What makes bytes of samples.
        rate: Rate of the samples, in Hz. They are resampled where the format has no such rate.
    """

    def __init__(self, media_type: str, encoder: Encoder, rate: int) -> None:
        self.media_type = media_type
        self._encoder = encoder
        self._resampler = resample_stream(rate, encoder.rate) if rate != encoder.rate else None
        self._closed = False

    @property
    def rate(self) -> int:
        """Rate of what is written, in Hz."""
        return self._encoder.rate

    def write(self, audio: Samples) -> bytes:
        """Add float32 samples `[num_samples]`; values beyond [-1, 1] are clipped but in "raw".

        Returns:
            Bytes of the file that are ready; maybe none.
        """
        audio = np.asarray(audio, np.float32)
        if self._resampler is not None:
            audio = self._resampler.resample_chunk(audio)
        return self._encode(audio)

    def close(self) -> bytes:
        """End the file and return the rest of its bytes; the second time, none."""
        if self._closed:
            return b""
        self._closed = True
        rest = b""
        if self._resampler is not None:
            rest = self._encode(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
        return rest + self._encoder.close()

    def _encode(self, audio: Samples) -> bytes:
        # libsndfile has crashed on blocks of minutes (libsndfile#1095).
        blocks = range(0, len(audio), self.rate)
        return b"".join(self._encoder.encode(audio[i : i + self.rate]) for i in blocks)

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class PcmEncoder(Encoder):
    """Bare samples: signed 16 bit, little endian."""

    def encode(self, audio: Samples) -> bytes:
        # Towards zero, as the family does it.
        return (np.clip(audio, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


class RawEncoder(Encoder):
    """Bare samples: float32, little endian, as the model has them."""

    def encode(self, audio: Samples) -> bytes:
        return np.asarray(audio, "<f4").tobytes()


class WavEncoder(PcmEncoder):
    """WAV of signed 16 bit samples; its header leaves with the first of them.

    Args:
        rate: Rate in Hz.
        streaming: Whether the header may leave before the length is known. Otherwise all bytes
            come with `close`.
    """

    def __init__(self, rate: int, streaming: bool) -> None:
        super().__init__(rate)
        self._streaming = streaming
        self._started = False
        self._held = bytearray()

    def encode(self, audio: Samples) -> bytes:
        samples = super().encode(audio)
        if not self._streaming:
            self._held += samples
            return b""
        return self._header(UNKNOWN_SIZE) + samples

    def close(self) -> bytes:
        if self._streaming:
            return self._header(UNKNOWN_SIZE)
        return self._header(len(self._held)) + bytes(self._held)

    def _header(self, num_bytes: int) -> bytes:
        """The header, once."""
        if self._started:
            return b""
        self._started = True
        riff_size = min(36 + num_bytes, UNKNOWN_SIZE)
        description = struct.pack("<IHHIIHH", 16, 1, 1, self.rate, 2 * self.rate, 2, 16)
        sizes = struct.pack("<I", riff_size), struct.pack("<I", num_bytes)
        return b"RIFF" + sizes[0] + b"WAVEfmt " + description + b"data" + sizes[1]


def make_writer(
    response_format: str, rate: int, *, streaming: bool = True, mp3: Mp3Options | None = None
) -> AudioWriter:
    """Begin a file of speech.

    Args:
        response_format: One of `RESPONSE_FORMATS`: "pcm" is signed 16 bit, "raw" float32, both
            little endian; "opus" comes in Ogg, "aac" in ADTS.
        rate: Rate of the samples, in Hz.
        streaming: Whether bytes should leave early. Otherwise headers have the right lengths, and
            most bytes come with `close`.
        mp3: How to encode MP3.

    Raises:
        InvalidRequestError: There is no such format, or it needs the extra `audio`.
    """
    if response_format not in MEDIA_TYPES:
        raise InvalidRequestError(
            f"response_format must be one of {', '.join(RESPONSE_FORMATS)}, "
            f"got {response_format!r:.40}",
            "response_format",
        )
    encoder = _encoder(response_format, rate, streaming, mp3 or Mp3Options())
    return AudioWriter(MEDIA_TYPES[response_format], encoder, rate)


def encode_audio(
    response_format: str, rate: int, audio: Samples, mp3: Mp3Options | None = None
) -> bytes:
    """Make a whole file of float32 samples `[num_samples]`; see `make_writer`."""
    writer = make_writer(response_format, rate, streaming=False, mp3=mp3)
    return writer.write(audio) + writer.close()


def _encoder(response_format: str, rate: int, streaming: bool, mp3: Mp3Options) -> Encoder:
    match response_format:
        case "wav":
            return WavEncoder(rate, streaming)
        case "pcm":
            return PcmEncoder(rate)
        case "raw":
            return RawEncoder(rate)
        case "flac":
            return FlacEncoder(rate, streaming)
        case "mp3":
            return Mp3Encoder(rate, streaming, mp3)
        case "opus":
            return OpusEncoder(rate, streaming)
        case _:
            return AacEncoder(rate)
