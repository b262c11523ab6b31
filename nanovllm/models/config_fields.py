"""Fields of a `config.json`, held to what they must be.

Each error names its field; a field that is missing and has no default is a `KeyError`.
"""

import sys
from typing import Any

from nanovllm.errors import InvalidRequestError


def positive(
    raw: dict[str, Any], name: str, default: int | None = None, at_most: int | None = None
) -> int:
    """A field that is an integer above 0, and no more than is supported."""
    value = raw[name] if default is None else raw.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, "a positive integer", value)
    if at_most is not None and value > at_most:
        raise not_supported(name, value, f"up to {at_most}")
    return value


def positive_number(raw: dict[str, Any], name: str, default: float | None = None) -> float:
    """A field that is a finite number above 0."""
    value = raw[name] if default is None else raw.get(name, default)
    if not _is_finite(value) or value <= 0:
        raise _wrong(name, "a positive number", value)
    return float(value)


def finite_number(raw: dict[str, Any], name: str) -> float:
    """A field that is a number, neither NaN nor infinite."""
    if not _is_finite(raw[name]):
        raise _wrong(name, "a finite number", raw[name])
    return float(raw[name])


def json_object(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A field that is an object; empty where it is missing or null."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def indices(raw: dict[str, Any], name: str) -> list[int]:
    """A field that is a list of integers from 0 on; empty where it is missing or null."""
    value = [] if raw.get(name) is None else raw[name]
    are_indices = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
    if not are_indices:
        raise _wrong(name, "a list of indices", value)
    return list(value)


def json_list(raw: dict[str, Any], name: str) -> list[Any]:
    """A field that is a list with something in it."""
    value = raw[name]
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list that is not empty", value)
    return value


def boolean(raw: dict[str, Any], name: str) -> bool:
    """A field that is true or false; false where it is missing or null."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return bool(value)


def not_supported(name: str, value: float, supported: str) -> InvalidRequestError:
    """The error of a number that is of the right type, and too large or too small."""
    return InvalidRequestError(f"{name}={value} is not supported; supported: {supported}", name)


def _is_finite(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"config.json: {name} must be {expected}, not {value!r:.80}", name)
