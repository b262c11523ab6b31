"""`/loras`: adapters, loaded by who has the admin key from below one directory."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.fake_speech import FakeSpeech
from tests.server_client import build_speech

DISABLED = "Runtime LoRA is disabled; set NANOVLLM_LORA_ENABLED=true"
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture
def speech() -> FakeSpeech:
    return FakeSpeech(enable_lora=True)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    (tmp_path / "adapters" / "calm").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "adapters"


@pytest.fixture
def client(speech: FakeSpeech, adapters: Path) -> TestClient:
    return TestClient(build_speech(speech, admin_key="admin", lora_dir=str(adapters)))


def load(client: TestClient, name: str, path: str, **headers: str) -> Any:
    return client.post("/loras", json={"name": name, "path": path}, headers=ADMIN | headers)


def test_an_adapters_life(client: TestClient, speech: FakeSpeech, adapters: Path) -> None:
    assert load(client, "calm", "calm").json() == {"name": "calm"}
    assert load(client, "other", str(adapters / "calm")).json() == {"name": "other"}
    assert speech.loras["calm"] == speech.loras["other"] == str(adapters / "calm")
    assert client.get("/loras").json() == [{"name": "calm"}, {"name": "other"}]
    assert client.get("/info").json()["lora"]["registered_names"] == ["calm", "other"]
    body = {"target_text": "Hello", "lora_name": "calm"}
    assert client.post("/generate", json=body).status_code == 200
    assert speech.asked[0][2]["lora_name"] == "calm"
    assert client.delete("/loras/calm", headers=ADMIN).json() == {"name": "calm"}
    assert client.get("/loras").json() == [{"name": "other"}]
    answer = client.delete("/loras/calm", headers=ADMIN)
    assert answer.status_code == 400
    assert answer.json()["detail"] == "LoRA 'calm' is not registered"


def test_a_name_that_is_taken(client: TestClient) -> None:
    load(client, "calm", "calm")
    answer = load(client, "calm", "calm")
    assert (answer.status_code, answer.json()["detail"]) == (
        400,
        "LoRA 'calm' is already registered",
    )


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "../outside", "/etc", "/", "link", "calm/../../outside", "missing"),
        *("a\0b", "a" * 4000, "~", "calm/../link"),
    ],
)
def test_paths_that_are_not_below_the_directory(
    client: TestClient, speech: FakeSpeech, path: str
) -> None:
    assert load(client, "calm", path).status_code == 400
    assert not speech.loras


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a" * 65, ".x", "a b"])
def test_names_that_are_none(client: TestClient, name: str) -> None:
    assert load(client, name, "calm").status_code == 400


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}])
def test_without_the_admin_key(client: TestClient, headers: dict[str, str]) -> None:
    body = {"name": "calm", "path": "calm"}
    assert client.post("/loras", json=body, headers=headers).status_code == 401
    assert client.delete("/loras/calm", headers=headers).status_code == 401
    assert client.get("/loras", headers=headers).status_code == 200


def test_a_users_key_is_none_and_the_admins_is_one(speech: FakeSpeech, adapters: Path) -> None:
    app = build_speech(speech, admin_key="admin", api_key=["user"], lora_dir=str(adapters))
    client = TestClient(app)
    user = {"Authorization": "Bearer user"}
    assert client.get("/loras").status_code == 401
    assert client.get("/loras", headers=user).status_code == 200
    assert load(client, "calm", "calm", **user).status_code == 401
    assert load(client, "calm", "calm").status_code == 200


def test_without_an_admin_key_nobody_may(speech: FakeSpeech, adapters: Path) -> None:
    client = TestClient(build_speech(speech, lora_dir=str(adapters)))
    assert load(client, "calm", "calm").status_code == 401


def test_without_a_directory(speech: FakeSpeech) -> None:
    client = TestClient(build_speech(speech, admin_key="admin"))
    assert load(client, "calm", "/").status_code == 400


def test_where_adapters_are_disabled() -> None:
    client = TestClient(build_speech(FakeSpeech(), admin_key="admin"))
    for answer in (
        load(client, "calm", "calm"),
        client.get("/loras"),
        client.delete("/loras/calm", headers=ADMIN),
    ):
        assert (answer.status_code, answer.json()["detail"]) == (400, DISABLED)


def test_the_familys_one_adapter(client: TestClient, speech: FakeSpeech) -> None:
    def post(path: str, **body: Any) -> Any:
        return client.post(f"/lora/{path}", json=body, headers=ADMIN).json()

    def used() -> Any:
        client.post("/generate", json={"target_text": "Hello"})
        return speech.asked[-1][2]["lora_name"]

    assert "load one first" in post("set_enabled", enabled=True)["detail"]
    loaded = post("load", lora_path="calm")
    assert loaded["status"] == "ok"
    assert loaded["loaded_keys"]
    assert loaded["skipped_keys"] == []
    first = used()
    assert first == client.get("/loras").json()[0]["name"]
    assert post("set_enabled", enabled=False) == {"status": "ok", "lora_enabled": False}
    assert used() is None
    assert post("set_enabled", enabled=True) == {"status": "ok", "lora_enabled": True}
    assert used() == first
    missing = post("load", lora_path="missing")
    assert "LoRA directory not found" in missing["detail"]
    assert missing["error"]["param"] == "lora_path"
    assert used() == first
    assert post("load", lora_path="calm")["status"] == "ok"
    assert list(speech.loras) == [used()] != [first]
    assert post("reset") == {"status": "ok"}
    assert used() is None
    assert speech.loras == {}


def test_an_adapter_of_ones_own_is_not_the_familys_one(
    client: TestClient, speech: FakeSpeech
) -> None:
    load(client, "default", "calm")
    for path in ("load", "reset"):
        body = {"lora_path": "calm"} if path == "load" else None
        assert client.post(f"/lora/{path}", json=body, headers=ADMIN).status_code == 200
    assert list(speech.loras) == ["default"]
    assert load(client, "default/3", "calm").status_code == 400
