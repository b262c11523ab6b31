"""`/v1/completions`, over a model that says what it is told to."""

import math
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm.server import generation
from nanovllm.server.openai import completions
from nanovllm.server.openai import logprobs as formats
from tests.fake_llm import EOS, FakeLLM, share_of
from tests.server_client import CHAT, HI, TEXT, post, refused, stream

LONG = [{"role": "user", "content": "x" * 1000}]


def test_a_whole_answer(client: TestClient) -> None:
    body = post(client, TEXT, prompt="Once")
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "text": " upon a time",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]


def test_a_stream_says_the_same(client: TestClient) -> None:
    chunks = stream(client, TEXT, prompt="Once")
    assert "".join(c["choices"][0]["text"] for c in chunks) == " upon a time"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [
        ("Once", 1),
        ([2182, 686], 1),
        (["Once", "Twice"], 2),
        ([[2182], [686, 258], [1]], 3),
        (["Once", [686]], 2),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_prompts(
    client: TestClient, llm: FakeLLM, prompt: Any, num_prompts: int, streams: bool
) -> None:
    if streams:
        chunks = stream(client, TEXT, prompt=prompt, n=2)
        ended = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
        assert sorted(ended) == list(range(2 * num_prompts))
    else:
        body = post(client, TEXT, prompt=prompt, n=2)
        assert [c["index"] for c in body["choices"]] == list(range(2 * num_prompts))
        assert body["usage"]["completion_tokens"] == 8 * num_prompts
    assert len(llm.submitted) == num_prompts
    assert llm.num_open == 0


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("prompt", ["Once", [2182]])
def test_echo(client: TestClient, prompt: Any, streams: bool) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2}
    if streams:
        chunks = [c["choices"][0] for c in stream(client, TEXT, **body)]
    else:
        chunks = post(client, TEXT, **body)["choices"]
    assert "".join(chunk["text"] for chunk in chunks) == "Once upon a"
    joined: dict[str, list[Any]] = {}
    for logprobs in (chunk["logprobs"] for chunk in chunks if chunk["logprobs"]):
        for name, values in logprobs.items():
            joined.setdefault(name, []).extend(values)
    assert joined["tokens"] == ["Once", " upon", " a"]
    assert joined["token_logprobs"] == [None, -1.0, -1.0]
    assert joined["top_logprobs"] == [
        None,
        {" upon": -1.0, "per": -0.5},
        {" a": -1.0, "per": -0.5},
    ]
    assert joined["text_offset"] == [0, 4, 9]


@pytest.mark.parametrize("streams", [False, True])
def test_chosen_tokens_are_scored_in_place_of_the_likeliest(
    client: TestClient, streams: bool
) -> None:
    """Besides the token that was taken; what is echoed has the likeliest."""
    read = stream if streams else lambda *a, **body: [post(*a, **body)]
    wanted = [2182, 258]
    body = {"logprob_token_ids": wanted, "return_tokens_as_token_ids": True, "max_tokens": 2}
    chosen = {f"token_id:{i}": math.log(share_of(i)) for i in wanted}

    text = {"prompt": "Once", "logprobs": 1, "echo": True}
    parts = [chunk["choices"][0]["logprobs"] for chunk in read(client, TEXT, **text, **body)]
    positions = [position for part in parts if part for position in part["top_logprobs"]]
    first, second = positions[1:]
    assert positions[0] is None
    assert first == {"token_id:686": -1.0, **chosen}
    assert second == chosen | {"token_id:258": -1.0}

    chat = {"messages": HI, "logprobs": True, "top_logprobs": 1}
    choices = [c for chunk in read(client, CHAT, **chat, **body) for c in chunk["choices"]]
    told = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
    tops = [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in told]
    assert tops == [first, second]


