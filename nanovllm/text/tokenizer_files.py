"""Files beside a `tokenizer.json`, held to the shape that they must have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanovllm.errors import UnsupportedModelError

TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_text(path: Path) -> str:
    """Read a text.

    Raises:
        UnsupportedModelError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UnsupportedModelError(f"{path} is not UTF-8: {e}") from e


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file of settings, empty if there is none.

    Raises:
        UnsupportedModelError: It is no JSON object, or a value of it does not fit `SHAPES`.
    """
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UnsupportedModelError(f"{path} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} must hold a JSON object, not {content!r:.80}")
    for name, (fits, expected) in SHAPES.items():
        value = content.get(name)
        if value is not None and not fits(value):
            raise UnsupportedModelError(
                f"{path}: {name} must be {expected}, not {value!r:.80}", name
            )
    return content


def _are_tokens_by_id(value: Any) -> bool:
    return isinstance(value, dict) and all(
        token_id.isdecimal() and _is_token(token) for token_id, token in value.items()
    )


def _is_token(value: Any) -> bool:
    """Whether a value is what an added token is made of."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and all(isinstance(value.get(flag, False), bool) for flag in TOKEN_FLAGS)
    )


def _is_template(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(map(_is_named_template, value))
    )


def _is_named_template(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("name", "template")
    )


def _is_collection(value: Any) -> bool:
    return isinstance(value, list | dict)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "added_tokens_decoder": (_are_tokens_by_id, "an object of tokens by their ids"),
    "additional_special_tokens": (_is_collection, "a list or an object"),
    "chat_template": (_is_template, "a text, or a list of objects with name and template"),
    "extra_special_tokens": (_is_collection, "a list or an object"),
    "split_special_tokens": (_is_boolean, "true or false"),
}
"""What a setting fits that is not null, and that in words."""
