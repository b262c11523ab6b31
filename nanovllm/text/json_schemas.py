"""JSON schemas as they go into a grammar: small enough, and closed where nothing says otherwise."""

import json
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from itertools import permutations
from math import floor, inf, isfinite, lcm, log10, nextafter
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.text.conjunctions import check_conjunctions, resolve
from nanovllm.text.schema_keywords import in_plain_keywords, subschemas

MAX_SCHEMA_DEPTH = 120
"""Levels of a JSON schema; an object within an object is two more."""
MAX_SCHEMA_VALUES = 65_536
"""Values of a JSON schema."""
MAX_MULTIPLE = 20_000
"""What the digits of all `multipleOf` of a schema may have as least common multiple: so many states
has the automaton that checks it, and a million of them take five seconds and 300 MB."""
MAX_BOUND = 10**18
"""Largest number that may be a bound; some beyond it, around -2^63, end the process that compiles
them, and others are not kept."""
NEAR = 1e-4
"""Distance of bounds up to which a number is found between them where schemas are combined."""
MAX_SHIFT = 308
"""Digits behind the point of a listed number; 1e308 is the largest power of ten of floats."""

JSON_STYLE = {
    # One way to write a value: what is certain costs no step, and no model ends in blanks.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}

VALUES = ("const", "enum")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

COMBINING = {"allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas"}
ABOUT_PROPERTIES = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired"),
}
ASSERTIONS = {
    *("type", "enum", "const", "properties", "required", "items", "prefixItems"),
    *ABOUT_PROPERTIES,
}

MAX_UNTAGGED = 64
"""Objects of a `oneOf` that are compared with one another."""

SCALARS = {"string", "integer", "number", "boolean", "null"}
"""Types of values that have no others in them."""

LONGEST = {"email": 254, "hostname": 253}
"""Characters of some formats, by RFC 5321 section 4.5.3.1.3 and RFC 1035 section 3.1."""


