"""Values that come from outside, held to the types that a dataclass declares."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from os import PathLike, fspath
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nanovllm.errors import InvalidRequestError


def conform(instance: Any) -> None:
    """Bring every field of a dataclass instance to its declared type.

    Numbers of other libraries become Python's, tuples lists, paths strings; nothing else is
    converted, so that "false" is not true and 2.5 not 2.

    Raises:
        InvalidRequestError: A value is of another type; the message names field and type.
    """
    for name, hint in _hints(type(instance)).items():  # type: ignore[arg-type]
        object.__setattr__(instance, name, conformed(name, getattr(instance, name), hint))


def conformed(name: str, value: Any, hint: Any) -> Any:
    """An argument brought to the type it should have, as `conform` does with fields.

    Raises:
        InvalidRequestError: It is of another type; the message names argument and type.
    """
    if value is None and type(None) in _members(hint):
        return None
    for kind in _members(hint):
        try:
            return _as_kind(value, kind)
        except (TypeError, ValueError, OverflowError):
            continue
    described = " or ".join(_describe(kind) for kind in _members(hint) if kind is not type(None))
    raise InvalidRequestError(f"{name} must be {described}, got {value!r:.80}", name)


def check_type(name: str, value: object, kind: type, what: str) -> None:
    """Refuse an argument of another type.

    Args:
        name: The argument.
        value: What it is.
        kind: What it has to be.
        what: The same in words, and where one gets it.

    Raises:
        InvalidRequestError: It is something else.
    """
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name} must be {what}, got {type(value).__name__}", name)


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _as_kind(value: Any, kind: Any) -> Any:
    """The value as one plain type.

    Raises:
        TypeError: It is of another.
        ValueError: A mapping's key is no number.
        OverflowError: It is too large a number.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return value
    if origin is list and isinstance(value, list | tuple | set | frozenset):
        if set(map(type, value)) == {arguments[0]}:  # a hundredth of the time of what is below
            return list(value)
        return [_as_kind(item, arguments[0]) for item in value]
    if arguments[:1] == (str,) and origin is dict and isinstance(value, Mapping):
        return dict(value)
    if origin is dict and isinstance(value, Mapping):
        return {_as_id(key): _as_kind(item, arguments[1]) for key, item in value.items()}
    if origin is bool and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if type(value) is bool:
        raise TypeError
    if origin is int and isinstance(value, Integral):
        return int(value)
    if origin is float and isinstance(value, Real):
        return float(value)
    if origin is str and isinstance(value, str | PathLike):
        return fspath(value)
    if isinstance(origin, type) and is_dataclass(origin) and isinstance(value, origin):
        return value
    raise TypeError


def _as_id(key: Any) -> int:
    """A mapping's key as an integer: those of JSON are text."""
    return int(key) if isinstance(key, str) else int(_as_kind(key, int))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _describe(kind: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    plural = {int: "integers", str: "strings"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return f"a list of {plural[get_args(kind)[0]]}"
    if get_origin(kind) is dict:
        return "a mapping of integers to numbers" if get_args(kind)[0] is int else "a mapping"
    if is_dataclass(kind):
        return getattr(kind, "__name__", "")
    return names.get(kind, str(kind))
