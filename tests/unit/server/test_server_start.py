"""How the server starts: its command line, its application, its logs."""

import asyncio
import importlib
import json
import logging
import os
import resource
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm.cli import main
from nanovllm.config import EngineConfig, PoolConfig, ServerConfig, SpeechConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.server.adapters import LoRAModule, lora_modules
from nanovllm.server.app import create_app
from nanovllm.server.listening import open_sockets
from nanovllm.server.loading import load_models
from nanovllm.server.logs import JSONFormatter, configure_logging
from nanovllm.server.serve import MAX_FILES, _raise_file_limit, serve
from tests.fake_llm import FakeLLM
from tests.fake_speech import FakeSpeech

KEY = "sk-one"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, Any, Any]]:
    """Run `nanovllm serve` up to the point where it would serve; return its options."""
    for variable in ("API_KEY", "MODEL", "PORT", "HOST"):
        monkeypatch.delenv(f"NANOVLLM_{variable}", raising=False)
    given: list[Any] = []

    def remember(*options: Any) -> int:
        given.append(options)
        return 0

    monkeypatch.setattr("nanovllm.server.serve.serve", remember)

    def run(*arguments: str) -> tuple[Any, Any, Any, Any]:
        with pytest.raises(SystemExit) as caught:
            main(["serve", *arguments])
        assert caught.value.code == 0
        options: tuple[Any, Any, Any, Any] = given.pop()
        return options

    return run


Served = Callable[..., tuple[ServerConfig, EngineConfig, PoolConfig, SpeechConfig]]


