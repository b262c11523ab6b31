"""Encoders of compressed audio that give their bytes away as early as they can."""

import io
import logging
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np
import soundfile

from nanovllm.audio.files import Samples, import_av
from nanovllm.errors import InvalidRequestError

logger = logging.getLogger(__name__)

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_RATES = (*MP3_RATES, 64000, 88200, 96000)

OGG_PAGE_MS = 80.0
"""A page leaves when it is full; libsndfile fills a second's, which a listener waits for."""
SET_OGG_PAGE_LATENCY_MS = 0x1302
"""libsndfile's `SFC_SET_OGG_PAGE_LATENCY_MS`, for which soundfile has no name."""

LAME_DELAY = 576
"""Samples that LAME puts before the first."""

AAC_BITRATE = 128_000


@dataclass(frozen=True, slots=True)
class Mp3Options:
    """How to encode MP3.

    Args:
        bitrate_kbps: Constant bitrate, 32 to 320; the nearest that the sample rate allows, which is
            160 at most below 32 kHz, is taken.
        quality: The effort LAME makes, 0 to 2, as the family's servers are told it. libsndfile
            leaves LAME at its own choice (3), whatever this is.

    Raises:
        InvalidRequestError: A value is outside its range.
    """

    bitrate_kbps: int = 192
    quality: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (("bitrate_kbps", 32, 320), ("quality", 0, 2)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidRequestError(f"mp3 {name} must be in [{low}, {high}], got {value}")


class Encoder(ABC):
    """Makes bytes of mono float32 samples.

    Args:
        rate: Rate of the samples and of the file, in Hz.
    """

    def __init__(self, rate: int) -> None:
        self.rate = rate

    @abstractmethod
    def encode(self, audio: Samples) -> bytes:
        """Take samples, a second of them at most; returns the bytes that are ready."""

    def close(self) -> bytes:
        """Return the rest of the bytes."""
        return b""


class _AppendOnlyFile:
    """What libsndfile writes to when nothing can be taken back: corrections are dropped."""

    def __init__(self) -> None:
        self._position = 0
        self._size = 0
        self._ready = bytearray()

    def take(self) -> bytes:
        """The bytes written since the last call."""
        taken = bytes(self._ready)
        self._ready.clear()
        return taken

    def write(self, data: bytes) -> int:
        if self._position == self._size:
            self._ready += self._first(data) if self._size == 0 else data
            self._size += len(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def _first(self, data: bytes) -> bytes:
        """What the file begins with."""
        return data


class _Mp3File(_AppendOnlyFile):
    """MP3 begins with a frame that LAME fills in at the end, too late for a stream.

    Left empty it would play as silence. Ours has what is known: how many samples to skip.
    """

    def _first(self, data: bytes) -> bytes:
        is_mpeg1 = data[1] & 0x18 == 0x18
        offset = 4 + (17 if is_mpeg1 else 9)  # the frame's header and side information, mono
        tag = b"Info" + struct.pack(">II", 2, 0xFFFFFFFF)  # the second field alone: a size, unknown
        lame = bytearray(36)
        lame[:9] = b"LAME3.100"
        lame[21:24] = (LAME_DELAY << 12).to_bytes(3, "big")
        filled = tag + bytes(lame)
        if any(data[4:]) or len(data) < offset + len(filled):
            return data
        return data[:offset] + filled + data[offset + len(filled) :]


class _SoundfileEncoder(Encoder):
    """A format that libsndfile writes.

    Args:
        file: What to write to: a `BytesIO` gives its bytes at the end, corrected.
        rate: Rate in Hz.
        container: libsndfile's name of the format.
        subtype: And of the encoding in it.
        bitrate_mode: "CONSTANT" where there is a choice.
        compression_level: From 0, the largest file, to 1.
    """

    def __init__(
        self,
        file: _AppendOnlyFile | io.BytesIO,
        rate: int,
        container: str,
        subtype: str,
        *,
        bitrate_mode: str | None = None,
        compression_level: float | None = None,
    ) -> None:
        super().__init__(rate)
        self._file = file
        self._writer = soundfile.SoundFile(
            file,
            "w",
            samplerate=rate,
            channels=1,
            format=container,
            subtype=subtype,
            bitrate_mode=bitrate_mode,
            compression_level=compression_level,
        )

    def encode(self, audio: Samples) -> bytes:
        self._writer.write(np.ascontiguousarray(audio, np.float32))
        return self._file.take() if isinstance(self._file, _AppendOnlyFile) else b""

    def close(self) -> bytes:
        self._writer.close()
        if isinstance(self._file, _AppendOnlyFile):
            return self._file.take()
        return self._file.getvalue()


class FlacEncoder(_SoundfileEncoder):
    """FLAC of 16 bit samples; streamed, its header leaves the length open."""

    def __init__(self, rate: int, streaming: bool) -> None:
        file = _AppendOnlyFile() if streaming else io.BytesIO()
        super().__init__(file, rate, "FLAC", "PCM_16")


class Mp3Encoder(_SoundfileEncoder):
    """MP3 of a constant bitrate.

    Streamed, it lasts up to two frames longer than the speech: only the end of a file can say how
    much of its last frame is speech.
    """

    def __init__(self, rate: int, streaming: bool, options: Mp3Options) -> None:
        rate = _nearest(rate, MP3_RATES)
        low, high = (32, 320) if rate >= 32000 else (8, 160) if rate >= 16000 else (8, 64)
        level = (high - min(options.bitrate_kbps, high)) / (high - low)
        super().__init__(
            _Mp3File() if streaming else io.BytesIO(),
            rate,
            "MP3",
            "MPEG_LAYER_III",
            bitrate_mode="CONSTANT",
            compression_level=level,
        )


class OpusEncoder(_SoundfileEncoder):
    """Opus in Ogg."""

    def __init__(self, rate: int, streaming: bool) -> None:
        file = _AppendOnlyFile() if streaming else io.BytesIO()
        super().__init__(file, _nearest(rate, OPUS_RATES), "OGG", "OPUS")
        if streaming:
            _set_page_latency(self._writer)


class AacEncoder(Encoder):
    """AAC in ADTS, by PyAV. It has no field for the 1024 samples that the encoder puts first."""

    def __init__(self, rate: int) -> None:
        super().__init__(_nearest(rate, AAC_RATES))
        self._av = import_av("response_format='aac'")
        self._file = _AppendOnlyFile()
        self._container = self._av.open(self._file, "w", format="adts")
        self._stream = self._container.add_stream("aac", rate=self.rate, layout="mono")
        self._stream.bit_rate = AAC_BITRATE
        self._num_samples = 0

    def encode(self, audio: Samples) -> bytes:
        clipped = np.clip(audio, -1.0, 1.0).astype(np.float32)
        frame = self._av.AudioFrame.from_ndarray(clipped[None], format="fltp", layout="mono")
        frame.sample_rate = self.rate
        frame.pts = self._num_samples
        self._num_samples += len(audio)
        self._container.mux(self._stream.encode(frame))
        return self._file.take()

    def close(self) -> bytes:
        if self._num_samples:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.take()


def _nearest(rate: int, rates: tuple[int, ...]) -> int:
    """The lowest of some rates that loses nothing, or the highest of all."""
    return min((r for r in rates if r >= rate), default=rates[-1])


def _set_page_latency(writer: soundfile.SoundFile) -> None:
    """Have Ogg pages end after `OGG_PAGE_MS`."""
    try:
        value = soundfile._ffi.new("double *", OGG_PAGE_MS)
        size = soundfile._ffi.sizeof("double")
        soundfile._snd.sf_command(writer._file, SET_OGG_PAGE_LATENCY_MS, value, size)
    except AttributeError:
        _warn_of_latency()


@cache
def _warn_of_latency() -> None:
    logger.warning(
        "soundfile %s does not let us ask for short Ogg pages: Opus leaves by the second",
        soundfile.__version__,
    )
