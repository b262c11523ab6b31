"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm.server.tokens import _spelled
from tests.fake_llm import FakeLLM
from tests.server_client import HI


def test_there_and_back(client: TestClient) -> None:
    text = "Once upon a time <|im_end|> é😀\n"
    body = client.post("/tokenize", json={"prompt": text}).json()
    assert body["count"] == len(body["tokens"])
    assert (body["max_model_len"], body["token_strs"]) == (256, None)
    response = client.post("/detokenize", json={"model": "demo_model", "tokens": body["tokens"]})
    assert response.json() == {"prompt": text}


def test_vocabulary_entries(client: TestClient) -> None:
    body = client.post("/tokenize", json={"prompt": "Once upon", "return_token_strs": True}).json()
    assert body["token_strs"] == ["Once", "Ġupon"]


def test_a_long_text_is_spelled_out_in_a_thread_and_looked_at_once(
    client: TestClient, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte kept everybody waiting for a quarter of a second."""
    threads: set[str] = set()

    def spell(*given: Any) -> list[str]:
        threads.add(threading.current_thread().name)
        return _spelled(*given)

    monkeypatch.setattr("nanovllm.server.tokens._spelled", spell)
    monkeypatch.setattr(
        "fastapi.routing.serialize_response", lambda **_: pytest.fail("validated again")
    )
    body = {"prompt": "Once upon " * 2000, "return_token_strs": True}
    tokenized = client.post("/tokenize", json=body).json()
    assert len(tokenized["tokens"]) == len(tokenized["token_strs"]) == tokenized["count"] > 4000
    assert all(name.startswith("asyncio_") for name in threads)
    assert threads


def test_a_conversation_is_what_chat_makes_of_it(client: TestClient, llm: FakeLLM) -> None:
    client.post("/v1/chat/completions", json={"messages": HI})
    body = client.post("/tokenize", json={"messages": HI, "return_token_strs": True}).json()
    assert body["tokens"] == llm.submitted[0][0].token_ids
    assert body["token_strs"][0] == "<|im_start|>"
    closed = {"messages": HI, "add_generation_prompt": False}
    assert client.post("/tokenize", json=closed).json()["count"] < body["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages.0.role"),
        ("/tokenize", {"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [2**40]}, "tokens.0"),
        ("/detokenize", {"tokens": [1, 4096]}, "tokens"),
    ],
)
def test_refused_by_name(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_an_unknown_model(client: TestClient) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert client.post(path, json={"model": "gpt-4", **body}).status_code == 404


def test_info(client: TestClient) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == info["pad_token"] == "<|endoftext|>"
    assert info["bos_token"] is None
    assert "<|im_start|>" in info["chat_template"]
    assert info["vocab_size"] == 4096


def test_a_model_without_tokenizer(client: TestClient, llm: FakeLLM) -> None:
    llm.tokenizer = None
    response = client.get("/tokenizer_info")
    assert response.status_code == 400
    assert "no tokenizer" in response.json()["error"]["message"]