def test_chosen_tokens_of_what_adds_no_text(client: TestClient, llm: FakeLLM) -> None:
    llm.reply_ids = llm.frontend.encode("\U0001f600")[:1]  # a byte of a character
    body = {"messages": HI, "logprobs": True, "logprob_token_ids": [5], "max_tokens": 1}
    (told,) = post(client, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert len(told["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "Once"}),
        (TEXT, {"prompt": "Once", "logprobs": 1, "echo": True, "max_tokens": 0}),
        (TEXT, {"prompt": "Once", "logprobs": 1, "logprob_token_ids": [3, 3]}),
        (TEXT, {"prompt": "Once", "logprobs": 1, "logprob_token_ids": [10**8]}),
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": HI, "logprobs": True, "logprob_token_ids": list(range(129))}),
    ],
)
def test_tokens_that_cannot_be_scored(client: TestClient, path: str, body: dict[str, Any]) -> None:
    error = refused(client, path, **{"logprob_token_ids": [3], **body})
    assert error["param"] == "logprob_token_ids"


def test_no_chosen_tokens_are_the_likeliest(client: TestClient) -> None:
    body = {"prompt": "Once", "logprobs": 1, "max_tokens": 1, "logprob_token_ids": []}
    assert post(client, TEXT, **body)["choices"][0]["logprobs"]["top_logprobs"] == [
        {" upon": -1.0, "per": -0.5}
    ]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("prompt", ["The 漢字 story", "a 😀漢é b", "Once<|im_end|>\n upon"])
def test_offsets_index_into_the_text(
    client: TestClient, llm: FakeLLM, prompt: str, as_ids: bool, streams: bool
) -> None:
    llm.reply_ids = llm.frontend.encode(" so 字<|im_end|>é!")
    body = {"prompt": prompt, "max_tokens": 30, "echo": True, "logprobs": 0}
    body |= {"return_tokens_as_token_ids": as_ids, "ignore_eos": True}
    if streams:
        choices = [c["choices"][0] for c in stream(client, TEXT, **body)]
    else:
        choices = post(client, TEXT, **body)["choices"]
    text = "".join(choice["text"] for choice in choices)
    offsets = [i for c in choices if c["logprobs"] for i in c["logprobs"]["text_offset"]]
    prompt_ids = llm.frontend.encode(prompt)
    assert len(offsets) == len(prompt_ids) + 30
    assert offsets == sorted(offsets)
    assert offsets[len(prompt_ids)] == len(prompt)
    assert llm.tokenizer is not None
    ids = prompt_ids + [*llm.reply_ids, EOS] * 30
    for token_id, begin, end in zip(ids, offsets, offsets[1:], strict=False):
        if end > begin and "\ufffd" not in (name := llm.tokenizer.token_text(token_id)):
            assert text[begin:end] == name


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("scored", [{"logprobs": 1}, {"prompt_logprobs": 1}, {"logprobs": None}])
def test_a_prompt_is_written_down_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, streams: bool, scored: dict[str, Any]
) -> None:
    """For each of 128 completions it took minutes, and nobody else had a turn."""
    lengths: list[int] = []
    for name in ("echoed_logprobs", "prompt_logprobs"):

        def counted(*given: Any, name: str = name) -> Any:
            if given[0] is not None:
                lengths.append(len(given[0]))
            return getattr(formats, name)(*given)

        monkeypatch.setattr(completions, name, counted)
    monkeypatch.setattr(formats, "AT_ONCE", 2)
    body = {"prompt": ["Once upon a time", "Once"], "n": 3, "echo": True, "max_tokens": 1, **scored}
    if streams and "prompt_logprobs" not in scored:
        opened: dict[int, Any] = {}
        for chunk in stream(client, TEXT, **body):
            opened.setdefault(chunk["choices"][0]["index"], chunk["choices"][0])
        choices = [opened[index] for index in range(6)]
    else:
        choices = post(client, TEXT, **body)["choices"]
    assert all(choice["text"].startswith("Once upon a time") for choice in choices[:3])
    assert all(choice["text"].startswith("Once") for choice in choices[3:])
    assert sorted(lengths) == ([] if scored == {"logprobs": None} else [1, 4])
    if scored == {"prompt_logprobs": 1}:
        assert [len(choice["prompt_logprobs"]) for choice in choices] == [4, 4, 4, 1, 1, 1]
    elif scored == {"logprobs": 1}:
        told = [choice["logprobs"]["tokens"][:4] for choice in choices]
        assert told[:3] == [["Once", " upon", " a", " time"]] * 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_logprobs": 9, "n": 2}, "n"),
        ({"echo": True, "logprobs": 9, "prompt": [[1] * 50, [2] * 51]}, "prompt"),
    ],
)
def test_more_scores_of_prompts_than_an_answer_takes(
    client: TestClient,
    llm: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    param: str,
) -> None:
    monkeypatch.setattr(generation, "MAX_PROMPT_SCORES", 1000)
    error = refused(client, TEXT, **{"prompt": [1] * 51, "max_tokens": 1, **body})
    assert error["param"] == param
    assert "it takes 1000: lower n" in error["message"]
    assert not llm.submitted
    post(client, TEXT, **{"max_tokens": 1, **body, "prompt": [1] * 50})


