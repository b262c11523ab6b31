"""`/v1/audio/voices`: voices by name, in memory and in the server's directory."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanovllm.audio.voices import VoiceStore
from nanovllm.config import SpeechConfig
from nanovllm.server.multipart import read_form
from tests.fake_speech import V2, FakeSpeech
from tests.server_client import base64_of, build_speech, call, recording, refused

VOICES, SPEECH = "/v1/audio/voices", "/v1/audio/speech"
WAV = recording()
ANN = {"name": "Ann", "audio": base64_of(WAV), "text": "Hi, I am Ann."}
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "bob.wav").write_bytes(WAV)
    (tmp_path / "bob.txt").write_text("Hi, I am Bob.")
    return tmp_path


def with_directory(speech: FakeSpeech, directory: Path, **options: Any) -> FastAPI:
    speech.voices.open_directory(directory)
    return build_speech(speech, options=SpeechConfig(voices=str(directory), **options))


def names(client: TestClient) -> list[str]:
    answer = client.get(VOICES).json()
    assert [voice["name"] for voice in answer["data"]] == answer["voices"]
    listed: list[str] = answer["voices"]
    return listed


def spoken_with(client: TestClient, speech: FakeSpeech, **body: Any) -> Any:
    response = client.post(SPEECH, json={"input": "Hello.", **body})
    assert response.status_code == 200, response.text[:300]
    return speech.asked[-1][2]["voice"]


class TestAdding:
    def test_as_json(self, speech: FakeSpeech, speaker: TestClient) -> None:
        added = speaker.post(VOICES, json=ANN).json()
        assert (added["object"], added["name"]) == ("audio.voice", "Ann")
        assert names(speaker) == ["Ann"]
        for voice in ("Ann", added["id"], {"id": added["id"]}):
            assert spoken_with(speaker, speech, voice=voice) == added["id"]
        assert len(speech.encoded) == 1

    @pytest.mark.parametrize("field", ["audio_sample", "audio", "file"])
    def test_as_a_form(self, speech: FakeSpeech, speaker: TestClient, field: str) -> None:
        response = speaker.post(
            VOICES,
            files={field: ("ann.wav", WAV, "audio/wav")},
            data={"name": "Ann", "consent": "yes", "ref_text": "Hi, I am Ann."},
        )
        assert response.status_code == 200, response.text
        assert spoken_with(speaker, speech, voice="Ann") == response.json()["id"]
        assert speech.encoded == [(len(WAV), None, "left")]

    def test_without_its_text(self, speaker: TestClient) -> None:
        body = {name: value for name, value in ANN.items() if name != "text"}
        error = refused(speaker, VOICES, **body)
        assert error["message"] == "Reference audio is not supported by the loaded model"
        speech = FakeSpeech(info=V2)
        assert TestClient(build_speech(speech)).post(VOICES, json=body).status_code == 200
        assert speech.encoded[0][2] == "right"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"name": ""}, "name"),
            ({"name": "../../etc/passwd"}, "name"),
            ({"name": ".hidden"}, "name"),
            ({"name": "a" * 65}, "name"),
            *[({"name": name}, "name") for name in (" a", "a ", "a.", ".", " ")],
            ({"audio": "*"}, "audio"),
            ({"audio": "http://host/a.wav"}, "audio"),
            ({"audio": base64_of(b"MZ")}, "audio"),
            ({"text": "a" * 5000}, "text"),
            ({"name": None}, "name"),
        ],
    )
    def test_what_is_refused(self, speaker: TestClient, body: dict[str, Any], param: str) -> None:
        assert refused(speaker, VOICES, **ANN | body)["param"] == param
        assert names(speaker) == []

    def test_a_name_that_is_taken(self, speaker: TestClient) -> None:
        speaker.post(VOICES, json=ANN)
        assert "already" in refused(speaker, VOICES, **ANN)["message"]

    @pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\n\r\na", b"--x--", b"x" * 1000])
    @pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "multipart/x"])
    def test_what_is_no_form(self, speaker: TestClient, content_type: str, body: bytes) -> None:
        headers = {"Content-Type": content_type}
        assert speaker.post(VOICES, content=body, headers=headers).status_code == 400

    @pytest.mark.parametrize("field", ["name", "text"])
    def test_a_form_that_is_not_utf_8(self, speaker: TestClient, field: str) -> None:
        fields: dict[str, Any] = {"name": "ann", "text": "Hi."} | {field: b"Andr\xe9"}
        files = {"audio_sample": ("a.wav", recording())}
        response = speaker.post(VOICES, data=fields, files=files)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
        assert "UTF-8" in response.json()["error"]["message"]
        assert names(speaker) == []

    @pytest.mark.parametrize(
        "head",
        [
            b'Content-Disposition: form-data; name="a"' + b';"' * 500_000,
            b'Content-Disposition: form-data; name="a' + b'\\";' * 500_000,
            b'Content-Disposition: form-data; name="a"\r\n' + b"a:b\r\n" * 200_000,
            b"a:b\n" * 200_000,
        ],
    )
    def test_a_form_whose_headers_take_long_to_read(self, speaker: TestClient, head: bytes) -> None:
        for part in (head, head[:8000]):
            body = (b"--x\r\n" + part + b"\r\n\r\n1\r\n") * (1 if part is head else 60) + b"--x--"
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            start = time.process_time()
            response = speaker.post(VOICES, content=body, headers=headers)
            assert response.status_code == 400
            assert time.process_time() - start < 1

    def test_two_of_one_name_at_once(self, speech: FakeSpeech) -> None:
        app = build_speech(speech)
        encode = speech.encode

        async def slowly(*arguments: Any) -> bytes:
            await asyncio.sleep(0.05)
            return await encode(*arguments)

        speech.voices = VoiceStore(slowly)

        async def run() -> list[tuple[int, bytes]]:
            return await asyncio.gather(*(call(app, VOICES, ANN) for _ in range(2)))

        assert sorted(status for status, _ in asyncio.run(run())) == [200, 400]
        client = TestClient(app)
        assert names(client) == ["Ann"]
        assert client.delete(f"{VOICES}/Ann").status_code == 200
        voice_id = client.post(VOICES, json=ANN).json()["id"]
        assert client.delete(f"{VOICES}/Ann").json()["id"] == voice_id

    def test_too_many_prompts(self, speaker: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nanovllm.audio.voices.MAX_PROMPTS", 0)
        response = speaker.post(VOICES, json=ANN)
        assert response.status_code == 400  # to try again is no help
        assert "remove one first" in response.json()["error"]["message"]

    def test_too_many_fields(self, speaker: TestClient) -> None:
        form = {f"field{number}": "x" for number in range(100)}
        assert speaker.post(VOICES, data=form, files={"a": b""}).status_code == 400


class TestDirectory:
    def test_its_voices_have_names(self, speech: FakeSpeech, directory: Path) -> None:
        client = TestClient(with_directory(speech, directory, default_voice="bob"))
        (bob,) = client.get(VOICES).json()["data"]
        assert bob == {"id": "bob", "object": "audio.voice", "name": "bob", "is_default": True}
        for voice in ("bob", "alloy", None):
            assert spoken_with(client, speech, voice=voice) == "bob"

    def test_a_voice_that_cannot_be_used(self, speech: FakeSpeech, directory: Path) -> None:
        (directory / "bob.wav").write_bytes(b"MZ")
        speech.info = V2
        client = TestClient(with_directory(speech, directory))
        body = {"input": "Hello.", "voice": "bob", "instructions": "Softly."}
        error = refused(client, SPEECH, **body)
        assert error["param"] == "voice"
        assert "'bob' cannot be used" in error["message"]

    def test_the_admin_may_take_openais_names(self, speech: FakeSpeech, directory: Path) -> None:
        speech.voices.open_directory(directory)
        options = SpeechConfig(voices=str(directory), default_voice="bob")
        client = TestClient(build_speech(speech, options=options, admin_key="admin"))
        added = client.post(VOICES, json=ANN | {"name": "alloy"}, headers=ADMIN).json()
        assert spoken_with(client, speech, voice="alloy") == added["id"]
        assert spoken_with(client, speech, voice="nova") == "bob"

    def test_who_has_the_admin_key_changes_it(self, speech: FakeSpeech, directory: Path) -> None:
        speech.voices.open_directory(directory)
        options = SpeechConfig(voices=str(directory))
        client = TestClient(build_speech(speech, options=options, admin_key="admin"))
        assert client.post(VOICES, json=ANN).status_code == 200
        assert not (directory / "Ann.wav").exists()
        assert client.post(VOICES, json=ANN | {"name": "Eve"}, headers=ADMIN).status_code == 200
        assert (directory / "Eve.wav").read_bytes() == WAV
        assert (directory / "Eve.txt").read_text().strip() == ANN["text"]
        assert set(names(client)) == {"Eve", "bob", "Ann"}
        assert client.delete(f"{VOICES}/bob").status_code == 401
        assert client.delete(f"{VOICES}/Ann").status_code == 200
        assert client.delete(f"{VOICES}/bob", headers=ADMIN).status_code == 200
        assert names(client) == ["Eve"]
        assert not (directory / "bob.wav").exists()

    def test_instructions_make_it_a_reference(self, directory: Path) -> None:
        speech = FakeSpeech(info=V2)
        client = TestClient(with_directory(speech, directory))
        assert spoken_with(client, speech, voice="bob", instructions="softly") is None
        assert speech.asked[0][2]["ref_audio_latents"]


class TestDeleting:
    def test_by_name_and_by_id(self, speech: FakeSpeech, speaker: TestClient) -> None:
        for field in ("id", "name"):
            voice = speaker.post(VOICES, json=ANN).json()
            answer = speaker.delete(f"{VOICES}/{voice[field]}")
            assert answer.json() == {
                "id": voice["id"],
                "object": "audio.voice.deleted",
                "deleted": True,
            }
            assert names(speaker) == []
            assert len(list(speech.voices)) == 0

    @pytest.mark.parametrize("name", ["ann", "..%2F..%2Fetc%2Fpasswd", "%2e%2e", "a" * 1000])
    def test_one_that_is_not_there(self, speaker: TestClient, name: str) -> None:
        assert speaker.delete(f"{VOICES}/{name}").status_code in (404, 405)

    def test_in_the_familys_words(self, speaker: TestClient) -> None:
        voice = speaker.post(VOICES, json=ANN).json()["id"]
        assert speaker.post("/remove_prompt", json={"prompt_id": voice}).status_code == 200
        assert names(speaker) == []
        assert speaker.delete(f"{VOICES}/{voice}").status_code == 404

    def test_a_prompt_is_its_owners(self, speaker: TestClient) -> None:
        body = {"wav_base64": base64_of(WAV), "wav_format": "wav", "prompt_text": "Hi."}
        prompt_id = speaker.post("/add_prompt", json=body).json()["prompt_id"]
        assert names(speaker) == []
        assert speaker.delete(f"{VOICES}/{prompt_id}").status_code == 404


def test_a_form_keeps_every_byte() -> None:
    content = bytes(range(256)) * 3 + b"\r\n--almost\r\n\r\n"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="a"; filename="x.wav"\r\n\r\n'
        + content
        + b'\r\n--b\r\nContent-Disposition: form-data; name="n"\r\n\r\nAn\xc3\xa9\r\n--b--\r\n'
    )
    form = read_form('multipart/form-data; boundary="b"', body)
    assert form["a"].content == content
    assert (form["a"].filename, form["n"].filename, form["n"].text) == ("x.wav", None, "An\u00e9")


def test_the_default_voice_stays(speech: FakeSpeech, directory: Path) -> None:
    speech.voices.open_directory(directory)
    options = SpeechConfig(voices=str(directory), default_voice="bob")
    client = TestClient(build_speech(speech, options=options, admin_key="admin"))
    answer = client.delete(f"{VOICES}/bob", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "voice")
    assert spoken_with(client, speech) == "bob"


def test_openais_voices_are_not_anybodys(speaker: TestClient) -> None:
    assert refused(speaker, VOICES, **ANN | {"name": "alloy"})["param"] == "name"
    assert names(speaker) == []
