"""`nanovllm serve` with models that speak: the processes, the documented requests, and attacks."""

import base64
import http.client
import io
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nanovllm.audio.files import read_audio
from tests.server_client import base64_of, recording
from tests.serving import Server, idle

SPEECH = "/v1/audio/speech"
SAMPLES = 1280
"""Of a patch of VoxCPM-0.5B."""
ADMIN = {"Authorization": "Bearer admin"}
WAV = recording(1.0)

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("voices")
    (directory / "ann.wav").write_bytes(WAV)
    (directory / "ann.txt").write_text("Hi, I am Ann.")
    return directory


@pytest.fixture(scope="module")
def speaker(speech_checkpoint: Checkpoint, voices: Path) -> Iterator[Server]:
    """A model that speaks alone, and stops only where it has to."""
    directory = speech_checkpoint("v1", stop_bias=-1.0)
    options: dict[str, Any] = {"max_model_len": 512, "voices": str(voices), "admin_key": "admin"}
    with Server(directory, served_model_name=["tts"], default_voice="ann", **options) as running:
        yield running


def fetch(
    server: Server, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        given = {"Content-Type": "application/json"} | (headers or {})
        connection.request("POST", path, json.dumps(body), given)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def speak(server: Server, **body: Any) -> tuple[http.client.HTTPMessage, bytes]:
    status, headers, sound = fetch(server, SPEECH, {"input": "Hello.", "seed": 1, **body})
    assert status == 200, sound[:300]
    return headers, sound


def test_the_raw_payload_is_as_the_family_documents_it(speaker: Server) -> None:
    """Little-endian float32 PCM, mono, whose format is in the headers."""
    body = {"target_text": "Hello world", "max_generate_length": 6}
    status, headers, payload = fetch(speaker, "/generate", body)
    assert status == 200
    assert headers["Content-Type"] == "audio/raw"
    assert headers["Transfer-Encoding"] == "chunked"
    assert headers["X-Audio-Sample-Rate"] == "16000"
    assert headers["X-Audio-Channels"] == "1"
    assert headers["X-Audio-DType"] == "float32"
    audio = np.frombuffer(payload, "<f4")
    assert len(audio) == 6 * SAMPLES
    assert np.isfinite(audio).all()
    assert 0 < np.abs(audio).max() <= 1


def test_a_seed_repeats_the_speech_in_every_format(speaker: Server) -> None:
    raw = np.frombuffer(speak(speaker, max_generate_length=6, response_format="raw")[1], "<f4")
    again = np.frombuffer(speak(speaker, max_generate_length=6, response_format="raw")[1], "<f4")
    np.testing.assert_allclose(raw, again, atol=1e-4)
    for response_format in ("pcm", "wav", "flac", "mp3", "opus"):
        options = {"max_generate_length": 6, "response_format": response_format}
        headers, sound = speak(speaker, **options)
        num_samples = len(sound) // 2
        if response_format != "pcm":
            rate = soundfile.info(io.BytesIO(sound)).samplerate
            assert headers["X-Audio-Sample-Rate"] == str(rate)
            num_samples = len(read_audio(sound, None, 16000))
        assert num_samples / 16000 == pytest.approx(6 * SAMPLES / 16000, abs=0.15)


def test_voices_and_recordings(speaker: Server) -> None:
    plain = speak(speaker, max_generate_length=4, response_format="raw", voice="alloy")[1]
    assert speak(speaker, max_generate_length=4, response_format="raw", voice="ann")[1] == plain
    other = {"name": "Bob", "audio": base64_of(recording(0.7)), "text": "I am Bob."}
    status, bob = speaker.post("/v1/audio/voices", other)
    assert status == 200
    answer = speak(speaker, max_generate_length=4, response_format="raw", voice=bob["id"])[1]
    assert answer != plain
    given = {"ref_audio": base64_of(recording(0.7)), "ref_text": "I am Bob."}
    assert speak(speaker, max_generate_length=4, response_format="raw", **given)[1] == answer
    assert speaker.request("DELETE", f"/v1/audio/voices/{bob['id']}")[0] == 200
    encoded = speaker.post("/encode_latents", {"wav_base64": other["audio"], "wav_format": "wav"})
    body = {
        "target_text": "Hello.",
        "seed": 1,
        "max_generate_length": 4,
        "prompt_latents_base64": encoded[1]["prompt_latents_base64"],
        "prompt_text": "I am Bob.",
    }
    assert fetch(speaker, "/generate", body)[2] == answer


def test_a_long_text_sentence_by_sentence(speaker: Server) -> None:
    body = {"input": "One is here. Two is there. Three is gone.", "max_generate_length": 4}
    options = {"split_sentences": True, "response_format": "raw", "stream_format": "audio"}
    assert len(speak(speaker, **body, **options)[1]) == 3 * 4 * 4 * SAMPLES
    assert len(speak(speaker, **body, **options, voice="ann")[1]) == 3 * 4 * 4 * SAMPLES
    whole = {"retry_badcase": True, "stream": False, "response_format": "raw"}
    assert len(speak(speaker, **body, **whole)[1]) == 4 * 4 * SAMPLES
    assert idle(speaker)


def test_many_at_a_time(speaker: Server) -> None:
    answers: dict[int, bytes] = {}

    def ask(number: int) -> None:
        options = {"max_generate_length": 3 + number % 5, "response_format": "raw"}
        answers[number] = speak(speaker, input=f"Text {number}.", **options)[1]

    threads = [threading.Thread(target=ask, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, sound in answers.items():
        assert len(sound) == 4 * SAMPLES * (3 + number % 5)
    assert idle(speaker)


def test_a_client_that_leaves_frees_what_it_held(speaker: Server) -> None:
    body = {"target_text": "word " * 60, "max_generate_length": 300}
    connection = http.client.HTTPConnection("127.0.0.1", speaker.port, timeout=60)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().read(100)
    assert speaker.get("/metrics.json")[1]["inflight_total"] == 1
    connection.close()
    assert idle(speaker)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (SPEECH, {"input": ""}),
        (SPEECH, {"input": " \n "}),
        (SPEECH, {"input": "a" * 100_000}),
        (SPEECH, {"input": "word " * 13_000, "split_sentences": None}),
        (SPEECH, {"input": "a", "voice": "../../etc/passwd"}),
        (SPEECH, {"input": "a", "inference_timesteps": 1}),
        (SPEECH, {"input": "a", "cfg_value": 1e30}),
        (SPEECH, {"input": "a", "lora_name": "x"}),
        (SPEECH, {"input": "a", "instructions": "softly"}),
        (SPEECH, {"input": "a", "ref_audio": base64_of(WAV)}),
        (SPEECH, {"input": "a", "ref_audio": "file:///etc/passwd", "ref_text": "x"}),
        ("/generate", {"target_text": "word " * 13_000}),
        ("/generate", {"target_text": "a", "max_generate_length": 10**9, "prompt_id": "x"}),
        ("/generate", {"target_text": "a", "ref_audio_latents_base64": base64_of(bytes(128))}),
        (
            "/generate",
            {
                "target_text": "a",
                "prompt_text": "x",
                "prompt_latents_base64": base64_of(struct.pack("<32f", *[float("nan")] * 32)),
            },
        ),
        (
            "/generate",
            {"target_text": "a", "prompt_text": "x", "prompt_latents_base64": base64_of(bytes(60))},
        ),
        ("/encode_latents", {"wav_base64": base64_of(b"RIFF" * 100), "wav_format": "wav"}),
        ("/encode_latents", {"wav_base64": base64_of(WAV[:44]), "wav_format": "wav"}),
        ("/encode_latents", {"wav_base64": base64_of(WAV[:46]), "wav_format": "wav"}),
        ("/add_prompt", {"wav_base64": "", "wav_format": "wav", "prompt_text": "x"}),
        ("/remove_prompt", {"prompt_id": "../../etc/passwd"}),
        ("/loras", {"name": "x", "path": "/etc"}),
    ],
)
def test_bad_requests_end_nothing(speaker: Server, path: str, body: dict[str, Any]) -> None:
    engine = speaker.get("/metrics.json")[1]["engines"][0]
    start = time.monotonic()
    status, answer = speaker.post(path, body, **ADMIN)
    assert status == 400, answer
    assert time.monotonic() - start < 5
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "0x" not in answer["error"]["message"]
    assert len(speak(speaker, max_generate_length=2, response_format="pcm")[1]) == 2 * 2 * SAMPLES
    assert speaker.get("/metrics.json")[1]["engines"][0]["num_restarts"] == engine["num_restarts"]
    assert idle(speaker)


def test_infinite_latents_of_the_right_size(speaker: Server) -> None:
    """Values that are numbers, and far from any that the encoder makes."""
    latents = base64_of(np.full(2 * 16 * 4, 3e38, "<f4").tobytes())
    body = {"target_text": "a", "prompt_text": "x", "prompt_latents_base64": latents}
    status, _, _ = fetch(speaker, "/generate", body | {"max_generate_length": 3})
    assert status in (200, 400, 500)
    assert len(speak(speaker, max_generate_length=2, response_format="pcm")[1]) == 2 * 2 * SAMPLES
    assert idle(speaker)


def test_what_the_metrics_say(speaker: Server) -> None:
    speak(speaker, max_generate_length=2)
    text = speaker.get("/metrics")[1]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["nanovllm_generate_audio_seconds_total"]) > 0
    assert float(values["nanovllm_generate_ttfb_seconds_count"]) > 0
    assert float(values['vllm:generation_tokens_total{model_name="tts"}']) > 0
    assert float(values['vllm:time_to_first_token_seconds_count{model_name="tts"}']) > 0


