"""Recordings of any kind become mono samples; what is none is refused, and nothing crashes."""

import io
import math
import struct
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from nanovllm.audio import files
from nanovllm.audio.files import Samples, pad, read_audio
from nanovllm.errors import InvalidRequestError

RATE = 16000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 220.0) -> Samples:
    times = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def write(
    audio: Samples, rate: int = RATE, container: str = "WAV", subtype: str = "FLOAT"
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=container, subtype=subtype)
    return file.getvalue()


def write_av(
    audio: Samples, container: str, codec: str, rate: int = 48000, layout: str = "mono"
) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        planes = np.tile(audio, (av.AudioLayout(layout).nb_channels, 1))
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def refusal(data: bytes, wav_format: str | None = None) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read_audio(data, wav_format, RATE)
    check_text(caught.value)
    return str(caught.value)


def check_text(error: InvalidRequestError) -> None:
    """No address of an object, no path, which the libraries' own texts have."""
    for wrong in ("0x", "<", "object at", "site-packages"):
        assert wrong not in str(error)


@pytest.mark.parametrize(
    ("container", "subtype", "error"),
    [
        ("WAV", "FLOAT", 0.0),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "ULAW", 2e-2),
        ("RF64", "PCM_24", 1e-6),
        ("W64", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("AU", "PCM_16", 1e-4),
        ("CAF", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 5e-2),
        ("OGG", "OPUS", 5e-2),
        ("MP3", "MPEG_LAYER_III", 5e-2),
    ],
)
def test_what_libsndfile_reads(container: str, subtype: str, error: float) -> None:
    audio = tone()
    decoded = read_audio(write(audio, RATE, container, subtype), None, RATE)
    assert decoded.dtype == np.float32
    assert decoded.shape == audio.shape
    assert np.abs(decoded - audio)[500:-500].max() <= error


@pytest.mark.parametrize(
    ("container", "codec", "delay"),
    [("ipod", "aac", 0), ("matroska", "aac", 0), ("webm", "libopus", 0), ("adts", "aac", 1024)],
)
def test_what_ffmpeg_reads(container: str, codec: str, delay: int) -> None:
    audio = tone(rate=48000)
    decoded = read_audio(write_av(audio, container, codec), None, 48000)
    assert 0 <= len(decoded) - len(audio) - delay < 1024
    assert np.abs(decoded[delay : delay + len(audio)] - audio)[2000:-2000].max() < 5e-2


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(files, "import_module", refuse)
    assert "pip install 'nanovllm[audio]'" in refusal_of_mp4()


def refusal_of_mp4() -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read_audio(b"\0\0\0\x1cftypM4A " + bytes(100), "m4a", RATE)
    return str(caught.value)


@pytest.mark.parametrize("num_samples", [1000, 32768, 32769, 100001])
@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_channels_are_averaged_and_resampled_as_in_one_piece(num_samples: int, rate: int) -> None:
    stereo = np.random.default_rng(0).standard_normal((num_samples, 2)).astype(np.float32) * 0.1
    decoded = read_audio(write(stereo, rate), "wav", RATE)
    expected = soxr.resample(stereo.mean(axis=1), rate, RATE)
    assert decoded.shape == expected.shape
    np.testing.assert_allclose(decoded, expected, atol=1e-6)


@pytest.mark.parametrize("wav_format", [None, "wav", "mp3", "no such thing", ""])
def test_the_stated_format_is_a_hint(wav_format: str | None) -> None:
    assert len(read_audio(write(tone()), wav_format, RATE)) == 8000


def test_a_recording_of_unknown_length_is_read_to_its_end() -> None:
    data = bytearray(write(tone(), subtype="PCM_16"))
    where = data.index(b"data") + 4
    data[4:8] = data[where : where + 4] = b"\xff" * 4
    assert len(read_audio(bytes(data), None, RATE)) == 8000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"R",
        b"RIFF",
        b"hello, this is text",
        b"#EXTM3U\nhttp://127.0.0.1/secret\n",
        b"ffconcat version 1.0\nfile secret.wav\n",
        bytes(1000),
        b"\xff" * 1000,
        b"ID3" + bytes(200),
        b"OggS" + bytes(200),
        b"fLaC" + bytes(200),
        b"FORM" + bytes(200),
    ],
)
def test_what_is_no_recording(data: bytes) -> None:
    refusal(data, "wav")


