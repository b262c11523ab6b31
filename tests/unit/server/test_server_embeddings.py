"""`/v1/embeddings` and Ollama's `/api/embed`: their words, and what is refused."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from nanovllm.text.embeddings import embedding_of
from tests.fake_llm import FakeLLM, state_of
from tests.server_client import build, post, refused

PATH = "/v1/embeddings"


def expected(llm: FakeLLM, prompt: str | list[int], dimensions: int | None = None) -> np.ndarray:
    ids = llm.frontend.encode(prompt) if isinstance(prompt, str) else prompt
    return embedding_of(state_of(ids, llm.model_config.hidden_size), dimensions)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("The king", ["The king"]),
        (["The king", "A wolf"], ["The king", "A wolf"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], "The king"], [[5, 6], "The king"]),
    ],
)
def test_texts_and_ids(client: TestClient, llm: FakeLLM, given: Any, prompts: list[Any]) -> None:
    answer = post(client, PATH, input=given)
    assert answer["object"] == "list"
    assert answer["model"] == "demo_model"
    assert [item["object"] for item in answer["data"]] == ["embedding"] * len(prompts)
    assert [item["index"] for item in answer["data"]] == list(range(len(prompts)))
    for item, prompt in zip(answer["data"], prompts, strict=True):
        np.testing.assert_allclose(item["embedding"], expected(llm, prompt), atol=1e-6)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 * len(prompts)}
    num_tokens = sum(len(llm.frontend.encode(p)) if isinstance(p, str) else len(p) for p in prompts)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (num_tokens, num_tokens)
    assert llm.num_open == 0
    assert all(item.params.max_tokens == 1 for item, _, _ in llm.submitted)


def test_many_texts_do_not_fill_the_queue(client: TestClient, llm: FakeLLM) -> None:
    llm.config = replace(llm.config, max_num_seqs=3)
    answer = post(client, PATH, input=[[i] for i in range(100)])
    assert [item["index"] for item in answer["data"]] == list(range(100))
    assert llm.most_open == 3
    assert answer["usage"]["prompt_tokens"] == 100
    for number in (0, 50, 99):
        np.testing.assert_allclose(
            answer["data"][number]["embedding"], expected(llm, [number]), atol=1e-6
        )


def test_base64_is_little_endian_float32(client: TestClient, llm: FakeLLM) -> None:
    answer = post(client, PATH, input="The king", encoding_format="base64", dimensions=7)
    numbers = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(numbers, expected(llm, "The king", 7))


def test_what_else_a_request_may_say(client: TestClient, llm: FakeLLM) -> None:
    body = {"input": "A king " * 300, "truncate_prompt_tokens": 9, "priority": 3, "user": "me"}
    response = client.post(PATH, json=body | {"cache_salt": "s"}, headers={"X-Request-Id": "my-id"})
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == "my-id"
    assert response.json()["id"] == "embd-my-id"
    ((item, priority, salt),) = llm.submitted
    assert (len(item.token_ids), priority, salt) == (9, 3, "s")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "a " * 300}, "input"),
        ({"input": [4096]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 100_000}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "normalize": False}, "normalize"),
    ],
)
def test_what_is_refused(
    client: TestClient, llm: FakeLLM, body: dict[str, Any], param: str
) -> None:
    error = refused(client, PATH, **body)
    assert error["param"].split(".")[0] == param, error
    assert not llm.submitted


def test_requests_that_are_ended(client: TestClient, llm: FakeLLM) -> None:
    llm.delay = 0.5
    for name, ended_by in (("one", "one"), ("two", "embd-two")):
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(
                client.post, PATH, json={"input": "a"}, headers={"X-Request-Id": name}
            )
            while not post(client, "/abort", request_id=ended_by)["aborted"]:
                time.sleep(0.01)
            assert answer.result().status_code == 400
            assert "was ended before it was done" in answer.result().text
    assert llm.num_open == 0


def test_models_and_failures(client: TestClient, llm: FakeLLM) -> None:
    assert client.post(PATH, json={"input": "a", "model": "x"}).status_code == 404
    llm.fail_after, llm.failure = 0, "the runner broke"
    response = client.post(PATH, json={"input": "a"})
    assert response.status_code == 500
    assert "runner" not in response.text
    llm.overloaded = True
    assert client.post(PATH, json={"input": "a"}).status_code == 503


def test_adapters_have_names_as_elsewhere() -> None:
    llm = FakeLLM(enable_lora=True)
    llm.loras["tales"] = "/nowhere"
    client = TestClient(build(llm))
    assert post(client, PATH, input="a", model="tales")["model"] == "tales"
    assert llm.adapted == ["tales"]


def test_ollama(client: TestClient, llm: FakeLLM) -> None:
    answer = post(client, "/api/embed", model="demo_model:latest", input=["The king", "A wolf"])
    assert answer["model"] == "demo_model:latest"
    for embedding, prompt in zip(answer["embeddings"], ["The king", "A wolf"], strict=True):
        np.testing.assert_allclose(embedding, expected(llm, prompt), atol=1e-6)
    assert answer["prompt_eval_count"] == sum(len(item.token_ids) for item, _, _ in llm.submitted)
    assert answer["total_duration"] > 0
    long = "A king " * 300
    answer = post(client, "/api/embed", model="demo_model", input=long, dimensions=9)
    assert [len(embedding) for embedding in answer["embeddings"]] == [9]
    response = client.post(
        "/api/embed", json={"model": "demo_model", "input": long, "truncate": False}
    )
    assert response.status_code == 400
    assert "maximum context length" in response.json()["error"]
    for nothing in ("", list[str]()):  # so clients have a model loaded
        assert post(client, "/api/embed", model="demo_model", input=nothing)["embeddings"] == []