@pytest.mark.parametrize("streams", [False, True])
def test_scoring_without_generating(client: TestClient, streams: bool) -> None:
    body = {"prompt": [2182, 686], "echo": True, "logprobs": 0, "max_tokens": 0}
    if streams:
        choices = [c["choices"][0] for c in stream(client, TEXT, **body)]
    else:
        choices = post(client, TEXT, **body)["choices"]
    assert choices[0]["text"] == "Once upon"
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.0]
    assert choices[0]["logprobs"]["top_logprobs"] == [None, {" upon": -1.0}]
    assert choices[-1]["finish_reason"] == "length"
    assert all(choice["text"] == "" for choice in choices[1:])


def test_scores_count_no_output(client: TestClient) -> None:
    usage = post(client, TEXT, prompt="Once", max_tokens=0)["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, 1)


def test_a_truncated_prompt_is_echoed_so(client: TestClient) -> None:
    choice = post(client, TEXT, prompt="Once upon a", truncate_prompt_tokens=1, echo=True)
    assert choice["choices"][0]["text"] == " a upon a time"


def test_tokens_called_by_id(client: TestClient) -> None:
    body = {"prompt": "Once", "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = post(client, TEXT, **body)["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "token_id:686"


def test_token_ids_of_a_stream(client: TestClient, llm: FakeLLM) -> None:
    choices = [c["choices"][0] for c in stream(client, TEXT, prompt="Once", return_token_ids=True)]
    assert choices[0]["prompt_token_ids"] == [2182]
    assert [i for c in choices for i in c.get("token_ids", [])] == [*llm.reply_ids, EOS]


def test_what_is_asked_for_reaches_the_engine(client: TestClient, llm: FakeLLM) -> None:
    post(
        client,
        TEXT,
        prompt="Once",
        temperature=0,
        top_k=5,
        min_p=0.1,
        seed=7,
        logit_bias={"12": -100, "13": 2.5},
        min_tokens=2,
        ignore_eos=True,
        max_tokens=6,
        stop_token_ids=[9],
        bad_words=["foo"],
        allowed_token_ids=[1, 2],
        priority=-3,
        cache_salt="pepper",
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    item, priority, cache_salt = llm.submitted[0]
    params = item.params
    assert (params.temperature, params.top_k, params.min_p, params.seed) == (0, 5, 0.1, 7)
    assert params.logit_bias == {12: -100, 13: 2.5}
    assert (params.min_tokens, params.max_tokens, params.ignore_eos) == (2, 6, True)
    assert (params.stop_token_ids, params.bad_words) == ([9], ["foo"])
    assert params.allowed_token_ids == [1, 2]
    assert (priority, cache_salt) == (-3, "pepper")
    assert not params.skip_special_tokens
    assert params.include_stop_str_in_output


def test_defaults_are_the_models(client: TestClient, llm: FakeLLM) -> None:
    post(client, TEXT, prompt="Once", top_p=None)
    params = llm.submitted[0][0].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.8, 0.95, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["a", [1, "b"]]}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 100, "prompt": ["a"] * 100}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"temperature": 1e308}, "temperature"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 256}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [686], "bad_words": ["upon"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
        (
            {"allowed_token_ids": [EOS, 5], "stop_token_ids": [5], "min_tokens": 1},
            "allowed_token_ids",
        ),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"echo": 1}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"suffix": ""}, "suffix"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"request_id": "a\r\nb"}, "request_id"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"model": 5}, "model"),
    ],
)
def test_refused_by_name(
    client: TestClient, llm: FakeLLM, body: dict[str, Any], param: str
) -> None:
    error = refused(client, TEXT, **{"prompt": "Once", **body})
    assert (error["param"] or "").startswith(param)
    assert param in error["message"] or error["code"] == "context_length_exceeded"
    assert not llm.submitted


def test_a_prompt_that_is_too_long(client: TestClient) -> None:
    error = refused(client, TEXT, prompt=[1] * 256)
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 256 tokens" in error["message"]
    assert error["param"] == "prompt"
    assert len(post(client, TEXT, prompt=[1] * 255)["choices"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": LONG}, "messages"),
        ("/v1/chat/completions", {"messages": HI, "max_completion_tokens": 999}, None),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 999}, None),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/responses", {"input": "Hi.", "max_output_tokens": 999}, None),
    ],
)
def test_who_asks_for_too_much_is_told_by_the_field_s_own_name(
    client: TestClient, path: str, body: dict[str, Any], param: str | None
) -> None:
    error = refused(client, path, **body)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == (param or list(body)[-1])


def test_all_prompts_or_none(client: TestClient, llm: FakeLLM) -> None:
    refused(client, TEXT, prompt=["Once", [9999]])
    assert not llm.submitted


def test_more_tokens_at_least_than_there_is_room_for(client: TestClient) -> None:
    error = refused(client, TEXT, prompt=[1] * 200, min_tokens=100)
    assert "you requested 300 tokens (200 in the prompt, 100" in error["message"]
