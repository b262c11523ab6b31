"""A server with a model that writes and one that speaks, and with one of them alone."""

import pytest
from starlette.testclient import TestClient

from nanovllm.config import SpeechConfig
from tests.fake_llm import FakeLLM
from tests.fake_speech import FakeSpeech
from tests.server_client import CHAT, HI, TEXT, build, build_speech

SPEECH = "/v1/audio/speech"


@pytest.fixture
def both(llm: FakeLLM, speech: FakeSpeech) -> TestClient:
    options = SpeechConfig(speech_model="x", speech_served_model_name=["tts", "speaker"])
    return TestClient(build_speech(speech, llm, options, served_model_name=["tale"]))


def test_both_are_listed(both: TestClient, llm: FakeLLM, speech: FakeSpeech) -> None:
    models = both.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tale", "tts", "speaker"]
    lengths = [llm.max_model_len, speech.max_model_len, speech.max_model_len]
    assert [model["max_model_len"] for model in models] == lengths
    assert both.get("/v1/models/speaker").json()["root"] == "voxcpm"
    assert both.get("/v1/models/nobody").status_code == 404


def test_requests_go_to_the_model_they_name(both: TestClient) -> None:
    for model in ({}, {"model": "tale"}):
        assert both.post(TEXT, json={"prompt": "Once", **model}).json()["model"] == "tale"
    for model in ({}, {"model": "tts"}, {"model": "speaker"}):
        assert both.post(SPEECH, json={"input": "Hi", **model}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "Once", "model": "tts"}),
        (CHAT, {"messages": HI, "model": "tts"}),
        ("/tokenize", {"prompt": "Once", "model": "tts"}),
        (SPEECH, {"input": "Hi", "model": "tale"}),
        ("/generate", {"target_text": "Hi", "model": "tale"}),
    ],
)
def test_a_model_of_the_other_kind(both: TestClient, path: str, body: dict[str, str]) -> None:
    response = both.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "model"
    assert "cannot do this" in error["message"]


@pytest.mark.parametrize(("path", "body"), [(TEXT, {"prompt": "Once"}), (SPEECH, {"input": "Hi"})])
def test_a_model_nobody_knows(both: TestClient, path: str, body: dict[str, str]) -> None:
    error = both.post(path, json=body | {"model": "gpt-4o-mini-tts"})
    assert error.status_code == 404
    assert error.json()["error"]["code"] == "model_not_found"
    assert "`tale`, `tts`, `speaker`" in error.json()["error"]["message"]


def test_what_needs_a_model_that_is_not_there(speaker: TestClient) -> None:
    for path, body in (
        (TEXT, {"prompt": "Once"}),
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": HI, "stream": True}),
        ("/tokenize", {"prompt": "Once"}),
        ("/detokenize", {"tokens": [1]}),
        ("/generate", {"prompt": "Once"}),
    ):
        response = speaker.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert speaker.get("/tokenizer_info").status_code == 404
    writer = TestClient(build(FakeLLM()))
    for path in (SPEECH, "/encode_latents", "/add_prompt", "/v1/audio/voices", "/lora/load"):
        body = {"input": "Hi", "wav_base64": "", "wav_format": "wav", "prompt_text": "a"}
        assert writer.post(path, json=body).status_code in (400, 404)
    assert writer.get("/v1/audio/voices").status_code == 404
    assert writer.get("/loras").status_code == 404


def test_ready_is_when_both_are(both: TestClient, llm: FakeLLM, speech: FakeSpeech) -> None:
    assert both.get("/ready").status_code == 200
    for model in (llm, speech):
        model.is_ready = False
        assert both.get("/ready").status_code == 503
        model.is_ready = True


def test_one_page_of_metrics(both: TestClient, speech: FakeSpeech) -> None:
    speech.num_open = 3
    text = both.get("/metrics").text
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert 'vllm:num_requests_running{engine="0",model_name="tts"} 3.0' in text
    for name in ("tale", "tts"):
        assert f'vllm:generation_tokens_total{{model_name="{name}"}} 0.0' in text
    pool = both.get("/metrics.json").json()
    assert [engine["model"] for engine in pool["engines"]] == ["tts"]
    assert (pool["num_running"], pool["inflight_total"]) == (3, 3)
    info = both.get("/info").json()
    assert (info["model"]["kind"], info["speech"]["kind"]) == ("text", "speech")
