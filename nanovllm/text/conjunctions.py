"""How many patterns a form asks of one and the same text.

llguidance follows all of them at once. What that takes grows exponentially with their number, and
with some dozens neither its limits nor a timeout end it: a minute takes half a gigabyte.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nanovllm.errors import InvalidRequestError

MAX_CONJUNCTIONS = 8
"""With eight it takes ten milliseconds until llguidance finds them too complex, with twelve four
seconds."""
MAX_REFERENCES = 400
"""References in a row."""
MAX_REFERRED = 500_000
"""Places of which all references together tell what is asked there; a second for so many."""
PATTERNS = ("pattern", "format")
PLACE_LENGTH = 3
"""Names of properties that tell places apart; a recursive schema has places without end."""

LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"?|/(?:\\.|[^/\\])+/?|//[^\n]*|#[^\n]*')
"""Texts, patterns and comments of a Lark grammar as llguidance reads them: a pattern may go over
lines. One without an end is looked at once."""

Place = tuple[str, ...]
Asked = dict[Place, frozenset[str]]
"""Different patterns for the text at each place."""


def check_conjunctions(schema: object) -> None:
    """See that a schema does not ask too many patterns of a text.

    Raises:
        InvalidRequestError: It does.
    """
    asked = _Patterns(schema).of(schema)
    _check_number(max(map(len, asked.values()), default=0))


def check_operators(grammar: str) -> None:
    """See that the terminals of a Lark grammar do not have too many patterns in common.

    Raises:
        InvalidRequestError: They do.
    """
    _check_number(LITERALS.sub("", grammar).count("&") + 1)


def _check_number(number: int) -> None:
    if number > MAX_CONJUNCTIONS:
        raise InvalidRequestError(
            f"{number} patterns for the same text are more than the {MAX_CONJUNCTIONS} we follow "
            "at once: combine fewer of them"
        )


class _Patterns:
    """What the schemas of a document ask, each looked at once."""

    def __init__(self, document: object) -> None:
        self._document = document
        self._known: dict[str, Asked] = {}
        self._num_open = 0
        self._num_referred = 0

    def of(self, schema: object) -> Asked:
        """Patterns that a schema asks of the text at each place within its value."""
        if not isinstance(schema, Mapping):
            return {}
        asked: Asked = {}
        own = frozenset(str(schema[name]) for name in PATTERNS if name in schema)
        if own:
            asked[()] = own
        for name in ("properties", "patternProperties"):
            for key, value in _items(schema.get(name)):
                _choose(asked, _within(key, self.of(value)))
        for name in ("items", "additionalProperties"):
            _choose(asked, _within(name, self.of(schema.get(name))))
        for index, value in enumerate(_list(schema.get("prefixItems"))):
            _choose(asked, _within(str(index), self.of(value)))
        for name in ("anyOf", "oneOf"):
            alternatives: Asked = {}
            for value in _list(schema.get(name)):
                _choose(alternatives, self.of(value))
            _combine(asked, alternatives)
        for value in _list(schema.get("allOf")):
            _combine(asked, self.of(value))
        if isinstance(schema.get("$ref"), str):
            referred = self._of_reference(schema["$ref"])
            self._num_referred += len(referred)
            if self._num_referred > MAX_REFERRED:
                raise InvalidRequestError(
                    f"the references of the schema lead to more than {MAX_REFERRED} patterns: "
                    "refer to smaller parts, or less often"
                )
            _combine(asked, referred)
        return asked

    def _of_reference(self, reference: str) -> Asked:
        if reference in self._known:
            return self._known[reference]
        self._known[reference] = {}  # what a schema asks of itself adds nothing
        self._num_open += 1
        if self._num_open > MAX_REFERENCES:
            raise InvalidRequestError(f"the schema has more than {MAX_REFERENCES} references")
        target = resolve(self._document, reference)
        self._known[reference] = asked = self._everything if target is None else self.of(target)
        self._num_open -= 1
        return asked

    @cached_property
    def _everything(self) -> Asked:
        """All patterns of the document, at one place."""
        found: set[str] = set()
        stack = [self._document]
        while stack:
            node = stack.pop()
            if isinstance(node, Mapping):
                found.update(str(node[name]) for name in PATTERNS if name in node)
                stack += node.values()
            elif isinstance(node, list):
                stack += node
        return {(): frozenset(found)} if found else {}


def resolve(document: object, reference: str) -> object:
    """What a JSON pointer leads to; None if it is another kind of reference, or to nothing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    node: Any = document
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _items(value: object) -> list[tuple[str, object]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _within(name: str, asked: Asked) -> Asked:
    """What is asked of a value, as what is asked of the object that has it."""
    inner: Asked = {}
    for place, patterns in asked.items():
        _choose(inner, {(name, *place)[:PLACE_LENGTH]: patterns})
    return inner


def _choose(asked: Asked, other: Asked) -> None:
    """Add what is asked instead, or elsewhere: of a place, whichever is more."""
    for place, patterns in other.items():
        if len(patterns) > len(asked.get(place, ())):
            asked[place] = patterns


def _combine(asked: Asked, other: Asked) -> None:
    """Add what is asked besides.

    Raises:
        InvalidRequestError: That is too much.
    """
    for place, patterns in other.items():
        asked[place] = asked.get(place, frozenset()) | patterns
        _check_number(len(asked[place]))
