"""Speech parameters are validated once, with a message that says what is right."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.speech_params import SpeechParams

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cfg_value": -0.1}, "cfg_value must be in [0, 10], got -0.1"),
    ({"cfg_value": 10.5}, "cfg_value must be in [0, 10], got 10.5"),
    ({"cfg_value": float("nan")}, "cfg_value must be in [0, 10], got nan"),
    ({"cfg_value": "2"}, "cfg_value must be a number, got '2'"),
    ({"cfg_value": 10**400}, f"cfg_value must be a number, got 1{79 * '0'}"),
    ({"inference_timesteps": 1}, "inference_timesteps must be in [2, 100], got 1"),
    ({"inference_timesteps": 101}, "inference_timesteps must be in [2, 100], got 101"),
    ({"inference_timesteps": 9.5}, "inference_timesteps must be an integer, got 9.5"),
    ({"inference_timesteps": True}, "inference_timesteps must be an integer, got True"),
    ({"temperature": -1.0}, "temperature must be in [0, 100], got -1.0"),
    ({"temperature": float("inf")}, "temperature must be in [0, 100], got inf"),
    ({"temperature": float("nan")}, "temperature must be in [0, 100], got nan"),
    ({"seed": 2**64}, f"seed must be a 64-bit integer, got {2**64}"),
    ({"min_len": -1}, "min_len must be >= 0, got -1"),
    ({"max_generate_length": 0}, "max_generate_length must be >= 1, got 0"),
    ({"max_generate_length": -5}, "max_generate_length must be >= 1, got -5"),
    ({"retry_badcase": 1}, "retry_badcase must be True or False, got 1"),
    ({"retry_badcase_max_times": 0}, "retry_badcase_max_times must be in [1, 10], got 0"),
    (
        {"retry_badcase_ratio_threshold": 0.0},
        "retry_badcase_ratio_threshold must be in (0, 1000], got 0.0",
    ),
    (
        {"retry_badcase_ratio_threshold": float("nan")},
        "retry_badcase_ratio_threshold must be in (0, 1000], got nan",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SpeechParams(**options)
    assert str(caught.value) == message
    assert caught.value.param in options


def test_what_was_checked_does_not_change() -> None:
    params = SpeechParams()
    with pytest.raises(AttributeError):
        setattr(params, "inference_timesteps", 0)  # noqa: B010  # mypy knows
    with pytest.raises(InvalidRequestError):
        replace(params, inference_timesteps=0)


def test_the_defaults_are_the_reference_s() -> None:
    params = SpeechParams()
    assert (params.cfg_value, params.inference_timesteps, params.temperature) == (2.0, 10, 1.0)
    assert (params.min_len, params.max_generate_length, params.seed) == (2, None, None)
    assert params.max_patches(10**6) == 2000
    assert (params.retry_badcase, params.retry_badcase_max_times) == (False, 3)
    assert params.retry_badcase_ratio_threshold == 6.0


@pytest.mark.parametrize(
    "options",
    [
        {"cfg_value": 0, "temperature": 0},
        {"cfg_value": 10.0, "inference_timesteps": 2},
        {"inference_timesteps": 100, "min_len": 0, "max_generate_length": 1},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"cfg_value": np.float32(2), "seed": np.int64(3)},
    ],
)
def test_the_ends_of_the_ranges_are_in_them(options: dict[str, Any]) -> None:
    SpeechParams(**options)


def test_the_text_limits_the_speech() -> None:
    assert SpeechParams().max_patches(7) == 52
    assert SpeechParams(max_generate_length=20).max_patches(7) == 20
    assert SpeechParams(retry_badcase_ratio_threshold=1.5).max_patches(3) == 14
    huge = SpeechParams(max_generate_length=2**62, retry_badcase_ratio_threshold=1000.0)
    assert huge.max_patches(10**6) == 10**9 + 10


def test_speech_much_too_long_for_its_text_is_a_bad_case() -> None:
    params = SpeechParams()
    assert params.is_bad_case(42, 7)
    assert not params.is_bad_case(41, 7)
