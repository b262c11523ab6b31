"""Whether a value has the form that a schema asks for, as far as its common keywords say."""

from collections.abc import Callable, Mapping
from itertools import chain, islice, repeat
from operator import ge, gt, le, lt
from typing import Any

from nanovllm.text.parsers.parameter_types import Schema, alternatives, type_of

MAX_VISITS = 256
"""Values that are held to a schema, as alternatives within alternatives may be without number."""

LIMITS: dict[str, dict[str, Callable[[Any, Any], bool]]] = {
    "number": {"minimum": ge, "maximum": le, "exclusiveMinimum": gt, "exclusiveMaximum": lt},
    "string": {"minLength": ge, "maxLength": le},
    "array": {"minItems": ge, "maxItems": le},
    "object": {"minProperties": ge, "maxProperties": le},
}
"""Keywords that bound a number or the length of something, by the type of this."""


class Fitting:
    """Holds values to schemas; what is not looked at is taken to fit.

    Args:
        root: What references in the schemas refer to.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_visits = 0

    def fits(self, value: object, schema: Any) -> bool:
        """Whether a schema allows a value, as `json` reads it."""
        self._num_visits += 1
        return self._num_visits > MAX_VISITS or any(
            _has_type(value, one)
            and _is_listed(value, one)
            and _is_within_limits(value, one)
            and self._parts_fit(value, one)
            for one in alternatives(schema, self._root)
        )

    def _parts_fit(self, value: object, schema: Schema) -> bool:
        if isinstance(value, list):
            schemas = chain(_list(schema.get("prefixItems")), repeat(schema.get("items")))
            pairs = zip(value[:MAX_VISITS], schemas, strict=False)
            return all(self.fits(*pair) for pair in pairs)
        if not isinstance(value, dict):
            return True
        if not value.keys() >= set(map(str, _list(schema.get("required")))):
            return False
        properties, others = schema.get("properties"), schema.get("additionalProperties")
        known = properties if isinstance(properties, Mapping) else {}
        return all(
            (name in known or others is not False) and self.fits(part, known.get(name, others))
            for name, part in islice(value.items(), MAX_VISITS)
        )


def _has_type(value: object, schema: Schema) -> bool:
    wanted, found = schema.get("type"), type_of(value)
    if wanted == "integer":
        return isinstance(value, int | float) and found == "number" and value == value // 1
    return not isinstance(wanted, str) or found == wanted


def _is_listed(value: object, schema: Schema) -> bool:
    values = schema.get("enum")
    if "const" in schema:
        values = [schema["const"]]
    return not isinstance(values, list) or any(
        type_of(each) == type_of(value) and each == value for each in values
    )


def _is_within_limits(value: object, schema: Schema) -> bool:
    size = len(value) if isinstance(value, str | list | dict) else value
    limits = LIMITS.get(type_of(value), {})
    return all(
        keeps(size, limit)
        for keyword, keeps in limits.items()
        if isinstance(limit := schema.get(keyword), int | float) and not isinstance(limit, bool)
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
