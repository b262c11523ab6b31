"""JSON schemas as pydantic, zod and OpenAPI write them, in keywords that can be enforced."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.text.conjunctions import resolve

Schema = dict[str, Any]

NESTED = ("items", "additionalProperties", "contains", "not", "if", "then", "else")
NESTED_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
NESTED_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
"""The keywords that have schemas: one, some by name, or a list."""

ANNOTATIONS = {"$comment", "default", "deprecated", "description", "examples", "title"}
UNASSERTED_FORMATS = {"password", "binary", "path", "file-path", "directory-path"}
"""OpenAPI's and pydantic's formats that any text has."""
FORMATS = {"idn-email": "email", "iri": "uri"}
"""Formats, and others that are all of their kind, too."""
STANDARD_FORMATS = {
    *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    *("regex", "json-pointer", "relative-json-pointer", "uri-template", "uri-reference"),
    *("iri-reference", "idn-hostname"),
}
"""What JSON Schema itself defines; a pattern beside another format says all there is to it."""

_YEAR = "^([1-9]|0[1-9]|00[1-9]|000[1-9])"
FORMAT_PATTERNS = {
    "date": _YEAR,
    "date-time": _YEAR + "[^t]*:[0-5][0-9]:[0-5][^z]*$",
    "time": "^[^:]*:[^:]*:[0-5][^z]*$",
    **{f"uuid{version}": f"^.{{14}}{version}.{{4}}[89abAB]" for version in range(1, 9)},
}
"""What most readers ask besides: a year from 1 on, a minute of 60 seconds, capital letters."""

_ZOD_LABELS = "@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$"
PATTERNS = {
    f"^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]{_ZOD_LABELS}": (
        f"^([A-Za-z0-9_'+\\-]+\\.)*[A-Za-z0-9_'+\\-]*[A-Za-z0-9_+-]{_ZOD_LABELS}"
    )
}
"""Zod's pattern of e-mail addresses, and the same without look-ahead."""

MAX_STEPS = 10
"""References from one to the next until the names of properties."""


def subschemas(schema: object) -> Iterator[Schema]:
    """A schema and all within it; what is no schema, such as a constant, is left out."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if not isinstance(node, dict):
            continue
        yield node
        stack += [node.get(name) for name in NESTED]
        for name in NESTED_BY_NAME:
            if isinstance(by_name := node.get(name), dict):
                stack += by_name.values()
        for name in NESTED_LISTS:
            if isinstance(listed := node.get(name), list):
                stack += listed


def in_plain_keywords(schema: Mapping[str, Any]) -> Schema:
    """A copy without keywords that say nothing, and with plainer ones for some that do.

    What it allows is the same, or less in unusual corners: see `FORMATS` and `FORMAT_PATTERNS`.

    Raises:
        InvalidRequestError: It has keywords of different drafts, of which one would be ignored.
        ValueError: It cannot be written as JSON.
    """
    copy: Schema = json.loads(json.dumps(schema))
    draft = str(copy.get("$schema", ""))
    for node in subschemas(copy):
        if "prefixItems" in node and ("additionalItems" in node or "/draft-0" in draft):
            raise InvalidRequestError(
                "prefixItems belongs to draft 2020-12: leave out $schema, and write items for "
                "additionalItems"
            )
        if "/draft-04/" not in draft:
            _number_bounds(node)
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        if node.get("pattern") in tuple(PATTERNS):
            node["pattern"] = PATTERNS[node["pattern"]]
        _name_format(node)
        _name_properties(node, copy)
    return copy


def _number_bounds(node: Schema) -> None:
    """Write draft 4's `"exclusiveMinimum": true`, which says how to read `minimum`, as a number."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(node.get(exclusive), bool) and node.pop(exclusive) and bound in node:
            node[exclusive] = node.pop(bound)


def _name_format(node: Schema) -> None:
    wanted = node.get("format")
    if not isinstance(wanted, str):
        return
    wanted = node["format"] = FORMATS.get(wanted, wanted)
    if wanted in UNASSERTED_FORMATS:
        del node["format"]
    elif "pattern" in node:
        if wanted not in STANDARD_FORMATS:
            del node["format"]
    elif wanted in FORMAT_PATTERNS:
        node["pattern"] = FORMAT_PATTERNS[wanted]
        if wanted.startswith("uuid"):
            node["format"] = "uuid"


def _name_properties(node: Schema, document: Schema) -> None:
    """Say by the properties themselves what `propertyNames` says, if nothing else says more."""
    names = node.get("propertyNames")
    for _ in range(MAX_STEPS):
        if isinstance(names, dict) and isinstance(names.get("$ref"), str):
            names = resolve(document, names["$ref"])
    if names is True:
        names = {}
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return
    asked = names.keys() - ANNOTATIONS - {"type"}
    if not asked:
        del node["propertyNames"]
    if node.keys() & {"properties", "patternProperties"}:
        return
    values = node.get("additionalProperties", True)
    if asked == {"pattern"}:
        node["patternProperties"] = {names["pattern"]: values}
    elif asked == {"enum"} and all(isinstance(name, str) for name in names["enum"]):
        node["properties"] = dict.fromkeys(names["enum"], values)
    else:
        return
    del node["propertyNames"]
    node["additionalProperties"] = False
