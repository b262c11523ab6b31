"""Random JSON schemas: nested, with enums, patterns, bounds, recursive references and unions."""

import random
from typing import Any

Schema = dict[str, Any]

WORDS = [
    "name",
    "age",
    "kind",
    "left",
    "right",
    "items",
    "a b",
    "größe",
    "x",
    "value",
    "id",
    "note",
]
PATTERNS = [
    r"^[a-z]{2,8}$",
    r"^\d{4}-\d{2}$",
    "^(red|green|blue)$",
    r"^[A-Z][a-z]* \d+$",
    "^a*b?c+$",
]
FORMATS = ["date", "date-time", "uuid", "ipv4", "email"]
MAX_DEPTH = 3


def random_schema(rng: random.Random) -> Schema:
    """A schema that can be met, by a tree of references among others."""
    schema = _schema(rng, 0)
    if rng.random() < 0.3:
        schema = _recursive(rng, schema)
    return schema


def _recursive(rng: random.Random, leaf: Schema) -> Schema:
    """A list or a tree of what another schema describes."""
    node: Schema = {
        "type": "object",
        "properties": {
            "value": leaf,
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": rng.choice([["value"], ["next"], ["value", "children"]]),
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _schema(rng: random.Random, depth: int) -> Schema:
    scalars = [_string, _integer, _number, _enum, _constant]
    nested = [_object, _object, _array, _union]
    makers = nested if depth == 0 else scalars if depth == MAX_DEPTH else scalars + nested
    return rng.choice(makers)(rng, depth)


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind == 2:
        low = rng.randrange(5)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 20)}
    return {"type": "string"}


def _integer(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    low = rng.randrange(-1000, 1000)
    if rng.random() < 0.7:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.7:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randrange(8, 2000)
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.choice([2, 3, 5, 7])
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    low = round(rng.uniform(-50, 50), 2)
    if rng.random() < 0.5:
        return {"type": "number"}
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.choice([0.5, 3, 99.5])}


def _enum(rng: random.Random, depth: int) -> Schema:
    values = ["red", 'with "quotes"', "ünïcode", 7, -1.5, None, True, ["a", 1], {"k": []}]
    return {"enum": rng.sample(values, rng.randrange(1, 6))}


def _constant(rng: random.Random, depth: int) -> Schema:
    return rng.choice([{"const": "fixed"}, {"type": "boolean"}, {"type": "null"}, {"const": 12}])


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randrange(1, 5))
    schema: Schema = {
        "type": "object",
        "properties": {name: _schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
    }
    if rng.random() < 0.2:
        schema |= {"additionalProperties": {"type": "integer"}, "maxProperties": len(names) + 2}
        schema["required"] = names
    elif rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    schema: Schema = {"type": "array", "items": _schema(rng, depth + 1), "minItems": low}
    if rng.random() < 0.9:
        schema["maxItems"] = low + rng.randrange(1, 4)
    if rng.random() < 0.2:
        schema["prefixItems"] = [_schema(rng, depth + 1)]
    return schema


def _union(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        return {
            "type": rng.choice([["string", "null"], ["integer", "string"], ["boolean", "null"]])
        }
    return {"anyOf": [_schema(rng, depth + 1) for _ in range(rng.randrange(2, 4))]}