def test_damage_is_not_told_in_words_of_other_troubles() -> None:
    without_rate = bytearray(write(tone(), subtype="PCM_16"))
    without_rate[24:28] = bytes(4)
    for data in (bytes(without_rate), write(tone(), RATE, "MP3", "MPEG_LAYER_III")[:300]):
        assert refusal(data).endswith("it is damaged")


def test_what_is_no_recording_for_ffmpeg() -> None:
    pytest.importorskip("av")
    for start in (b"\0\0\0\x1cftypM4A ", b"\x1aE\xdf\xa3", b"\xff\xf1L@"):
        refusal(start + bytes(200))


def test_too_short() -> None:
    for num_samples in (0, 1, 100):
        assert "too short" in refusal(write(np.zeros(num_samples, np.float32)))


def test_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    two_hours = write(np.zeros(2 * 3600 * 1000, np.float32), 2000, "FLAC", "PCM_16")
    assert refusal(two_hours) == "a recording may last 600 s at most"
    monkeypatch.setattr(files, "MAX_DECODED_BYTES", 1 << 20)
    assert "decode to 1 MiB" in refusal(write(np.zeros((80000, 4), np.float32), 48000))
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    assert "may have 1000 bytes" in refusal(write(tone()))


def test_decoding_stops_soon_behind_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SECONDS", 1.0)
    num_blocks = 0
    decode = files._soundfile_blocks

    def counted(data: bytes) -> Any:
        nonlocal num_blocks
        for block in decode(data):
            num_blocks += 1
            yield block

    monkeypatch.setattr(files, "_soundfile_blocks", counted)
    refusal(write(np.zeros(100 * RATE, np.float32)))
    assert num_blocks == math.ceil(RATE / files.BLOCK_FRAMES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    audio = tone()
    audio[4000] = value
    assert "NaN or infinite" in refusal(write(audio))


def test_not_scaled() -> None:
    assert "must be in [-1, 1]" in refusal(write(tone() * 32768))


@pytest.mark.parametrize("rate", [1, 1999, 400_000, 2**31 - 1])
def test_absurd_sample_rates(rate: int) -> None:
    data = bytearray(write(tone(), subtype="PCM_16"))
    data[24:28] = struct.pack("<I", rate)
    refusal(bytes(data))


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)],
)
def test_damaged_files_are_read_or_refused(container: str, subtype: str) -> None:
    """Cut off, or with bytes changed: the process lives, and what it says is fit for a client."""
    whole = write(tone(0.2), RATE, container, subtype)
    rng = np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3:
            for where in rng.integers(0, len(whole) if trial % 2 else 100, 8):
                damaged[where] = rng.integers(256)
        else:
            del damaged[rng.integers(len(whole)) :]
        try:
            read_audio(bytes(damaged), None, RATE)
        except InvalidRequestError as e:
            check_text(e)


def test_channels_that_become_more() -> None:
    """Where the first frames are mono, PyAV lets the others pass, and reads beyond them."""
    surround = write_av(tone(0.2, 48000), "adts", "aac", layout="5.1")
    audio = read_audio(surround, None, 48000)
    assert np.abs(audio).max() > 0.2
    mono = write_av(tone(0.2, 48000), "adts", "aac")
    assert refusal(mono + surround) == "the recording's format changes on the way"


def test_damaged_films_are_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    for container, codec in (("ipod", "aac"), ("webm", "libopus"), ("adts", "aac")):
        whole = write_av(tone(0.2, 48000), container, codec)
        for _ in range(40):
            damaged = bytearray(whole)
            for where in rng.integers(0, len(whole), 20):
                damaged[where] = rng.integers(256)
            try:
                read_audio(bytes(damaged), None, RATE)
            except InvalidRequestError as e:
                check_text(e)


def test_many_channels() -> None:
    wide = np.tile(tone()[:, None], (1, 8))
    np.testing.assert_allclose(read_audio(write(wide), None, RATE), tone(), atol=1e-6)


def test_padding() -> None:
    audio = np.array([1, 2, 3], np.float32)
    assert pad(audio, 4, "left").tolist() == [0, 1, 2, 3]
    assert pad(audio, 4, "right").tolist() == [1, 2, 3, 0]
    assert pad(audio, 3, "left").tolist() == [1, 2, 3]
    assert pad(audio, 4, "left").dtype == np.float32
