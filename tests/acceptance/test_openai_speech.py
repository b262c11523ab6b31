"""The official `openai` package and a server that speaks: every format, every way to send it."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server_client import recording
from tests.serving import Server

pytest.importorskip("openai")

import openai
from openai import OpenAI

pytestmark = pytest.mark.accept

NUM_PATCHES = 12
KEY = "sk-test"
FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
KINDS = {"v1": (16000, 0.08), "v1.5": (44100, 0.16), "v2": (48000, 0.16)}
"""Rate in Hz and seconds of a patch."""
EXTRA: dict[str, Any] = {"max_generate_length": NUM_PATCHES, "seed": 1}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(kind: str, speech_checkpoint: Callable[..., Path]) -> Iterator[Server]:
    directory = speech_checkpoint(kind, stop_bias=-1.0)
    names = ["tts-1"]
    with Server(directory, served_model_name=names, api_key=[KEY], max_model_len=256) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    options: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 60}
    with OpenAI(base_url=f"{server.url}/v1", **options) as opened:
        yield opened


def decoded(sound: bytes, response_format: str) -> tuple[Any, int]:
    """Samples and rate, by FFmpeg's libraries."""
    av = pytest.importorskip("av")
    container = {"pcm": "s16le", "opus": "ogg"}.get(response_format, response_format)
    with av.open(io.BytesIO(sound), format=container) as file:
        frames = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
        return np.concatenate(frames), file.streams.audio[0].rate


@pytest.mark.parametrize("response_format", FORMATS)
def test_a_stream_of_every_format(client: OpenAI, kind: str, response_format: Any) -> None:
    rate, seconds = KINDS[kind]
    with client.audio.speech.with_streaming_response.create(
        model="tts-1",
        voice="alloy",
        input="Hello there.",
        response_format=response_format,
        extra_body=EXTRA,
    ) as response:
        told = int(response.headers["x-audio-sample-rate"])
        sound = b"".join(response.iter_bytes())
    if response_format == "pcm":
        audio: Any = np.frombuffer(sound, "<i2")
    else:
        audio, found = decoded(sound, response_format)
        # Opus always decodes to 48 kHz, and cannot be made of 44.1.
        assert found == (48000 if response_format == "opus" else told)
        told = found
    assert told == (48000 if response_format == "opus" else rate)
    assert len(audio) / told == pytest.approx(NUM_PATCHES * seconds, abs=0.15)


def test_a_file_at_once(client: OpenAI, kind: str, tmp_path: Path) -> None:
    answer = client.audio.speech.create(
        model="tts-1",
        voice="nova",
        input="Hello there.",
        response_format="wav",
        extra_body=EXTRA | {"stream": False},
    )
    answer.write_to_file(tmp_path / "hello.wav")
    audio, rate = decoded((tmp_path / "hello.wav").read_bytes(), "wav")
    assert (rate, len(audio)) == (KINDS[kind][0], round(NUM_PATCHES * KINDS[kind][1] * rate))


def test_events(client: OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tts-1",
        voice="alloy",
        input="Hello there.",
        response_format="pcm",
        stream_format="sse",
        extra_body=EXTRA,
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    *deltas, done = [json.loads(line[6:]) for line in lines]
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert all(base64.b64decode(event["audio"]) for event in deltas)
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["output_tokens"] == NUM_PATCHES


def test_a_voice_of_ones_own(client: OpenAI) -> None:
    wav = {"audio_sample": ("me.wav", recording(0.5), "audio/wav")}
    form = {"name": "me", "text": "Hi, this is me."}
    voice = client.post(
        "/audio/voices",
        cast_to=dict[str, Any],
        body=form,
        files=list(wav.items()),
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )
    spoken = client.audio.speech.create(
        model="tts-1", voice=voice["id"], input="Hello.", response_format="pcm", extra_body=EXTRA
    )
    assert spoken.read()


def test_errors(client: OpenAI) -> None:
    ask: Any = client.audio.speech.create
    hello = {"model": "tts-1", "voice": "alloy", "input": "Hello."}
    with pytest.raises(openai.BadRequestError, match="speed must be 1"):
        ask(**hello, speed=2.0)
    with pytest.raises(openai.BadRequestError, match="no voice 'ann'"):
        ask(**hello | {"voice": "ann"})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(**hello | {"model": "tts-2"})
    with pytest.raises(openai.BadRequestError, match="input"):
        ask(**hello | {"input": ""})
    with pytest.raises(openai.BadRequestError, match="speaks"):
        client.completions.create(model="tts-1", prompt="Once")
