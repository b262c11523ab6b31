"""`POST /v1/audio/speech`: formats, events, voices, and what is refused."""

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from nanovllm.audio.containers import AudioWriter, encode_audio
from nanovllm.audio.files import Samples, read_audio
from nanovllm.batch import UNUSABLE_PATCH
from nanovllm.config import SpeechConfig
from nanovllm.errors import EngineDeadError
from tests.fake_speech import PATCH_LATENTS, V2, FakeSpeech
from tests.server_client import (
    base64_of,
    build_speech,
    call,
    kept_while_streaming,
    recording,
    refused,
)

SPEECH = "/v1/audio/speech"
SECONDS = 5 * 1280 / 16000


def ask(client: TestClient, **body: Any) -> Any:
    response = client.post(SPEECH, json={"input": "Hello.", "voice": "alloy", **body})
    assert response.status_code == 200, response.text[:300]
    return response


class TestFormats:
    @pytest.mark.parametrize(
        ("response_format", "media_type"),
        [
            *((None, "audio/mpeg"), ("mp3", "audio/mpeg"), ("flac", "audio/flac")),
            *(("wav", "audio/wav"), ("opus", "audio/ogg")),
        ],
    )
    def test_files(self, speaker: TestClient, response_format: str, media_type: str) -> None:
        response = ask(speaker, response_format=response_format)
        assert response.headers["content-type"] == media_type
        rate = soundfile.info(io.BytesIO(response.content)).samplerate
        assert str(rate) == response.headers["x-audio-sample-rate"]
        audio = read_audio(response.content, None, rate)
        assert len(audio) / rate == pytest.approx(SECONDS, abs=0.15)  # MP3 has silence at both ends
        assert np.abs(audio).max() == pytest.approx(0.5, abs=0.1)

    @pytest.mark.parametrize(("response_format", "dtype"), [("pcm", "<i2"), ("raw", "<f4")])
    def test_bare_samples(self, speaker: TestClient, response_format: str, dtype: str) -> None:
        response = ask(speaker, response_format=response_format)
        assert response.headers["x-audio-sample-rate"] == "16000"
        assert len(np.frombuffer(response.content, dtype)) == 5 * 1280

    def test_the_rate_is_the_models(self) -> None:
        response = ask(TestClient(build_speech(FakeSpeech(info=V2))), response_format="pcm")
        assert response.headers["x-audio-sample-rate"] == "48000"

    def test_a_whole_file_has_its_length(self, speaker: TestClient) -> None:
        response = ask(speaker, response_format="wav", stream=False)
        assert int(response.headers["content-length"]) == len(response.content)
        assert soundfile.info(io.BytesIO(response.content)).frames == 5 * 1280

    def test_a_whole_file_is_not_written_on_the_loop(
        self, speaker: TestClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(self: AudioWriter, audio: Samples) -> bytes:
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            return b""

        monkeypatch.setattr(AudioWriter, "write", write)
        assert ask(speaker, response_format="wav", stream=False).content

    @pytest.mark.parametrize("response_format", ["pcm", "wav", "raw"])
    def test_the_first_sound_leaves_before_there_is_a_second_patch(
        self, response_format: str
    ) -> None:
        speech = FakeSpeech(num_patches=50)
        speech.delay = 0.01
        body = {"input": "Hello.", "response_format": response_format}
        asyncio.run(call(build_speech(speech), SPEECH, body, leave_when=bool))
        assert speech.num_made <= 2
        assert speech.num_open == 0


class TestEvents:
    def test_audio_then_usage(self, speaker: TestClient) -> None:
        response = ask(speaker, stream_format="sse", response_format="pcm")
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
        assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
        sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
        assert sound == ask(speaker, response_format="pcm").content
        usage = {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12}
        assert events[-1] == {"type": "speech.audio.done", "usage": usage}

    def test_an_error_on_the_way_is_an_event(self, speech: FakeSpeech, speaker: TestClient) -> None:
        speech.fail_after = 2
        text = ask(speaker, stream_format="sse", response_format="pcm").text
        last = json.loads(text.strip().split("\n\n")[-1][6:])
        assert (last["type"], last["error"]["code"]) == ("error", "engine_died")


class TestErrors:
    def test_before_the_first_sound_is_a_status(
        self, speech: FakeSpeech, speaker: TestClient
    ) -> None:
        speech.fail_after = 0
        response = speaker.post(SPEECH, json={"input": "Hello."})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_died"
        speech.failure = RuntimeError("secret /path")
        response = speaker.post(SPEECH, json={"input": "Hello."})
        assert response.status_code == 500
        assert "secret" not in response.text
        speech.failure = RuntimeError(f"the speech could not be generated: {UNUSABLE_PATCH}")
        response = speaker.post(SPEECH, json={"input": "Hello."})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == UNUSABLE_PATCH
        speech.overloaded = True
        assert speaker.post(SPEECH, json={"input": "Hello."}).status_code == 503
        assert speech.num_open == 0

    def test_on_the_way_breaks_the_answer_off(self, speech: FakeSpeech) -> None:
        speech.fail_after, speech.failure = 2, EngineDeadError("dead")
        sent: list[Any] = []
        app = build_speech(speech)

        async def run() -> None:
            body = json.dumps({"input": "Hello.", "response_format": "pcm"}).encode()
            messages = iter([{"type": "http.request", "body": body}])

            async def receive() -> Any:
                if (message := next(messages, None)) is None:
                    await asyncio.Event().wait()
                return message

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": SPEECH, "headers": headers}
            await app(scope | {"query_string": b"", "raw_path": b""}, receive, send)

        asyncio.run(run())
        assert sent[0]["status"] == 200
        assert all(message.get("more_body") for message in sent[1:])
        assert speech.num_open == 0

    @pytest.mark.parametrize(
        ("body", "param", "says"),
        [
            ({"input": ""}, "input", "at least 1 character"),
            ({"input": "   "}, "input", "non-empty"),
            ({"input": " ", "retry_badcase": True, "stream": False}, "input", "non-empty"),
            ({"input": "a" * 4097}, "input", "4096 characters, got 4097"),
            ({"input": "a" * 100_000, "split_sentences": True}, "input", "65536"),
            ({"speed": 1.5}, "speed", "must be 1, got 1.5"),
            ({"instructions": "softly"}, "instructions", "not supported"),
            ({"response_format": "vorbis"}, "response_format", "'mp3'"),
            ({"stream_format": "x"}, "stream_format", ""),
            ({"voice": "ann"}, "voice", "there is no voice 'ann'"),
            ({"voice": {"id": "ann"}}, "voice", "there is no voice 'ann'"),
            ({"voice": 3}, "voice", "must be the id or the name of a voice"),
            ({"voice": "../../etc/passwd"}, "voice", "there is no voice"),
            ({"inference_timesteps": 1}, "inference_timesteps", "greater than or equal to 2"),
            ({"cfg_value": 11}, "cfg_value", "less than or equal to 10"),
            ({"temperature": -1}, "temperature", ""),
            ({"seed": 2**64}, "seed", ""),
            ({"lora_name": "x"}, "lora_name", "LoRA 'x' is not registered"),
            ({"ref_text": "Hi."}, "ref_text", "needs ref_audio"),
            ({"ref_audio": "*", "ref_text": "a"}, "ref_audio", "Invalid base64 in ref_audio"),
            ({"ref_audio": "http://x/a.wav", "ref_text": "a"}, "ref_audio", "fetches nothing"),
            ({"ref_audio": "file:///etc/passwd", "ref_text": "a"}, "ref_audio", "fetches nothing"),
            *(
                (
                    {"ref_audio": base64_of(recording())} | text,
                    "ref_audio",
                    "Reference audio is not",
                )
                for text in ({}, {"ref_text": "  "})
            ),
            ({"ref_audio": base64_of(b"RIFF"), "ref_text": "a"}, "ref_audio", "cannot decode"),
            (
                {"ref_audio": base64_of(b"MZ"), "ref_text": "a"},
                "ref_audio",
                "in none of the formats",
            ),
            ({"retry_badcase": True}, "retry_badcase", "needs stream=false"),
        ],
    )
    def test_what_is_refused(
        self, speaker: TestClient, body: dict[str, Any], param: str, says: str
    ) -> None:
        error = refused(speaker, SPEECH, **{"input": "Hello."} | body)
        assert error["param"] == param
        assert says in error["message"]

    def test_a_client_that_leaves_ends_it(self) -> None:
        speech = FakeSpeech(num_patches=10_000)
        speech.delay = 0.001
        app = build_speech(speech)
        asyncio.run(call(app, SPEECH, {"input": "a"}, leave_when=lambda sent: len(sent) > 3000))
        assert speech.num_open == 0
        assert speech.num_made < 1000

    def test_a_client_that_leaves_before_the_first_sound(self) -> None:
        speech = FakeSpeech()
        speech.delay = 5
        asyncio.run(call(build_speech(speech), SPEECH, {"input": "a"}, leave_when=lambda _: True))
        assert (speech.num_open, speech.num_made) == (0, 0)


class TestVoices:
    def test_every_option_reaches_the_model(self, speech: FakeSpeech, speaker: TestClient) -> None:
        options = {
            "cfg_value": 1.5,
            "inference_timesteps": 4,
            "temperature": 0.5,
            "seed": 7,
            "min_len": 3,
            "max_generate_length": 9,
        }
        ask(speaker, **options, speed=1.0, lora_name=None)
        text, params, _ = speech.asked[0]
        assert text == "Hello."
        assert {name: getattr(params, name) for name in options} == options

    def test_defaults_are_voxcpms_and_the_servers(self, speech: FakeSpeech) -> None:
        ask(TestClient(build_speech(speech, options=SpeechConfig(inference_timesteps=6))))
        params = speech.asked[0][1]
        assert (params.cfg_value, params.inference_timesteps, params.temperature) == (2.0, 6, 1.0)

    @pytest.mark.parametrize(
        "prefix", ["", "data:audio/wav;base64,", "\n Data:audio/wav;codecs=1;BASE64,"]
    )
    def test_a_recording_and_what_it_says(
        self, speech: FakeSpeech, speaker: TestClient, prefix: str
    ) -> None:
        ask(speaker, ref_audio=prefix + base64_of(recording()), ref_text="Hi there.")
        options = speech.asked[0][2]
        assert options["prompt_text"] == "Hi there."
        assert options["prompt_latents"]
        assert options["ref_audio_latents"] is None
        assert [side for _, _, side in speech.encoded] == ["left"]

    def test_a_data_url_that_is_not_in_base64(self, speaker: TestClient) -> None:
        error = refused(speaker, SPEECH, input="a", ref_audio="data:audio/wav,RIFF", ref_text="Hi.")
        assert error["param"] == "ref_audio"
        assert ";base64," in error["message"]

    def test_a_recording_alone_and_instructions(self) -> None:
        speech = FakeSpeech(info=V2)
        client = TestClient(build_speech(speech))
        ask(client, reference_audio=base64_of(recording()))
        ask(client, ref_audio=base64_of(recording()), ref_text="Hi.", instructions="softly")
        assert [side for _, _, side in speech.encoded] == ["right", "right"]
        assert all(options["ref_audio_latents"] for _, _, options in speech.asked)
        assert [text for text, _, _ in speech.asked] == ["Hello.", "(softly)Hello."]

    def test_instructions_with_parentheses(self) -> None:
        speech = FakeSpeech(info=V2)
        body = {"instructions": "softly (and) slowly", "split_sentences": True}
        ask(TestClient(build_speech(speech)), **body)
        assert speech.asked[0][0] == "(softly [and] slowly)Hello."

    def test_retrying(self, speech: FakeSpeech, speaker: TestClient) -> None:
        ask(speaker, retry_badcase=True, stream=False, response_format="pcm")
        assert speech.asked[0][1].retry_badcase


class TestSentences:
    def test_one_after_the_other_in_one_voice(
        self, speech: FakeSpeech, speaker: TestClient
    ) -> None:
        body = {"input": "One is here. Two is there. Three is gone.", "split_sentences": True}
        response = ask(speaker, **body, response_format="pcm")
        assert len(response.content) == 3 * 5 * 1280 * 2
        texts = [text.strip() for text, _, _ in speech.asked]
        assert texts == ["One is here.", "Two is there.", "Three is gone."]
        first, *others = [options for _, _, options in speech.asked]
        assert first["prompt_latents"] is None
        assert {o["prompt_latents"] for o in others} == {5 * PATCH_LATENTS}
        assert {o["prompt_text"].strip() for o in others} == {"One is here."}

    def test_a_voice_stays_what_it_is(self, speech: FakeSpeech, speaker: TestClient) -> None:
        body = {"input": "One is here. Two is there.", "split_sentences": True}
        ask(speaker, **body, ref_audio=base64_of(recording()), ref_text="Hi.")
        assert len({options["prompt_latents"] for _, _, options in speech.asked}) == 1
        assert len(speech.encoded) == 1


def test_a_recording_is_forgotten_once_it_is_encoded() -> None:
    """While the speech is sent, the server keeps no body of a request, in no form."""
    speech = FakeSpeech(info=V2)
    seconds = np.random.default_rng(0).integers(-9999, 9999, 60 * 16000, np.int16)
    audio = base64_of(encode_audio("wav", 16000, seconds / np.float32(32768)))
    body = {"input": "Hello.", "response_format": "pcm"}
    assert len(audio) > 2 << 20
    kept = kept_while_streaming(build_speech(speech), SPEECH, body, {"ref_audio": audio})
    assert kept < len(audio) / 2


def test_abort_between_the_sentences_of_a_long_text() -> None:
    speech = FakeSpeech(num_patches=2)
    app = build_speech(speech)
    waiting, generate = asyncio.Event(), speech.generate

    async def one_alone(text: str, *args: Any, **options: Any) -> Any:
        if speech.asked:
            waiting.set()
            await asyncio.sleep(60)
        return await generate(text, *args, **options)

    speech.generate = one_alone  # type: ignore[method-assign]

    async def run() -> tuple[int, bytes]:
        body = {"input": "One is. Two is.", "response_format": "pcm", "split_sentences": True}
        answer = asyncio.ensure_future(call(app, SPEECH, body, request_id="mine"))
        await asyncio.wait_for(waiting.wait(), 10)
        _, aborted = await call(app, "/abort", {"request_id": "mine"})
        assert json.loads(aborted)["aborted"]
        return await asyncio.wait_for(answer, 10)

    status, sound = asyncio.run(run())
    assert (status, len(sound)) == (200, 2 * 2560)


def test_abort_by_the_requests_name() -> None:
    speech = FakeSpeech(num_patches=10_000)
    speech.delay = 0.001
    app = build_speech(speech)

    async def run() -> tuple[int, bytes]:
        body = {"input": "a", "response_format": "pcm"}
        answer = asyncio.ensure_future(call(app, SPEECH, body, request_id="mine"))
        while not speech.num_made:
            await asyncio.sleep(0.01)
        _, aborted = await call(app, "/abort", {"request_id": "mine"})
        assert json.loads(aborted)["aborted"]
        return await answer

    status, sound = asyncio.run(run())
    assert status == 200
    assert 0 < len(sound) < 10_000 * 2560
    assert speech.num_open == 0
