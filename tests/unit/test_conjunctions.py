"""Forms that ask many patterns of one text, which no limit of llguidance's ends."""

import contextlib
import time
from typing import Any

import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.text.conjunctions import MAX_CONJUNCTIONS, check_conjunctions, check_operators

MANY = MAX_CONJUNCTIONS + 1


def patterns(number: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f".*{index}.*"} for index in range(number)]


def defined(number: int, **more: Any) -> dict[str, Any]:
    """Definitions, each of which asks for its own pattern and for the next one."""
    made = {
        f"d{i}": each | {"$ref": f"#/$defs/d{i + 1}"} for i, each in enumerate(patterns(number))
    }
    return {"$defs": made | {f"d{number}": {}}} | more


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": patterns(MANY)},
        {"allOf": [{"allOf": patterns(5)}, {"anyOf": [{"allOf": patterns(MANY)}, {}]}]},
        {"items": {"allOf": patterns(MANY)}},
        {"allOf": [{"properties": {"a": each}} for each in patterns(MANY)]},
        {"allOf": [{"items": {"properties": {"a": each}}} for each in patterns(MANY)]},
        defined(MANY, properties={"a": {"$ref": "#/$defs/d0"}}),
        {
            "$defs": {f"{i}": each | {"$anchor": f"a{i}"} for i, each in enumerate(patterns(MANY))},
            "$ref": "#a0",
        },
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"allOf": patterns(MANY)}}},
        {"pattern": "x", "anyOf": [{}, {"allOf": patterns(MAX_CONJUNCTIONS)}]},
        {"$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(1000)}, "$ref": "#/$defs/0"},
        {"anyOf": [{"$ref": f"#/{i}"} for i in range(20_000)], "$defs": patterns(20_000)},
        {
            "anyOf": [{"$ref": "#/$defs"}] * 20_000,
            "$defs": {"properties": {f"p{i}": {"pattern": "x"} for i in range(10_000)}},
        },
    ],
)
def test_too_many(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"patterns for the same text|refer"):
        check_conjunctions(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"allOf": patterns(MAX_CONJUNCTIONS)},
        {"allOf": [{"type": "string", "pattern": "x"}] * 50},
        {"anyOf": patterns(50)},
        {"properties": {f"p{i}": each for i, each in enumerate(patterns(50))}},
        {"allOf": [{"properties": {f"p{i}": each}} for i, each in enumerate(patterns(50))]},
        {"prefixItems": patterns(50)},
        {"$ref": "#", "pattern": "x"},
        {"anyOf": [{"$ref": f"#/{i}"} for i in range(30_000)]},
        {"$ref": "#/nowhere/at/all", "allOf": "x", "properties": [], "anyOf": {}},
        {
            "$defs": {
                f"{i}": {"properties": {name: {"$ref": f"#/$defs/{i + 1}"} for name in "ab"}}
                for i in range(60)
            },
            "$ref": "#/$defs/0",
        },
    ],
)
def test_not_too_many(schema: object) -> None:
    check_conjunctions(schema)


def test_operators_of_lark() -> None:
    check_operators("start: X\nX: " + " & ".join(["/a.*/"] * MAX_CONJUNCTIONS))
    check_operators('start: "&&&&&&&&&&&&" /&&&&&&&&&&&&\\/&&/ // &&&&&&&&&&&&\n')
    with pytest.raises(InvalidRequestError, match="combine fewer"):
        check_operators("start: X\nX: " + " & ".join(["/a.*/"] * MANY))
    with pytest.raises(InvalidRequestError, match="combine fewer"):
        check_operators("start: X\n" + "\n".join(f"T{i}: T{i + 1} & /a/" for i in range(MANY)))
    with pytest.raises(InvalidRequestError, match="combine fewer"):
        check_operators('start: X\nX: /a\n"/' + " & /b/" * MANY + ' // "')


@pytest.mark.parametrize("piece", ['"\\', "/\\", "/a", '"a\n', "& ", "\n", " \n"])
def test_operators_are_counted_in_one_go(piece: str) -> None:
    """Half a minute of a pattern that looks again at what it has seen stops the whole server."""
    started = time.process_time()
    with contextlib.suppress(InvalidRequestError):
        check_operators(piece * 32_000)
    assert time.process_time() - started < 1
