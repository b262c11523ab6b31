"""`/generate` for speech, and the recordings of the family's engine for VoxCPM."""

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from nanovllm.config import SpeechConfig
from nanovllm.errors import ContextLengthError
from tests.fake_llm import FakeLLM
from tests.fake_speech import PATCH_LATENTS, V2, FakeSpeech
from tests.server_client import base64_of, build, build_speech, recording

WAV = base64_of(recording())
LATENTS = base64_of(3 * PATCH_LATENTS)


def generate(client: TestClient, **body: Any) -> Any:
    response = client.post("/generate", json={"target_text": "Hello world", **body})
    assert response.status_code == 200, response.text[:300]
    return response


def detail(client: TestClient, path: str = "/generate", **body: Any) -> str:
    """What a refused request is told, which must be said in both ways."""
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text[:300]
    answer = response.json()
    assert answer["detail"] == answer["error"]["message"]
    said: str = answer["detail"]
    return said


class TestGenerate:
    @pytest.mark.parametrize("response_format", [None, "raw", "f32le"])
    def test_raw_samples_as_the_family_documents_them(
        self, speaker: TestClient, response_format: str | None
    ) -> None:
        """Content type `audio/raw`, float32 mono, its format in the headers."""
        response = generate(speaker, response_format=response_format)
        assert response.headers["content-type"] == "audio/raw"
        assert response.headers["x-audio-sample-rate"] == "16000"
        assert response.headers["x-audio-channels"] == "1"
        assert response.headers["x-audio-dtype"] == "float32"
        audio = np.frombuffer(response.content, "<f4")
        assert len(audio) == 5 * 1280
        assert np.abs(audio).max() == pytest.approx(0.5, abs=1e-3)

    def test_pcm(self, speaker: TestClient) -> None:
        response = generate(speaker, response_format="pcm")
        assert response.headers["content-type"] == "audio/L16;rate=16000;channels=1"
        assert response.headers["x-audio-encoding"] == "s16le"
        assert len(np.frombuffer(response.content, "<i2")) == 5 * 1280

    def test_mp3(self, speaker: TestClient) -> None:
        response = generate(speaker, response_format="mp3")
        assert response.headers["content-type"] == "audio/mpeg"
        assert response.headers["x-audio-encoding"] == "mp3"
        info = soundfile.info(io.BytesIO(response.content))
        assert (info.samplerate, info.channels) == (16000, 1)

    def test_a_voice_that_is_too_long_is_blamed_by_its_field(
        self, monkeypatch: pytest.MonkeyPatch, speech: FakeSpeech, speaker: TestClient
    ) -> None:
        async def refuse(*args: Any, **options: Any) -> Any:
            raise ContextLengthError("too long", "prompt_latents")

        monkeypatch.setattr(speech, "generate", refuse)
        for given, param in (
            ({"prompt_id": "ann"}, "prompt_id"),
            (
                {"prompt_wav_base64": WAV, "prompt_wav_format": "wav", "prompt_text": "Hi."},
                "prompt_wav_base64",
            ),
            ({"prompt_latents_base64": LATENTS, "prompt_text": "Hi."}, "prompt_latents_base64"),
        ):
            answer = speaker.post("/generate", json={"target_text": "a", **given})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    def test_the_seed_eras_request(self, speech: FakeSpeech, speaker: TestClient) -> None:
        prompt = {"wav_base64": WAV, "wav_format": "wav", "prompt_text": "Hi."}
        prompt_id = speaker.post("/add_prompt", json=prompt).json()["prompt_id"]
        body = {"max_generate_length": 20, "temperature": 0.5, "cfg_value": 1.5}
        generate(speaker, prompt_id=prompt_id, **body)
        text, params, options = speech.asked[0]
        assert (text, options["voice"]) == ("Hello world", prompt_id)
        assert {name: getattr(params, name) for name in body} == body
        assert speaker.post("/remove_prompt", json={"prompt_id": prompt_id}).json() == {
            "status": "ok"
        }
        said = detail(speaker, target_text="a", prompt_id=prompt_id)
        assert said == f"Prompt with id {prompt_id} not found"

    def test_the_current_request(self) -> None:
        speech = FakeSpeech(info=V2)
        client = TestClient(build_speech(speech))
        wav = {"prompt_wav_base64": WAV, "prompt_wav_format": "wav", "prompt_text": "Hi."}
        reference = {"ref_audio_wav_base64": WAV, "ref_audio_wav_format": "wav"}
        generate(client, **wav, **reference, seed=3)
        _, params, options = speech.asked[0]
        assert params.seed == 3
        assert options["prompt_text"] == "Hi."
        assert options["prompt_latents"]
        assert options["ref_audio_latents"]
        assert sorted(side for _, _, side in speech.encoded) == ["left", "right"]

    def test_latents(self, speech: FakeSpeech, speaker: TestClient) -> None:
        generate(speaker, prompt_latents_base64=LATENTS, prompt_text="Hi.")
        assert speech.asked[0][2]["prompt_latents"] == 3 * PATCH_LATENTS

    def test_the_default_is_voxcpms(self, speech: FakeSpeech, speaker: TestClient) -> None:
        generate(speaker)
        assert speech.asked[0][1].cfg_value == 2.0

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (
                {"prompt_wav_base64": WAV, "prompt_latents_base64": LATENTS},
                "prompt_wav_* and prompt_latents_base64 are mutually exclusive",
            ),
            (
                {"ref_audio_wav_base64": WAV, "ref_audio_latents_base64": LATENTS},
                "ref_audio_wav_* and ref_audio_latents_base64 are mutually exclusive",
            ),
            (
                {"ref_audio_wav_base64": WAV},
                "reference wav requires ref_audio_wav_base64 + ref_audio_wav_format",
            ),
            (
                {"prompt_wav_format": "wav", "prompt_text": "a"},
                "wav prompt requires prompt_wav_base64 + prompt_wav_format",
            ),
            (
                {"prompt_wav_base64": WAV, "prompt_wav_format": "wav"},
                "wav prompt requires non-empty prompt_text",
            ),
            (
                {"prompt_latents_base64": LATENTS, "prompt_text": " "},
                "latents prompt requires non-empty prompt_text",
            ),
            ({"prompt_text": "Hi."}, "prompt_text is not allowed for zero-shot"),
            (
                {"prompt_id": "x", "prompt_text": "Hi."},
                "Prompt text and prompt id cannot be provided at the same time",
            ),
            (
                {"prompt_id": "x", "prompt_latents_base64": LATENTS, "prompt_text": "Hi."},
                "Prompt latents and prompt id cannot be provided at the same time",
            ),
            ({"prompt_id": "../../etc/passwd"}, "Prompt with id ../../etc/passwd not found"),
            ({"lora_name": "x"}, "LoRA 'x' is not registered"),
            (
                {"ref_audio_latents_base64": LATENTS},
                "Reference audio is not supported by the loaded model",
            ),
            (
                {"ref_audio_wav_base64": WAV, "ref_audio_wav_format": "wav"},
                "Reference audio is not supported by the loaded model",
            ),
        ],
    )
    def test_refused_in_the_familys_words(
        self, speaker: TestClient, body: dict[str, Any], says: str
    ) -> None:
        assert detail(speaker, target_text="Hello", **body) == says

    @pytest.mark.parametrize(
        ("body", "begins"),
        [
            (
                {"prompt_wav_base64": "*", "prompt_wav_format": "wav", "prompt_text": "a"},
                "Invalid base64 in prompt_wav_base64: ",
            ),
            (
                {"prompt_latents_base64": "*", "prompt_text": "a"},
                "Invalid base64 in prompt_latents_base64: ",
            ),
            (
                {"prompt_latents_base64": base64_of(b"12345678"), "prompt_text": "a"},
                "Invalid latent payload in prompt_latents_base64: ",
            ),
            (
                {"prompt_latents_base64": base64_of(b""), "prompt_text": "a"},
                "Invalid latent payload in prompt_latents_base64: ",
            ),
            (
                {
                    "prompt_latents_base64": base64_of(np.full(8, np.nan, "<f4").tobytes()),
                    "prompt_text": "a",
                },
                "Invalid latent payload in prompt_latents_base64: it has values that are NaN",
            ),
            (
                {
                    "prompt_wav_base64": "TVo=",
                    "prompt_wav_format": "wav",
                    "prompt_text": "a",
                },
                "the recording (said to be 'wav') is in none of the formats",
            ),
            ({"max_generate_length": 0}, "max_generate_length: "),
            ({"temperature": -0.1}, "temperature: "),
            ({"inference_timesteps": 1}, "inference_timesteps: "),
            ({"target_text": ""}, "target_text: "),
            ({"target_text": " "}, "target text must be a non-empty string"),
            ({"target_text": "a" * 100_000}, "target_text: "),
        ],
    )
    def test_refused_before_the_model(
        self, speech: FakeSpeech, speaker: TestClient, body: dict[str, Any], begins: str
    ) -> None:
        assert detail(speaker, **{"target_text": "Hello"} | body).startswith(begins)
        assert not speech.asked

    def test_a_blank_text_is_none(self, speech: FakeSpeech, speaker: TestClient) -> None:
        response = speaker.post("/generate", json={"target_text": " "})
        assert response.json()["error"]["param"] == "target_text"
        generate(speaker, prompt_text=" ")
        assert speech.asked[0][2]["prompt_text"] == ""

    def test_text_and_speech_share_the_path(self) -> None:
        client = TestClient(build_speech(FakeSpeech(), FakeLLM()))
        assert generate(client).headers["content-type"] == "audio/raw"
        lines = client.post("/generate", json={"prompt": "Once", "stream": True}).text.splitlines()
        assert json.loads(lines[-1]) == {"event": "done"}

    def test_who_does_not_speak(self) -> None:
        client = TestClient(build(FakeLLM()))
        response = client.post("/generate", json={"target_text": "Hello"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "target_text"

    def test_while_the_model_is_loaded(self) -> None:
        app = build_speech(FakeSpeech())
        app.state.server.loaded = False
        response = TestClient(app).post("/generate", json={"target_text": "Hello"})
        assert response.status_code == 503
        assert response.json()["detail"] == "Model server not ready"


class TestRecordings:
    @pytest.mark.parametrize("seconds", [0.5, 5])
    def test_large_ones_are_decoded_in_a_thread(
        self, speaker: TestClient, monkeypatch: pytest.MonkeyPatch, seconds: float
    ) -> None:
        on_loop: list[bool] = []

        def decode(data: bytes, **options: Any) -> bytes:
            on_loop.append(asyncio._get_running_loop() is not None)
            return b64decode(data, **options)

        b64decode = base64.b64decode
        monkeypatch.setattr(base64, "b64decode", decode)
        lines = base64.encodebytes(recording(seconds)).decode()
        body = {"wav_base64": lines.replace("\n", "\r\n\t "), "wav_format": "wav"}
        assert speaker.post("/encode_latents", json=body).status_code == 200
        assert on_loop == [seconds < 1]

    def test_latents(self, speech: FakeSpeech, speaker: TestClient) -> None:
        body = {"wav_base64": WAV, "wav_format": "wav"}
        answer = speaker.post("/encode_latents", json=body).json()
        latents = base64.b64decode(answer.pop("prompt_latents_base64"))
        assert len(latents) == 7 * len(PATCH_LATENTS)
        assert answer == {
            "feat_dim": 4,
            "latents_dtype": "float32",
            "sample_rate": 16000,
            "channels": 1,
        }
        assert speech.encoded == [(len(recording()), "wav", "left")]

    @pytest.mark.parametrize("text", ["", "  "])
    def test_a_prompt_without_its_text(self, speaker: TestClient, text: str) -> None:
        prompt = {"wav_base64": WAV, "wav_format": "wav", "prompt_text": text}
        said = detail(speaker, "/add_prompt", **prompt)
        assert said == "wav prompt requires non-empty prompt_text"
        client = TestClient(build_speech(FakeSpeech(info=V2)))
        assert client.post("/add_prompt", json=prompt).status_code == 200

    @pytest.mark.parametrize("path", ["/encode_latents", "/add_prompt"])
    @pytest.mark.parametrize(
        ("audio", "says"),
        [
            ("*", "Invalid base64 in wav_base64"),
            (base64_of(b"not a recording"), "in none of the formats"),
            (base64_of(recording()[:30]), "cannot decode"),
            (base64_of(recording(0)), "too short"),
            (base64_of(recording(1 / 16000)), "too short"),
        ],
    )
    def test_what_cannot_be_read(
        self, speaker: TestClient, path: str, audio: str, says: str
    ) -> None:
        body = {"wav_base64": audio, "wav_format": "wav", "prompt_text": "Hi."}
        assert says in detail(speaker, path, **body)
        assert speaker.post(path, json=body).json()["error"]["param"] == "wav_base64"

    def test_two_hours(self, speaker: TestClient) -> None:
        flac = io.BytesIO()
        with soundfile.SoundFile(flac, "w", 8000, 1, format="FLAC") as file:
            for _ in range(120):
                file.write(np.zeros(8000 * 60, np.float32))
        body = {"wav_base64": base64_of(flac.getvalue()), "wav_format": "flac"}
        assert "may last 600 s at most" in detail(speaker, "/encode_latents", **body)

    def test_a_prompt_that_is_not_there(self, speaker: TestClient) -> None:
        assert detail(speaker, "/remove_prompt", prompt_id="x") == "Prompt with id x not found"

    def test_a_recording_may_be_larger_than_other_bodies(self) -> None:
        app = build_speech(FakeSpeech(), max_body_size=1000, max_audio_body_size=100_000)
        body = {"wav_base64": WAV, "wav_format": "wav"}
        assert TestClient(app).post("/encode_latents", json=body).status_code == 200
        assert TestClient(app).post("/loras", content=b" " * 2000).status_code == 413
        body = {"wav_base64": "A" * 100_000, "wav_format": "wav"}
        assert TestClient(app).post("/encode_latents", json=body).status_code == 413
        only_text = TestClient(build(FakeLLM(), max_body_size=1000))
        assert only_text.post("/generate", content=b" " * 2000).status_code == 413


def test_info() -> None:
    speech = FakeSpeech(info=V2, enable_lora=True)
    options = SpeechConfig(mp3_bitrate_kbps=128)
    info = TestClient(build_speech(speech, options=options)).get("/info").json()
    expected = {
        "kind": "speech",
        "sample_rate": 48000,
        "output_sample_rate": 48000,
        "channels": 1,
        "encoder_sample_rate": 16000,
        "feat_dim": 4,
        "patch_size": 4,
        "model_path": "/models/voxcpm",
    }
    assert expected.items() <= info["model"].items()
    assert info["model"] == info["speech"]
    assert info["mp3"] == {"bitrate_kbps": 128, "quality": 2}
    assert info["lora"] == {
        "enabled": True,
        "enable_lm": True,
        "enable_dit": True,
        "enable_proj": False,
        "max_loras": 1,
        "max_lora_rank": 32,
        "target_modules_lm": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_modules_dit": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_proj_modules": [
            *("enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj", "fusion_concat_proj")
        ],
        "registered_names": [],
        "loaded": [],
    }


def test_metrics(speech: FakeSpeech, speaker: TestClient) -> None:
    generate(speaker, response_format="mp3")
    raw = generate(speaker)
    speaker.post("/encode_latents", json={"wav_base64": WAV, "wav_format": "wav"})
    speaker.post("/encode_latents", json={"wav_base64": base64_of(b"MZ"), "wav_format": "wav"})
    lines = speaker.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    seconds = 2 * 5 * 1280 / 16000
    assert float(values["nanovllm_generate_audio_seconds_total"]) == pytest.approx(seconds)
    assert float(values["nanovllm_generate_stream_bytes_total"]) > len(raw.content)
    assert values["nanovllm_generate_ttfb_seconds_count"] == "2.0"
    assert values["nanovllm_audio_encode_seconds_count"] == "2.0"
    assert values["nanovllm_audio_encode_failures_total"] == "0.0"
    assert values['nanovllm_encode_latents_requests_total{status="ok"}'] == "1.0"
    assert values['nanovllm_encode_latents_requests_total{status="error"}'] == "1.0"
    assert values["nanovllm_encode_latents_duration_seconds_count"] == "2.0"


def test_the_time_to_the_first_byte_begins_when_the_request_arrives(speech: FakeSpeech) -> None:
    speech.delay = 0.05
    client = TestClient(build_speech(speech))
    generate(client)
    line = next(
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("nanovllm_generate_ttfb_seconds_sum")
    )
    assert 0.05 <= float(line.split()[1]) < 0.25