def test_text_and_speech_in_one_server(speech_checkpoint: Checkpoint) -> None:
    speaker = speech_checkpoint("v2", stop_bias=-1.0)
    options: dict[str, Any] = {"speech_max_model_len": 512, "speech_served_model_name": ["tts"]}
    with Server(speech_model=str(speaker), max_model_len=256, **options) as server:
        assert [m["id"] for m in server.get("/v1/models")[1]["data"]] == ["demo_model", "tts"]
        sounds: list[bytes] = []
        asked = {"model": "tts", "max_generate_length": 8, "response_format": "raw"}
        talking = threading.Thread(target=lambda: sounds.append(speak(server, **asked)[1]))
        talking.start()
        body = {"model": "demo_model", "prompt": "Once upon a time", "max_tokens": 20}
        status, written = server.post("/v1/completions", body)
        talking.join()
        assert status == 200
        assert written["choices"][0]["text"]
        assert len(sounds[0]) == 8 * 7680 * 4
        reference = {"ref_audio": base64_of(WAV), "instructions": "A calm voice"}
        assert speak(server, max_generate_length=2, **reference)[1]
        engines = server.get("/metrics.json")[1]["engines"]
        assert [engine["model"] for engine in engines] == ["demo_model", "tts"]
        assert server.stop() == 0


def test_a_speech_model_that_is_none(checkpoint: Callable[[str], Path]) -> None:
    server = Server(speech_model=str(checkpoint("qwen3")), wait=False)
    assert server.process.wait(60) == 2
    assert "is no speech model" in server.log


def test_latents_are_those_of_the_recording(speaker: Server) -> None:
    body = {"wav_base64": base64_of(WAV), "wav_format": "wav"}
    answer = speaker.post("/encode_latents", body)[1]
    latents = np.frombuffer(base64.b64decode(answer["prompt_latents_base64"]), "<f4")
    assert latents.size % (2 * answer["feat_dim"]) == 0
    assert latents.size == 26 * 16  # a second of 25 frames, in patches of 2
