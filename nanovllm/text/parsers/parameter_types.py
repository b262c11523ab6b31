"""What values a parameter of a function may have, for models that write text without quotes."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

Schema = Mapping[str, Any]

STRING = "string"
MAX_ALTERNATIVES = 64
MAX_REFERENCES = 16
TYPES = {bool: "boolean", dict: "object", list: "array", str: STRING, type(None): "null"}


def alternatives(schema: Any, root: Schema) -> list[Schema]:
    """Schemas of which a value has to follow one, each of one type where that can be told.

    Args:
        schema: What the value has to follow.
        root: What references in it refer to.
    """
    return list(islice(_alternatives(schema, root, 0), MAX_ALTERNATIVES))


def types_of(schema: Schema) -> set[str]:
    """The types that one of the alternatives allows; none of them if it does not say."""
    if "const" in schema:
        return {type_of(schema["const"])}
    if isinstance(schema.get("enum"), list):
        return set(map(type_of, schema["enum"]))
    return {schema["type"]} if isinstance(schema.get("type"), str) else set()


def type_of(value: object) -> str:
    """What a JSON schema calls the type of a value, of which "number" may be an "integer" too."""
    return TYPES.get(type(value), "number")


def _alternatives(schema: Any, root: Schema, depth: int) -> Iterator[Schema]:
    """Yield one at least of every schema, so that no tree of them is walked to its end."""
    if not isinstance(schema, Mapping) or depth > MAX_REFERENCES:
        yield {}
        return
    union = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(reference := schema.get("$ref"), str):
        yield from _alternatives(_referred(reference, root), root, depth + 1)
    elif isinstance(union, list):
        for member in union:
            yield from _alternatives(member, root, depth + 1)
    elif isinstance(names := schema.get("type"), list) and names:
        for name in names:
            yield {**schema, "type": name}
    elif isinstance(schema.get("enum"), list) and len(types_of(schema)) > 1:
        for value in schema["enum"]:
            yield {"const": value}
    else:
        yield schema


def _referred(reference: str, root: Schema) -> Any:
    """What a reference within a schema refers to; None if there is nothing."""
    found: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