class TestCommandLine:
    def test_adapters(self, served: Served, tmp_path: Path) -> None:
        module = '{"name": "c", "path": "/c", "base_model_name": "x"}'
        server, engine, *_ = served("--enable-lora", "--lora-modules", "a=/a", "b=/b", module)
        assert engine.enable_lora
        assert server.lora_modules == ["a=/a", "b=/b", module]
        file = tmp_path / "options.yaml"
        for written in ("{a: /a, b: /b}", "[a=/a, {name: b, path: /b}]"):
            file.write_text(f"lora-modules: {written}", encoding="utf-8")
            server, *_ = served("--enable-lora", "--config", str(file))
            named = lora_modules(server, EngineConfig(enable_lora=True))
            assert named == [LoRAModule("a", "/a"), LoRAModule("b", "/b")]

    def test_flags_of_all_three(self, served: Served) -> None:
        server, engine, pool, _ = served(
            "some/model",
            *("--served-model-name", "a", "b", "--api-key", "k", "--api-key", "l"),
            *("--port", "0", "--max-model-len", "128", "--no-enable-prefix-caching"),
            *("--devices", "0,1", "--dispatch-policy", "rr"),
        )
        assert engine.model == "some/model"
        assert (engine.max_model_len, engine.enable_prefix_caching) == (128, False)
        assert (server.served_model_name, server.api_key) == (["a", "b"], ["k", "l"])
        assert server.port == 0
        assert (pool.devices, pool.dispatch_policy) == ([0, 1], "rr")

    def test_a_speech_model_beside_it(self, served: Served) -> None:
        _, engine, _, speech = served(
            *("writer", "--speech-model", "speaker", "--speech-devices", "1,2", "--voices=v"),
            *("--speech-quantization=int8", "--max-num-seqs=3", "--device=cuda"),
        )
        assert (speech.speech_model, speech.speech_devices, speech.voices) == (
            "speaker",
            [1, 2],
            "v",
        )
        beside = speech.engine(engine)
        assert (beside.model, beside.quantization, beside.device) == ("speaker", "int8", "cuda")
        assert (beside.max_num_seqs, engine.model, engine.quantization) == (None, "writer", None)

    def test_nothing_given(self, served: Served) -> None:
        server, engine, pool, _ = served()
        assert (server, engine) == (ServerConfig(), EngineConfig())
        assert (pool.devices, pool.replicas) == (None, 1)
        assert server.host == "127.0.0.1"

    def test_the_model_by_flag_and_the_familys_names(self, served: Served) -> None:
        _, engine, pool, _ = served(
            "--model=m", "--max-running-requests", "3", "--data-parallel-size=2"
        )
        assert (engine.model, engine.max_num_seqs, pool.replicas) == ("m", 3, 2)

    def test_the_environment_and_a_file(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.setenv("NANOVLLM_API_KEY", "a,b")
        monkeypatch.setenv("NANOVLLM_PORT", "1234")
        monkeypatch.setenv("NANOVLLM_REPLICAS", "2")
        monkeypatch.setenv("NANOVLLM_MAX_NUM_SEQS", "5")
        options = tmp_path / "options.yaml"
        options.write_text("port: 4321\nmodel: m\nserved-model-name: [x, y]\nqueue_timeout: 3\n")
        server, engine, pool, _ = served("--config", str(options), "--max-num-seqs", "6")
        assert (server.api_key, server.port) == (["a", "b"], 4321)
        assert server.served_model_name == ["x", "y"]
        assert (engine.model, engine.max_num_seqs) == ("m", 6)
        assert (pool.replicas, pool.queue_timeout) == (2, 3)

    def test_a_file_may_have_lists_and_objects(self, served: Served, tmp_path: Any) -> None:
        options = tmp_path / "options.yaml"
        options.write_text(
            "warm_prefixes: [Once, upon a]\n"
            "default-chat-template-kwargs:\n  enable_thinking: false\n"
        )
        server, _, pool, _ = served("--config", str(options))
        assert pool.warm_prefixes == "Once||upon a"
        assert server.default_chat_template_kwargs == '{"enable_thinking": false}'
        options.write_text("warm_prefixes: a||b\n")
        assert served("--config", str(options))[2].warm_prefixes == "a||b"

    def test_the_argument_wins_over_the_file(self, served: Served, tmp_path: Any) -> None:
        options = tmp_path / "options.yaml"
        options.write_text("model: a\n")
        assert served("b", "--config", str(options))[1].model == "b"
        assert served("b", "--model", "b")[1].model == "b"

    def test_an_unknown_name_in_a_file(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Any
    ) -> None:
        options = tmp_path / "options.yaml"
        options.write_text("max_model_length: 3\n")
        with pytest.raises(SystemExit):
            main(["serve", "--config", str(options)])
        shown = capsys.readouterr().err
        assert '"max_model_length"' in shown
        assert "--max-model-len?" in shown
        assert "[" not in shown

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["a", "--model", "b"], "the model is given twice: a and b"),
            (["--ssl-keyfile", "x"], "ssl_keyfile needs ssl_certfile"),
            (["--ssl-certfile", "/nowhere/x"], "ssl_certfile: /nowhere/x: No such file"),
            (
                ["--ssl-certfile", __file__, "--ssl-keyfile", "/nowhere/x"],
                "ssl_keyfile: /nowhere/x: No such file",
            ),
            (["--ssl-certfile", __file__], f"{__file__} are no PEM files"),
            (["--uds", "/nowhere/x"], "uds: /nowhere/x: No such file"),
            (["--uds", __file__], f"uds: {__file__}: "),
            (["--default-chat-template-kwargs", '{"tokenize": 1}'], "not have 'tokenize'"),
            (["--max-model-length", "3"], "--max-model-len"),
            (["--port", "70000"], "port must be in [0, 65535], got 70000"),
            (["--replicas", "0"], "replicas must be at least 1"),
            (["--log-format", "xml"], "log-format"),
        ],
    )
    def test_mistakes(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["serve", *arguments])
        assert caught.value.code == 2
        shown = capsys.readouterr().err
        assert says in shown
        assert shown.count("\n") == 1


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take "speaker" for a model that speaks and start none; return what is done with them."""
    events: list[str] = []

    def stand_in(fake: type[Any]) -> type[Any]:
        class Starting(fake):  # type: ignore[misc]
            @classmethod
            def from_config(cls, *_: Any) -> Any:
                return cls()

            async def start(self) -> None:
                events.append(f"start {self.model_id}")

            async def close(self, force: bool = False) -> None:
                events.append(f"close {self.model_id}")

        return Starting

    loading = "nanovllm.server.loading"
    monkeypatch.setattr(f"{loading}._speaks", lambda engine: engine.model == "speaker")
    monkeypatch.setattr(f"{loading}.AsyncLLM", stand_in(FakeLLM))
    monkeypatch.setattr(f"{loading}.AsyncSpeech", stand_in(FakeSpeech))
    return events


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestApplication:
    def test_importing_it_starts_nothing_and_app_is_what_the_environment_says(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = importlib.import_module("nanovllm.server.app")
        assert "app" in dir(module)
        monkeypatch.setenv("NANOVLLM_API_KEY", KEY)
        module._app_of_environment.cache_clear()
        try:
            app = module.app
            assert app is module.app
            assert app.state.server.config.api_key == [KEY]
            assert not app.state.server.loaded
        finally:
            module._app_of_environment.cache_clear()
        with pytest.raises(AttributeError):
            _ = module.nothing

    def test_no_key_in_what_is_shown_of_the_options(self) -> None:
        assert KEY not in repr(ServerConfig(api_key=[KEY]))

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            (("writer", SpeechConfig()), ["demo_model"]),
            (("speaker", SpeechConfig()), ["voxcpm"]),
            (("writer", SpeechConfig(speech_model="speaker")), ["demo_model", "voxcpm"]),
        ],
    )
    def test_it_starts_and_closes_its_models(
        self, models: list[str], options: tuple[str, SpeechConfig], names: list[str]
    ) -> None:
        engine = EngineConfig(model=options[0])
        app = create_app(ServerConfig(), engine, PoolConfig(), options[1])
        with TestClient(app) as client:
            wait_until(lambda: client.get("/ready").status_code == 200)
            listed = client.get("/v1/models").json()["data"]
            assert [model["id"] for model in listed] == names
        assert models == [f"start {name}" for name in names] + [f"close {name}" for name in names]

    @pytest.mark.parametrize(
        ("model", "speech", "says"),
        [
            ("speaker", SpeechConfig(speech_model="speaker"), "speaks already"),
            (
                "writer",
                SpeechConfig(speech_model="some/writer"),
                "speech_model some/writer is no speech model: give a checkpoint of VoxCPM",
            ),
            ("writer", SpeechConfig(voices="/v"), "there is none"),
            ("speaker", SpeechConfig(default_voice="ann"), "'ann' is none of the voices"),
            ("speaker", SpeechConfig(voices="/no/such/voices"), "/no/such/voices"),
            (
                "writer",
                SpeechConfig(speech_model="speaker", speech_served_model_name=["demo_model"]),
                "two models are called 'demo_model'",
            ),
        ],
    )
    def test_models_that_do_not_go_together(
        self, models: list[str], model: str, speech: SpeechConfig, says: str
    ) -> None:
        app = create_app(ServerConfig(), EngineConfig(), PoolConfig(), speech)
        with pytest.raises((ValueError, OSError), match=says):
            asyncio.run(load_models(app.state.server, EngineConfig(model=model), PoolConfig()))
        assert not models


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    names = (None, "nanovllm", "uvicorn", "uvicorn.access")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_logging_as_before")
class TestLogs:
    def test_one_object_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging(ServerConfig(log_format="json"))
        logger = logging.getLogger("nanovllm.x")
        logger.info("two\nlines of %s", "text")
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("failed")
        logging.getLogger("uvicorn.error").warning("theirs")
        logging.getLogger("uvicorn.error").info("unsaid")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [line["message"] for line in lines] == ["two\nlines of text", "failed", "theirs"]
        assert lines[0]["level"] == "info"
        assert lines[0]["logger"] == "nanovllm.x"
        assert "ValueError: why" in lines[1]["exception"]

    def test_nothing_of_requests_that_are_cut_off_at_the_end(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        configure_logging(ServerConfig())
        logger = logging.getLogger("uvicorn.error")
        logger.error("Cancel 3 running task(s)")
        logger.error("Exception in ASGI application", exc_info=asyncio.CancelledError())
        logger.error("Exception in ASGI application", exc_info=KeyError("x"))
        said = capsys.readouterr().err
        assert "Cancel 3" in said
        assert "CancelledError" not in said
        assert "KeyError" in said

    def test_a_record_that_cannot_be_encoded(self) -> None:
        record = logging.LogRecord("x", logging.INFO, "", 0, "\ud800", None, None)
        assert json.loads(JSONFormatter().format(record))["message"] == "\ud800"


class TestServe:
    @pytest.fixture(autouse=True)
    def _not_for_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nanovllm.server.serve.configure_logging", lambda config: None)
        monkeypatch.setattr("nanovllm.server.serve.DrainingServer.run", lambda self, sockets: None)
        monkeypatch.setattr("nanovllm.server.serve.open_sockets", lambda server: [])

    @pytest.mark.parametrize(
        ("options", "warned"),
        [
            ({"host": "0.0.0.0"}, True),
            ({"host": "example.org"}, True),
            ({"host": "::"}, True),
            ({"host": "0.0.0.0", "api_key": [KEY]}, False),
            ({"host": "127.0.0.2"}, False),
            ({"host": "::1"}, False),
            ({"host": "localhost"}, False),
            ({"host": "0.0.0.0", "uds": f"/tmp/nanovllm-{os.getpid()}"}, False),
        ],
    )
    def test_a_warning_where_everybody_may_come(
        self, caplog: pytest.LogCaptureFixture, options: dict[str, Any], warned: bool
    ) -> None:
        assert serve(ServerConfig(**options), EngineConfig(), PoolConfig()) == 0
        assert ("--api-key" in caplog.text) == warned


class TestListening:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
    def test_a_port_that_is_taken(self, host: str) -> None:
        (first, *others) = open_sockets(ServerConfig(host=host, port=0))
        port = first.getsockname()[1]
        with pytest.raises(InvalidRequestError) as error:
            open_sockets(ServerConfig(host=host, port=port))
        assert str(error.value) == f"port {port} is in use: choose another with --port"
        for sock in (first, *others):
            sock.close()
        for sock in open_sockets(ServerConfig(host=host, port=port)):
            sock.close()

    @pytest.mark.parametrize(
        ("host", "says"),
        [
            ("999.1.1.1", "host '999.1.1.1' is unknown: "),
            ("a" * 70, "is unknown: "),
            ("192.0.2.1", "host '192.0.2.1' cannot be listened on: "),
        ],
    )
    def test_a_host_that_is_not_here(self, host: str, says: str) -> None:
        with pytest.raises(InvalidRequestError, match=says) as error:
            open_sockets(ServerConfig(host=host, port=0))
        assert error.value.param == "host"

    def test_an_address_that_the_machine_lacks_is_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0))
            for host in ("192.0.2.1", "127.0.0.1", "127.0.0.1")
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: found)
        (sock,) = open_sockets(ServerConfig(host="localhost"))
        assert sock.getsockname()[0] == "127.0.0.1"
        sock.close()

    def test_a_socket_is_replaced_only_if_nobody_listens_there(self, tmp_path: Path) -> None:
        server = ServerConfig(uds=str(tmp_path / "u.sock"))
        (first,) = open_sockets(server)
        assert stat.S_IMODE(os.stat(tmp_path / "u.sock").st_mode) == 0o666
        os.chmod(tmp_path / "u.sock", 0o600)
        with pytest.raises(InvalidRequestError, match="another server listens there"):
            open_sockets(server)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(server.uds or "")
        first.close()
        (second,) = open_sockets(server)
        assert stat.S_IMODE(os.stat(tmp_path / "u.sock").st_mode) == 0o600
        second.close()


def test_the_server_needs_no_torch() -> None:
    import subprocess

    code = "import nanovllm.server.serve, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [
        (1024, 1 << 30, MAX_FILES),
        (1 << 30, 1 << 30, MAX_FILES),
        (1024, 4096, 4096),
        (1024, resource.RLIM_INFINITY, MAX_FILES),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, MAX_FILES),
    ],
)
def test_the_number_of_files_is_bounded_whatever_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    assert _raise_file_limit() == wanted
