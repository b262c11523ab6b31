"""Sampling parameters are validated once, with a message that says what is right."""

from typing import Any

import numpy as np
import pytest

from nanovllm import validation
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n must be at least 1, got 0"),
    ({"presence_penalty": 2.5}, "presence_penalty must be in [-2, 2], got 2.5"),
    ({"frequency_penalty": -3.0}, "frequency_penalty must be in [-2, 2], got -3.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0, got inf"),
    ({"temperature": -1.0}, "temperature must be non-negative and finite, got -1.0"),
    ({"temperature": float("nan")}, "temperature must be non-negative and finite, got nan"),
    ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    ({"top_p": 1.1}, "top_p must be in (0, 1], got 1.1"),
    ({"top_k": -2}, "top_k must be 0 or -1 (all), or at least 1, got -2"),
    ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5"),
    ({"min_p": float("nan")}, "min_p must be in [0, 1], got nan"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens=8, got 9"),
    ({"seed": 2**64}, f"seed must be a 64-bit integer, got {2**64}"),
    ({"logprobs": 21}, "logprobs must be 0 to 20, got 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be 0 to 20, got -1"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or >= 1, got 0"),
    ({"stop": ""}, "stop must be non-empty strings, got "),
    ({"stop": ["a", ""]}, "stop must be non-empty strings, got ['a', '']"),
    ({"stop": "a", "detokenize": False}, "stop strings need detokenize=True"),
    ({"bad_words": [""]}, "bad_words must be non-empty strings, got ['']"),
    ({"allowed_token_ids": []}, "allowed_token_ids must be None or not empty, got []"),
    (
        {"logit_bias": {1: float("nan")}},
        "logit_bias must be finite numbers, got {1: nan}",
    ),
    *(
        (
            {"logit_bias": biases},
            f"logit_bias must be a mapping of integers to numbers, got {biases}",
        )
        for biases in ({5.7: 1}, {True: 2}, {"x": 1}, {None: 1})
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**options)
    assert str(caught.value) == message
    assert caught.value.param in options


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_p": 1.0},
        {"top_k": -1},
        {"top_k": 1},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"max_tokens": None, "min_tokens": 100},
        {"min_tokens": 16},
        {"seed": 0},
        {"seed": -(2**63)},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"truncate_prompt_tokens": -1},
        {"logit_bias": {}, "bad_words": [], "stop": []},
        {"logit_bias": {np.int64(5): 1.0}},
    ],
)
def test_values_on_the_edge_are_taken(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert {name: getattr(params, name) for name in options} == options


def test_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()


def test_long_lists_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of them would hold the server up for a second."""
    looks = 0
    as_kind = validation._as_kind

    def count(value: Any, kind: Any) -> Any:
        nonlocal looks
        looks += 1
        return as_kind(value, kind)

    monkeypatch.setattr(validation, "_as_kind", count)
    given = list(range(1000))
    params = SamplingParams(allowed_token_ids=given)
    assert looks < 100
    assert params.allowed_token_ids == given
    mixtures: list[list[Any]] = [[*given, True], [*given, 1.5], [*given, "1"]]
    for mixed in mixtures:
        with pytest.raises(InvalidRequestError, match="a list of integers"):
            SamplingParams(allowed_token_ids=mixed)
    assert SamplingParams(allowed_token_ids=[1, np.int64(2)]).allowed_token_ids == [1, 2]


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature, params.top_p) == (1, 16, 1.0, 1.0)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.0, 1.0)
    assert (params.seed, params.stop_strings, params.ignore_eos) == (None, [], False)


def test_one_stop_string_or_several() -> None:
    assert SamplingParams(stop="\n").stop_strings == ["\n"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_unknown_and_positional_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(2)  # type: ignore[call-arg]
