"""Every format decodes to the speech that was written, and its first bytes leave early."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile

from nanovllm.audio import encoders, files
from nanovllm.audio.containers import RESPONSE_FORMATS, encode_audio, make_writer
from nanovllm.audio.encoders import Mp3Options
from nanovllm.audio.files import Samples, read_audio
from nanovllm.errors import InvalidRequestError

KINDS = [(16000, 1280), (44100, 7056), (48000, 7680)]
"""Rate and samples of a patch in VoxCPM 0.5B, 1.5 and 2."""
COMPRESSED = ["flac", "mp3", "opus", "aac"]
SILENT_START = {"mp3": 1105, "aac": 1024}
"""Samples before the first in a stream, for readers that know no better."""


def speech(num_samples: int) -> Samples:
    """Noise without the high notes that codecs drop."""
    noise = np.random.default_rng(0).standard_normal(num_samples + 100)
    return np.convolve(noise, np.ones(40) / 40, "valid")[:num_samples].astype(np.float32)


def written(
    response_format: str, rate: int, audio: Samples, chunk: int, **options: Any
) -> list[bytes]:
    if response_format == "aac":
        pytest.importorskip("av")
    writer = make_writer(response_format, rate, **options)
    parts = [writer.write(audio[i : i + chunk]) for i in range(0, len(audio), chunk)]
    parts.append(writer.close())
    assert writer.close() == b""
    return parts


def decoded_by_av(data: bytes) -> tuple[Samples, int]:
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(data)) as file:
        frames = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
        rate = file.streams.audio[0].rate
    return np.concatenate(frames).astype(np.float32), rate


def likeness(decoded: Samples, audio: Samples) -> float:
    """Correlation of two signals of the same length."""
    return float(np.corrcoef(decoded, audio)[0, 1])


@pytest.mark.parametrize(("rate", "chunk"), KINDS)
@pytest.mark.parametrize("response_format", ["wav", *COMPRESSED])
def test_a_stream_decodes_to_the_speech(response_format: str, rate: int, chunk: int) -> None:
    audio = speech(chunk * 20 + 77)
    data = b"".join(written(response_format, rate, audio, chunk))
    decoded = read_audio(data, response_format, rate)
    start = SILENT_START.get(response_format, 0)
    extra = len(decoded) - start - len(audio)
    assert 0 <= extra <= (1152 if start else 0)
    assert likeness(decoded[start : start + len(audio)], audio) > 0.97


@pytest.mark.parametrize(("rate", "chunk"), KINDS)
@pytest.mark.parametrize("response_format", ["wav", *COMPRESSED])
def test_ffmpeg_decodes_a_stream_to_the_right_duration(
    response_format: str, rate: int, chunk: int
) -> None:
    audio = speech(chunk * 20 + 77)
    decoded, got = decoded_by_av(b"".join(written(response_format, rate, audio, chunk)))
    assert got == (48000 if response_format == "opus" else rate)
    extra = len(decoded) / got - len(audio) / rate
    # MP3 ends with a whole frame; AAC has no field for its 1024 samples of delay either.
    most = {"mp3": 1152 / rate, "aac": 2048 / rate}.get(response_format, 1e-3)
    assert -1e-3 <= extra <= most


@pytest.mark.parametrize("rate", [16000, 44100, 48000, 22050])
@pytest.mark.parametrize("response_format", ["wav", "flac", "mp3", "opus"])
def test_a_whole_file_has_the_right_length(response_format: str, rate: int) -> None:
    audio = speech(rate * 2 + 77)
    data = encode_audio(response_format, rate, audio)
    *parts, rest = written(response_format, rate, audio, 1000, streaming=False)
    assert not any(parts)
    assert len(rest) == len(data)
    info = soundfile.info(io.BytesIO(data))
    assert abs(info.frames / info.samplerate - len(audio) / rate) < 1e-4
    assert likeness(read_audio(data, None, rate)[: len(audio)], audio) > 0.95


@pytest.mark.parametrize(("rate", "chunk"), KINDS)
@pytest.mark.parametrize(
    ("response_format", "num_patches"),
    [("wav", 1), ("pcm", 1), ("raw", 1), ("mp3", 3), ("opus", 3), ("aac", 5), ("flac", 4)],
)
def test_sound_leaves_early(response_format: str, num_patches: int, rate: int, chunk: int) -> None:
    parts = written(response_format, rate, speech(chunk * 5), chunk)
    early = b"".join(parts[:num_patches])
    if response_format in ("pcm", "raw"):
        assert len(early) == chunk * (2 if response_format == "pcm" else 4)
        return
    decoded, got = decoded_by_av(early)
    assert len(decoded) / got >= 0.02


def test_opus_leaves_patch_by_patch() -> None:
    """Not by the second, which is what libsndfile does by itself."""
    parts = written("opus", 48000, speech(7680 * 12), 7680)
    assert all(parts)


def test_samples_are_clipped_and_scaled_as_in_the_family() -> None:
    audio = np.array([-2, -1, -0.5, 0, 0.5, 1, 2], np.float32)
    whole = [-32767, -32767, -16383, 0, 16383, 32767, 32767]
    assert np.frombuffer(encode_audio("pcm", 16000, audio), "<i2").tolist() == whole
    assert np.frombuffer(encode_audio("raw", 16000, audio), "<f4").tolist() == audio.tolist()
    assert np.frombuffer(encode_audio("wav", 16000, audio)[44:], "<i2").tolist() == whole


def test_the_header_of_a_wav() -> None:
    audio = speech(1000)
    first = make_writer("wav", 44100).write(audio)
    assert len(first) == 44 + 2000
    assert struct.unpack("<4sI4s4sIHHIIHH4sI", first[:44]) == (
        *(b"RIFF", 0xFFFFFFFF, b"WAVE"),
        *(b"fmt ", 16, 1, 1, 44100, 88200, 2, 16),
        *(b"data", 0xFFFFFFFF),
    )
    whole = encode_audio("wav", 44100, audio)
    assert struct.unpack("<I", whole[4:8]) == (len(whole) - 8,)
    assert struct.unpack("<I", whole[40:44]) == (2000,)


@pytest.mark.parametrize("response_format", RESPONSE_FORMATS)
@pytest.mark.parametrize("streaming", [True, False])
def test_speech_of_no_length_is_no_error(response_format: str, streaming: bool) -> None:
    (data,) = written(response_format, 16000, speech(0), 1280, streaming=streaming)
    assert bool(data) == (response_format in ("wav", "opus"))
    if response_format == "wav":
        assert soundfile.info(io.BytesIO(data)).samplerate == 16000


def test_a_long_block_is_written_by_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    class Recorder(encoders.Encoder):
        def encode(self, audio: Samples) -> bytes:
            nonlocal longest
            longest = max(longest, len(audio))
            return b""

    writer = make_writer("wav", 16000)
    monkeypatch.setattr(writer, "_encoder", Recorder(16000))
    writer.write(speech(16000 * 180))
    assert longest == 16000


@pytest.mark.parametrize(
    ("response_format", "rate", "written_rate"),
    [
        ("opus", 44100, 48000),
        ("opus", 22050, 24000),
        ("opus", 96000, 48000),
        ("mp3", 96000, 48000),
        ("mp3", 20000, 22050),
        ("flac", 20000, 20000),
        ("wav", 20000, 20000),
    ],
)
def test_rates_that_a_format_lacks(response_format: str, rate: int, written_rate: int) -> None:
    audio = speech(rate)
    writer = make_writer(response_format, rate)
    data = writer.write(audio) + writer.close()
    assert writer.rate == written_rate
    decoded = read_audio(data, None, rate)
    start = round(SILENT_START.get(response_format, 0) * rate / written_rate)
    assert likeness(decoded[start : start + len(audio)], audio) > 0.95


def test_the_bitrate_of_mp3() -> None:
    audio = speech(48000 * 4)
    sizes = [len(encode_audio("mp3", 48000, audio, Mp3Options(rate))) for rate in (64, 128, 320)]
    assert sizes == pytest.approx([64 * 500, 128 * 500, 320 * 500], rel=0.05)
    assert len(encode_audio("mp3", 16000, speech(64000))) == pytest.approx(160 * 500, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bitrate_kbps": 31}, "mp3 bitrate_kbps must be in [32, 320], got 31"),
        ({"bitrate_kbps": 321}, "mp3 bitrate_kbps must be in [32, 320], got 321"),
        ({"quality": 3}, "mp3 quality must be in [0, 2], got 3"),
    ],
)
def test_wrong_options_of_mp3(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Mp3Options(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("response_format", ["vorbis", "", "WAV", "../x", "m4a"])
def test_unknown_formats(response_format: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be one of wav, pcm, raw, flac") as caught:
        make_writer(response_format, 16000)
    assert caught.value.param == "response_format"


def test_aac_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(files, "import_module", refuse)
    with pytest.raises(InvalidRequestError, match=r"pip install 'nanovllm\[audio\]'"):
        make_writer("aac", 16000)


def test_a_soundfile_that_hides_libsndfile_only_delays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoders._warn_of_latency.cache_clear()
    monkeypatch.setattr(encoders, "soundfile", _Without(soundfile, "_ffi"))
    written("opus", 16000, speech(1280), 1280)
    written("opus", 16000, speech(1280), 1280)
    assert [record.message for record in caplog.records] == [
        f"soundfile {soundfile.__version__} does not let us ask for short Ogg pages: Opus leaves "
        "by the second"
    ]


class _Without:
    """A module without one of its names."""

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._module, name)


def test_many_writers_at_once() -> None:
    """What one writes does not depend on the others."""
    audio = speech(1280 * 10)
    alone = {name: b"".join(written(name, 16000, audio, 1280)) for name in ("mp3", "opus", "flac")}
    writers = {name: make_writer(name, 16000) for name in alone}
    parts: dict[str, list[bytes]] = {name: [] for name in alone}
    for i in range(0, len(audio), 1280):
        for name, writer in writers.items():
            parts[name].append(writer.write(audio[i : i + 1280]))
    for name, writer in writers.items():
        together = b"".join([*parts[name], writer.close()])
        if name == "opus":  # whose streams have random serial numbers
            assert len(together) == len(alone[name])
        else:
            assert together == alone[name]
