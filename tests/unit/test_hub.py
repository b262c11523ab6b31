"""Finding a checkpoint: directories, and a hub that runs on loopback."""

import hashlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from nanovllm.config import DEMO_MODEL, EngineConfig
from nanovllm.errors import UnsupportedModelError
from nanovllm.models.hub import resolve_model

FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights of main",
    "consolidated.safetensors": b"the same again",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"hello",
}
WANTED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
TOKEN = "hf_right"


def sha(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class Hub:
    """A hub with the repositories `me/tiny` (branches main and v2), `me/private` and `me/gated`."""

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    down: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: FILES)

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository = "/".join(parts[:2])
        if self.down:
            return 503, {}, b""
        if repository == "me/gated" and token != TOKEN:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repository == "me/private" and token != TOKEN:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if repository not in ("me/tiny", "me/private", "me/gated"):
            return 401 if token is None else 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = next((r for r in ("main", "v2") if parts[3] in (r, sha(r))), None)
        if revision is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = dict(self.files)
        if "model.safetensors" in files:
            files["model.safetensors"] = f"weights of {revision}".encode()
        if is_api and parts[2] == "revision":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repository, "sha": sha(revision), "siblings": siblings}
            return 200, {}, json.dumps(info).encode()
        if is_api:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha(data.hex())}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        data = files["/".join(parts[4:])]
        return 200, {"ETag": f'"{sha(data.hex())}"', "X-Repo-Commit": sha(revision)}, data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            state.requests.append(f"{self.command} {path}")
            authorization = self.headers.get("Authorization") or ""
            token = authorization.removeprefix("Bearer ") or None
            status, headers, body = state.answer(path, token)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def options(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    return {"endpoint": hub.endpoint, "download_dir": str(tmp_path / "cache"), "hf_token": "hf_x"}


def names_in(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_the_demo_model_is_the_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert resolve_model(EngineConfig()) == DEMO_MODEL
    assert caplog.messages == ["no model given: using the bundled demo model"]


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model(EngineConfig(model=str(tmp_path))) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(EngineConfig(model="~/org")) == tmp_path / "org"
    monkeypatch.chdir(tmp_path)
    assert resolve_model(EngineConfig(model="org/model")) == Path("org/model")


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no/such", "a/b/c"])
def test_missing_directories(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_model(EngineConfig(model=name))


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_files_are_no_models(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedModelError, match=r"directory with config\.json"):
        resolve_model(EngineConfig(model=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["no spaces/here", "-x", "what?"])
def test_what_no_repository_is_called(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no id of a repository"):
        resolve_model(EngineConfig(model=name))


def test_downloads_what_is_read_and_nothing_else(options: dict[str, Any], hub: Hub) -> None:
    path = resolve_model(EngineConfig(model="me/tiny", **options))
    assert names_in(path) == WANTED
    assert (path / "model.safetensors").read_bytes() == b"weights of main"
    assert path.is_relative_to(options["download_dir"])
    assert any("/me/tiny/resolve/" in request for request in hub.requests)


def test_dummy_weights_need_no_weights(options: dict[str, Any], hub: Hub) -> None:
    path = resolve_model(EngineConfig(model="me/tiny", dummy_weights=True, **options))
    assert names_in(path) == [name for name in WANTED if not name.endswith("safetensors")]
    assert not any("safetensors" in request for request in hub.requests)


@pytest.mark.parametrize("pickled", [False, True])
def test_speech_models_come_with_their_autoencoder(
    options: dict[str, Any], hub: Hub, pickled: bool
) -> None:
    hub.files = FILES | {"audiovae.pth": b"an autoencoder"}
    wanted = [*WANTED, "audiovae.pth"]
    if pickled:  # as the first release is, and only then
        del hub.files["model.safetensors"]
        wanted[wanted.index("model.safetensors")] = "pytorch_model.bin"
    hub.files.pop("consolidated.safetensors")
    config = EngineConfig(model="me/tiny", **options)
    path = resolve_model(config)
    assert names_in(path) == sorted(wanted)
    assert resolve_model(replace(config, local_files_only=True)) == path


@pytest.mark.parametrize("revision", ["v2", sha("v2")])
def test_revision(options: dict[str, Any], revision: str) -> None:
    path = resolve_model(EngineConfig(model="me/tiny", revision=revision, **options))
    assert (path / "model.safetensors").read_bytes() == b"weights of v2"
    with pytest.raises(FileNotFoundError, match="no revision 'v3'"):
        resolve_model(EngineConfig(model="me/tiny", revision="v3", **options))


def test_what_is_cached_is_used_offline(options: dict[str, Any], hub: Hub) -> None:
    offline = EngineConfig(model="me/tiny", local_files_only=True, **options)
    with pytest.raises(FileNotFoundError, match=r"not \(completely\) downloaded"):
        resolve_model(offline)
    path = resolve_model(EngineConfig(model="me/tiny", **options))
    hub.requests.clear()
    assert resolve_model(offline) == path
    assert hub.requests == []
    hub.down = True
    assert resolve_model(EngineConfig(model="me/tiny", **options)) == path


@pytest.mark.parametrize("name", ["me/private", "me/gated"])
def test_token(options: dict[str, Any], name: str) -> None:
    with pytest.raises(PermissionError, match=r"pass a token .* hf_token="):
        resolve_model(EngineConfig(model=name, **options))
    path = resolve_model(EngineConfig(model=name, **options | {"hf_token": TOKEN}))
    assert names_in(path) == WANTED


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_missing_repository(options: dict[str, Any], token: str | None) -> None:
    """Without a token, the hub answers 401 to what it does not have."""
    options["hf_token"] = token
    with pytest.raises(FileNotFoundError, match="no model 'me/typo' at revision 'v2'"):
        resolve_model(EngineConfig(model="me/typo", revision="v2", **options))


def test_hub_that_is_down_or_not_there(options: dict[str, Any], hub: Hub) -> None:
    hub.down = True
    with pytest.raises(ConnectionError, match="check the network and endpoint="):
        resolve_model(EngineConfig(model="me/tiny", **options))
    options["endpoint"] = "http://127.0.0.1:9"
    with pytest.raises(ConnectionError, match="cannot download model 'me/tiny'") as caught:
        resolve_model(EngineConfig(model="me/tiny", **options))
    assert caught.value.__cause__ is not None


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model="me/tiny", model_source="modelscope", revision="v2")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match="pip install modelscope"):
        resolve_model(config)
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(model_id: str, **arguments: Any) -> str:
        calls.append((model_id, arguments))
        if len(calls) > 1:
            raise ValueError("no such thing")
        return str(tmp_path)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert resolve_model(config) == tmp_path
    assert calls[0][0] == "me/tiny"
    assert calls[0][1]["revision"] == "v2"
    with pytest.raises(ConnectionError, match="from modelscope: ValueError"):
        resolve_model(config)
    offline = EngineConfig(model="me/tiny", model_source="modelscope", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="downloads are off"):
        resolve_model(offline)