def json_rule(schema: object) -> str:
    """Lark's expression for a value that a JSON schema allows.

    Args:
        schema: The schema, or its JSON text.

    Raises:
        InvalidRequestError: It is no schema, or has more levels or numbers than we take.
        ValueError: It cannot be written as JSON.
    """
    if isinstance(schema, str):
        schema = json.loads(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(
            "a schema is a JSON object such as {'type': 'object', 'properties': {...}}, got "
            f"{schema!r:.80}"
        )
    schema = in_plain_keywords(schema)
    check_schema(schema)
    # Ours in place of the schema's: it must not make itself lenient.
    styled = {**_inclusive(closed(schema)), "x-guidance": JSON_STYLE}
    return f"%json {json.dumps(styled, allow_nan=False)}"


def check_schema(schema: object) -> None:
    """See that a schema is small enough to be compiled.

    Raises:
        InvalidRequestError: It is too deep or too large, its patterns, bounds or `multipleOf` are
            too much, or a number that it lists would become another.
    """
    multiple = 1
    num_values = 0
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        num_values += len(level)
        if num_values > MAX_SCHEMA_VALUES:
            raise InvalidRequestError(f"the schema has more than {MAX_SCHEMA_VALUES} values")
        for node in level:
            if isinstance(node, Mapping):
                _check_bounds(node)
                multiple = lcm(multiple, _digits(node.get("multipleOf")))
        if multiple > MAX_MULTIPLE:
            raise InvalidRequestError(
                f"multipleOf: the least common multiple of all of them, without trailing zeros, "
                f"may be {MAX_MULTIPLE} at most"
            )
        level = [child for node in level for child in _values(node)]
        if not level:
            check_conjunctions(schema)
            _check_listed(schema)
            return
    raise InvalidRequestError(f"the schema has more than {MAX_SCHEMA_DEPTH} levels")


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with objects that have no properties but those it lists, where it is silent.

    So do other engines: who lists properties wants these, and a model that may always add one more
    need not come to an end. Formats of limited length get that limit. Where schemas are combined,
    one's properties may be meant for another's object, and all stay as they are; so they do where
    only closed objects would be told apart by `oneOf`.
    """
    if any(_combines(node) or _may_overlap(node, schema) for node in subschemas(schema)):
        return schema
    copy: Mapping[str, Any] = json.loads(json.dumps(schema))
    for node in subschemas(copy):
        properties, required = node.get("properties"), node.get("required", [])
        if (
            isinstance(properties, dict)
            and properties
            and isinstance(required, list)
            and properties.keys() >= set(filter(None, map(str, required)))
            and not ABOUT_PROPERTIES & node.keys()
        ):
            node["additionalProperties"] = False
        if node.get("type") == "string" and (longest := LONGEST.get(str(node.get("format")))):
            node.setdefault("maxLength", longest)
    return copy


def _inclusive(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with a bound beside each whole number that is itself no answer.

    llguidance takes 0 where numbers are above 0 and at most 0.5, so there they are at least 0.001.
    Where schemas are combined, one's bound may be as near to another's.
    """
    widest = NEAR if any(map(_combines_bounds, subschemas(schema))) else inf
    copy: Mapping[str, Any] = json.loads(json.dumps(schema))
    for node in subschemas(copy):
        above, below = (
            _number(node, "exclusiveMinimum", -inf),
            _number(node, "exclusiveMaximum", inf),
        )
        least, most = _number(node, "minimum", -inf), _number(node, "maximum", inf)
        gap = min(min(below, most) - max(above, least), widest)
        if not 0 < gap < 1:
            continue
        if above >= least and float(above).is_integer():
            node["minimum"] = max(above + _step(gap), nextafter(above, inf))
        if below <= most and float(below).is_integer():
            node["maximum"] = min(below - _step(gap), nextafter(below, -inf))
    return copy


def _number(node: Mapping[str, Any], name: str, default: float) -> float:
    value = node.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _step(gap: float) -> float:
    """A round number that is less than a hundredth of a gap."""
    return float(f"1e{floor(log10(gap)) - 2}")


def _combines(node: Mapping[str, Any]) -> bool:
    """Whether a schema asks for more than one thing of a value at once."""
    combining = COMBINING & node.keys()
    all_of = node.get("allOf")
    several = isinstance(all_of, list) and len(all_of) > 1
    return several or len(combining) > 1 or bool(combining and ASSERTIONS & node.keys())


def _combines_bounds(node: Mapping[str, Any]) -> bool:
    """Whether a number may have to keep to bounds of several schemas."""
    own = (*BOUNDS, "properties")
    combining = COMBINING | {"patternProperties"}
    return _combines(node) or bool(combining & node.keys() and node.keys() & set(own))


def _may_overlap(node: Mapping[str, Any], document: object) -> bool:
    """Whether `oneOf` has objects that no property tells apart, or what may have them in it."""
    one_of = node.get("oneOf")
    branches = [_target(branch, document) for branch in one_of] if isinstance(one_of, list) else []
    branches = [branch for branch in branches if not _is_scalar(branch)]
    if len(branches) <= 1:
        return False
    if len(branches) == len({str(branch.get("type")) for branch in branches}):
        return any(not isinstance(branch.get("type"), str) for branch in branches)
    constants = [_constants(branch) for branch in branches]
    tagged = any(
        len({tags.get(name) for tags in constants} - {None}) == len(branches)
        for name in constants[0]
    )
    return not tagged and not _ask_for_others(branches)


def _ask_for_others(branches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each of some objects, once closed, lacks what each of the others requires."""
    if len(branches) > MAX_UNTAGGED or any(
        ABOUT_PROPERTIES & branch.keys() and branch.get("additionalProperties") is not False
        for branch in branches
    ):
        return False
    names = [set(map(str, branch.get("properties") or ())) for branch in branches]
    required = [set(map(str, branch.get("required") or ())) for branch in branches]
    pairs = permutations(zip(names, required, strict=True), 2)
    return all(wanted - own for (own, _), (_, wanted) in pairs)


def _is_scalar(schema: Mapping[str, Any]) -> bool:
    types = schema.get("type", [])
    values = schema.get("enum", [schema.get("const", {})])
    return SCALARS >= set(types if isinstance(types, list) else [str(types)]) != set() or (
        isinstance(values, list) and not any(isinstance(value, dict | list) for value in values)
    )


def _target(schema: object, document: object) -> Mapping[str, Any]:
    """A schema, or what it refers to."""
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        schema = resolve(document, schema["$ref"])
    return schema if isinstance(schema, Mapping) else {}


def _constants(schema: Mapping[str, Any]) -> dict[str, str]:
    """The required properties that have one value, and that value."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return {}
    named = ((str(name), properties.get(str(name))) for name in required)
    return {
        name: json.dumps(value["const"])
        for name, value in named
        if isinstance(value, Mapping) and "const" in value
    }


def _check_bounds(node: Mapping[str, object]) -> None:
    for name in BOUNDS:
        bound = node.get(name)
        if isinstance(bound, int | float) and abs(bound) > MAX_BOUND:
            raise InvalidRequestError(f"{name} must be from -1e18 to 1e18: leave it out")


def _check_listed(schema: object) -> None:
    """See that the numbers of `const` and `enum` are kept, wherever a reference may find them."""
    stack: list[tuple[object, str]] = [(schema, "")]
    while stack:
        node, keyword = stack.pop()
        if keyword and isinstance(node, int | float) and not _is_kept(node):
            raise InvalidRequestError(
                f"{keyword}: {node!r:.40} has too many digits to be kept exactly; make it a "
                f"string, or leave {keyword} out"
            )
        if isinstance(node, Mapping):
            stack += [
                (child, keyword or (name if name in VALUES else "")) for name, child in node.items()
            ]
        else:
            stack += [(child, keyword) for child in _values(node)]


def _is_kept(number: float) -> bool:
    """Whether llguidance, which reads numbers as floats, writes this one and no other.

    It takes the digits for a whole number and then shifts the point, which may round twice.
    """
    if isinstance(number, int):
        return abs(number) < 2**63 and int(float(number)) == number
    if not isfinite(number) or number.is_integer():
        return True
    shift = -int(Decimal(repr(number)).as_tuple().exponent)
    return shift <= MAX_SHIFT and float(_digits(number)) / 10.0**shift == abs(number)


def _values(node: object) -> Collection[object]:
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, Sequence) and not isinstance(node, str) else ()


def _digits(value: object) -> int:
    """The digits of a number without its decimal point and zeros at its end; 1 if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return 1
    number = Decimal(repr(value))
    return int("".join(map(str, number.as_tuple().digits)).rstrip("0") or 1)
