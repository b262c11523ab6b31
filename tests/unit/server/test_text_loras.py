"""Adapters of the model that writes: named as models, loaded by who has the admin key."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanovllm.config import EngineConfig, ServerConfig, SpeechConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.server.adapters import LoRAModule, load_modules, lora_modules
from nanovllm.server.metrics import Metrics
from nanovllm.server.state import ServerState
from tests.fake_llm import FakeLLM
from tests.fake_speech import FakeSpeech
from tests.server_client import CHAT, HI, TEXT, build, build_speech, post, stream

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM(enable_lora=True)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    (tmp_path / "adapters" / "tale").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "adapters" / "linked").mkdir()
    (tmp_path / "adapters" / "linked" / "adapter_config.json").symlink_to(tmp_path / "outside")
    return tmp_path / "adapters"


@pytest.fixture
def app(llm: FakeLLM, adapters: Path) -> FastAPI:
    return build(llm, admin_key="admin", lora_dir=str(adapters), served_model_name=["base", "b"])


def load(client: TestClient, name: Any, path: Any, **more: Any) -> Any:
    return client.post(LOAD, json={"lora_name": name, "lora_path": path, **more}, headers=ADMIN)


def unload(client: TestClient, name: Any) -> Any:
    return client.post(UNLOAD, json={"lora_name": name}, headers=ADMIN)


class TestLife:
    def test_from_loading_to_unloading(
        self, client: TestClient, llm: FakeLLM, adapters: Path
    ) -> None:
        loaded = load(client, "org/tale", "tale")
        assert (loaded.status_code, loaded.text) == (
            200,
            "Success: LoRA adapter 'org/tale' added successfully.",
        )
        assert llm.loras == {"org/tale": str(adapters / "tale")}
        assert load(client, "other", str(adapters / "tale")).status_code == 200
        models = client.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in models] == [
            *(("base", None), ("b", None), ("org/tale", "base"), ("other", "base"))
        ]
        assert {model["max_model_len"] for model in models} == {llm.max_model_len}
        assert client.get("/v1/models/org/tale").json() == models[2]
        info = client.get("/info").json()
        assert info["model"]["lora_names"] == info["lora"]["loaded"] == ["org/tale", "other"]
        unloaded = unload(client, "org/tale")
        assert (unloaded.status_code, unloaded.text) == (
            200,
            "Success: LoRA adapter 'org/tale' removed successfully.",
        )
        assert client.get("/v1/models/org/tale").status_code == 404
        assert unload(client, "org/tale").status_code == 404

    def test_what_the_model_refuses(self, client: TestClient, llm: FakeLLM, adapters: Path) -> None:
        missing = load(client, "tale", "missing")
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "lora_path")
        llm.loras["tale"] = "x"
        llm.list_loras = list  # type: ignore[method-assign]  # another load goes on
        taken = load(client, "tale", "tale")
        assert (taken.status_code, taken.json()["error"]["param"]) == (400, "lora_name")

    @pytest.mark.parametrize("name", ["base", "b", "tale"])
    def test_a_name_that_is_taken(self, client: TestClient, llm: FakeLLM, name: str) -> None:
        load(client, "tale", "tale")
        answer = load(client, name, "tale")
        assert answer.status_code == 400
        assert f"`{name}` is the name of a model" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "lora_name"
        assert list(llm.loras) == ["tale"]

    @pytest.mark.parametrize(
        "path",
        [
            *("", ".", "..", "../outside", "/etc", "/", "link", "tale/../../outside", "missing"),
            *("a\0b", "a" * 4000, "~", "tale/../link", "linked", None, 7, ["tale"]),
        ],
    )
    def test_paths_that_are_not_below_the_directory(
        self, client: TestClient, llm: FakeLLM, path: Any
    ) -> None:
        assert load(client, "tale", path).status_code == 400
        assert not llm.loras

    @pytest.mark.parametrize(
        "name", ["", "../x", " a", "a b", "a\n", ".x", "a" * 129, "<b>", "é", None, 3]
    )
    def test_names_that_are_none(self, client: TestClient, llm: FakeLLM, name: Any) -> None:
        assert load(client, name, "tale").status_code == 400
        assert not llm.loras

    def test_replacing_one_in_place(self, client: TestClient) -> None:
        assert load(client, "tale", "tale", load_inplace=False).status_code == 200
        answer = load(client, "tale", "tale", load_inplace=True)
        assert answer.status_code == 400
        assert "unload the adapter before" in answer.json()["error"]["message"]


class TestWhoMay:
    @pytest.mark.parametrize("path", [LOAD, UNLOAD])
    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer key"}])
    def test_only_who_has_the_admin_key(
        self, llm: FakeLLM, adapters: Path, path: str, headers: dict[str, str]
    ) -> None:
        llm.loras["tale"] = "x"
        body = {"lora_name": "tale", "lora_path": "tale"}
        options = {"api_key": ["key"], "lora_dir": str(adapters)}
        for more in ({}, {"admin_key": "admin"}):
            client = TestClient(build(llm, **options, **more))
            assert client.post(path, json=body, headers=headers).status_code == 401
        assert llm.loras == {"tale": "x"}

    def test_without_a_directory_nothing_is_loaded(self, llm: FakeLLM, adapters: Path) -> None:
        client = TestClient(build(llm, admin_key="admin"))
        answer = load(client, "tale", str(adapters / "tale"))
        assert answer.status_code == 400
        assert "start it with --lora-dir" in answer.json()["error"]["message"]

    def test_an_engine_without_adapters(self, adapters: Path) -> None:
        client = TestClient(build(FakeLLM(), admin_key="admin", lora_dir=str(adapters)))
        answer = load(client, "tale", "tale")
        assert answer.status_code == 400
        assert "start it with --enable-lora" in answer.json()["error"]["message"]

    def test_a_server_that_only_speaks(self, speech: FakeSpeech, adapters: Path) -> None:
        client = TestClient(build_speech(speech, admin_key="admin", lora_dir=str(adapters)))
        assert load(client, "tale", "tale").status_code == 404
        assert unload(client, "tale").status_code == 404


MESSAGES = {"messages": HI, "max_tokens": 4}


class TestRequests:
    """`model` names the adapter, whichever the API."""

    @pytest.fixture(autouse=True)
    def loaded(self, llm: FakeLLM) -> None:
        llm.loras["tale"] = "/adapters/tale"

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (CHAT, {"messages": HI}),
            (TEXT, {"prompt": ["Once", "There"]}),
            ("/v1/responses", {"input": "Hi"}),
            ("/v1/messages", MESSAGES),
            ("/api/chat", {"messages": HI, "stream": False}),
            ("/api/generate", {"prompt": "Hi", "stream": False}),
        ],
    )
    def test_it_is_used_and_named(
        self, client: TestClient, llm: FakeLLM, path: str, body: dict[str, Any]
    ) -> None:
        assert post(client, path, model="tale", **body)["model"] == "tale"
        post(client, path, model="b", **body)
        assert llm.adapted == ["tale", None]
        assert client.post(path, json={"model": "fable", **body}).status_code == 404
        assert len(llm.adapted) == 2

    def test_streams_name_it(self, client: TestClient, llm: FakeLLM) -> None:
        for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "Once"})):
            assert {chunk["model"] for chunk in stream(client, path, model="tale", **body)} == {
                "tale"
            }
        assert {chunk["model"] for chunk in stream(client, TEXT, prompt="Once")} == {"base"}
        assert llm.adapted == ["tale", "tale", None]

    def test_tokens_are_the_base_model_s(self, client: TestClient) -> None:
        tokens = post(client, "/tokenize", model="tale", prompt="Once")["tokens"]
        assert post(client, "/tokenize", model="base", prompt="Once")["tokens"] == tokens
        post(client, "/v1/messages/count_tokens", model="tale", messages=HI)

    def test_ollama_lists_and_describes_it(self, client: TestClient) -> None:
        assert "tale" in [model["name"] for model in client.get("/api/tags").json()["models"]]
        post(client, "/api/show", model="tale")

    def test_the_error_of_an_unknown_name_lists_it(self, client: TestClient) -> None:
        error = client.post(CHAT, json={"messages": HI, "model": "x"}).json()["error"]
        assert error["code"] == "model_not_found"
        assert "`base`, `b`, `tale`" in error["message"]

    def test_it_does_not_speak(self, llm: FakeLLM, speech: FakeSpeech) -> None:
        options = SpeechConfig(speech_model="x", speech_served_model_name=["tts"])
        client = TestClient(build_speech(speech, llm, options, served_model_name=["base"]))
        answer = client.post("/v1/audio/speech", json={"input": "Hi", "model": "tale"})
        assert answer.status_code == 400
        assert "it writes" in answer.json()["error"]["message"]
        assert post(client, TEXT, prompt="Once", model="tale")["model"] == "tale"


class TestModules:
    """Adapters to begin with, as the command line has them."""

    LORA = EngineConfig(enable_lora=True)

    def read(self, *given: str) -> list[LoRAModule]:
        return lora_modules(ServerConfig(lora_modules=list(given)), self.LORA)

    def load(self, llm: FakeLLM, *given: str) -> None:
        state = ServerState(
            ServerConfig(served_model_name=["base"]),
            SpeechConfig(),
            Metrics(),
            llm,  # type: ignore[arg-type]
        )
        asyncio.run(load_modules(state, self.LORA, self.read(*given)))

    def test_both_forms(self) -> None:
        named = {"name": "b", "path": "/x", "base_model_name": "org/base"}
        assert self.read("a=/adapters/a=1", json.dumps(named), ' {"name": "c", "path": "y/z"}') == [
            LoRAModule("a", "/adapters/a=1"),
            LoRAModule("b", "/x", "org/base"),
            LoRAModule("c", "y/z"),
        ]
        assert lora_modules(ServerConfig(), EngineConfig()) == []

    @pytest.mark.parametrize(
        "text",
        [
            *("", "a", "a=", "=path", "{", "[]", "{}", '{"name": "a"}', '{"name": "a", "path": 7}'),
            '{"name": "a", "path": "b", "rank": 3}',
            '{"name": "a", "path": "b", "base_model_name": null}',
            *("a b=c", "../a=c", "a\n=c", "{" * 100_000),
        ],
    )
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            self.read(text)
        assert str(caught.value).startswith("lora_modules")
        assert caught.value.param == "lora_modules"

    def test_they_need_room(self) -> None:
        with pytest.raises(InvalidRequestError, match="lora_modules needs enable_lora"):
            lora_modules(ServerConfig(lora_modules=["a=b"]), EngineConfig())

    def test_loading(self, llm: FakeLLM, adapters: Path) -> None:
        module = {"name": "b", "path": str(adapters / "link"), "base_model_name": "demo_model"}
        self.load(llm, f"a={adapters / 'tale'}", json.dumps(module))
        assert llm.loras == {
            "a": str(adapters / "tale"),
            "b": str(adapters.parent / "outside"),
        }

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["base=."], "'base' is the name of a model or of another adapter"),
            (["a=.", "a=."], "'a' is the name of a model or of another adapter"),
            (["a=/nowhere"], "'a': model directory '/nowhere' does not exist"),
            (
                ['{"name": "a", "path": ".", "base_model_name": "llama"}'],
                "'a' is for 'llama', and what is served is base, demo_model",
            ),
        ],
    )
    def test_what_cannot_be_loaded(self, llm: FakeLLM, given: list[str], message: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            self.load(llm, *given)
        assert message in str(caught.value)

    def test_a_model_that_speaks_alone_gets_them(self, adapters: Path) -> None:
        speech = FakeSpeech(enable_lora=True)
        state = ServerState(
            ServerConfig(),
            SpeechConfig(),
            Metrics(),
            None,
            speech,  # type: ignore[arg-type]
        )
        modules = self.read(f"calm={adapters / 'tale'}")
        asyncio.run(load_modules(state, self.LORA, modules))
        assert speech.loras == {"calm": str(adapters / "tale")}
