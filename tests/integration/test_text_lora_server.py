"""A server with adapters of text, as a process: what the options load, and what the admin does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import DEMO_MODEL
from tests.peft_oracle import EVERY_LAYER, greedy, merged, write_peft
from tests.serving import Server

PROMPT = list(range(300, 340))
NUM_TOKENS = 12
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate("abc"):
        write_peft(DEMO_MODEL, root / name, seed=seed, modules=EVERY_LAYER, lora_alpha=4)
    write_peft(DEMO_MODEL, root / "wide", r=40)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, list[int]]:
    models = {name: merged(DEMO_MODEL, root / name) for name in "abc"}
    return {name: greedy(model, PROMPT, NUM_TOKENS) for name, model in models.items()}


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    options: dict[str, Any] = {
        "dtype": "float32",
        "enable_lora": True,
        "max_loras": 2,
        "lora_modules": [f"a={root / 'a'}", f"b={root / 'b'}"],
        "lora_dir": root,
        "admin_key": "admin",
    }
    with Server(**options) as server:
        yield server


def tokens(server: Server, model: str) -> list[int]:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    status, answer = server.post("/v1/completions", body)
    assert (status, answer["model"]) == (200, model)
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def test_adapters_of_the_options(server: Server, expected: dict[str, list[int]]) -> None:
    models = server.get("/v1/models")[1]["data"]
    assert [(model["id"], model["parent"]) for model in models] == [
        *(("demo_model", None), ("a", "demo_model"), ("b", "demo_model"))
    ]
    found = {name: tokens(server, name) for name in ("a", "b")}
    assert found == {name: expected[name] for name in found}
    assert tokens(server, "demo_model") not in found.values()


def test_adapters_of_the_admin(server: Server, expected: dict[str, list[int]]) -> None:
    body = {"lora_name": "c", "lora_path": "c"}
    assert server.post("/v1/load_lora_adapter", body)[0] == 401
    assert server.post("/v1/load_lora_adapter", body, **ADMIN)[0] == 200
    assert tokens(server, "c") == expected["c"]
    status, answer = server.post("/v1/load_lora_adapter", body, **ADMIN)
    assert (status, answer["error"]["param"]) == (400, "lora_name")
    body = {"lora_name": "d", "lora_path": "wide"}
    status, answer = server.post("/v1/load_lora_adapter", body, **ADMIN)
    assert status == 400
    assert "of rank 40: it must be 1 to max_lora_rank=32" in answer["error"]["message"]
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "c"}, **ADMIN)[0] == 200
    status, answer = server.post("/v1/completions", {"model": "c", "prompt": "Once"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": False}, "lora_modules needs enable_lora"),
        ({"max_lora_rank": 2}, "lora_modules: 'a': "),
    ],
)
def test_options_that_cannot_be_met(root: Path, options: dict[str, Any], message: str) -> None:
    options = {"enable_lora": True, "lora_modules": [f"a={root / 'a'}"], **options}
    server = Server(wait=False, **options)
    try:
        assert server.process.wait(60) != 0
        assert message in server.log
        assert "Traceback" not in server.log
    finally:
        server.stop()
