"""Arguments that are written one by one, as a grammar."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nanovllm.errors import InvalidRequestError
from nanovllm.text.grammars import quoted
from nanovllm.text.json_schemas import json_rule
from nanovllm.text.parsers.parameter_types import STRING, alternatives, types_of
from nanovllm.text.parsers.qwen3_coder import END, PARAMETER, VALUE_ENDS

Schema = Mapping[str, Any]

NAME = re.compile(r"[-.\w]+")
TAG_NAME = re.compile(r"[^<>\n]+")
DEFINITIONS = ("$defs", "definitions")
PLAIN_KEYS = {"type", "properties", "required", "additionalProperties", "$schema", *DEFINITIONS}
MAX_PARAMETERS = 400
"""Of a function: what may come next is a rule that refers to the next one's, and a chain of some
thousands has ended the process that compiles it."""
MAX_LENGTH = 10_000
"""Characters that may be counted of a text; its automaton has as many states."""
TEXT_KEYS = {"type", "enum", "const", "minLength", "maxLength"}
PYTHON_LITERALS = {"boolean": '("True" | "False")', "null": '"None"'}

TAG_END = quoted(f"\n{END}\n")
_ENDS = "|".join(VALUE_ENDS).replace("/", r"\/")
TAG_TEXT = rf"""tag_text[lazy]: TAG_TEXT {TAG_END}
TAG_TEXT: /(.|\n)*/ & ~/(.|\n)*({_ENDS})(.|\n)*/"""
"""Rules for any text in a tag, and the end of that."""


class Parameter(NamedTuple):
    """A parameter of a function.

    Args:
        name: What it is called.
        schema: What it may be.
        optional: Whether it may be left out.
    """

    name: str
    schema: Any
    optional: bool


def value_rule(function: str, schema: object) -> str:
    """Lark's expression for a value in the call of a function.

    Raises:
        InvalidRequestError: There is none.
    """
    try:
        return json_rule(schema)
    except (ValueError, TypeError) as e:
        raise InvalidRequestError(f"{function}: {e}", "tools") from e


def keyword_rules(function: str, schema: Schema, prefix: str) -> list[str]:
    """Rules for keyword arguments as Python has them.

    `keywords_{prefix}_{n}` is what may come from the n-th on, `more_{prefix}_{n}` the same behind
    another argument.

    Raises:
        InvalidRequestError: There is a keyword of JSON schema that would not be enforced.
    """
    if _takes_anything(function, schema):
        one = f"any_{prefix}"
        return [
            f"{one}: /[A-Za-z_][A-Za-z0-9_]*=/ {value_rule(function, {})}",
            f'keywords_{prefix}_0: ({one} (", " {one})*)?',
        ]
    shared = _definitions(schema)
    rules = []
    parameters = list(_parameters(function, schema, NAME))
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequestError(f"{function} has more than {MAX_PARAMETERS} parameters", "tools")
    for index, (name, value, optional) in enumerate(parameters):
        here, rest = f"{prefix}_{index}", f"more_{prefix}_{index + 1}"
        first = f" | keywords_{prefix}_{index + 1}" if optional else ""
        rules += [
            f"keyword_{here}: {quoted(f'{name}=')} value_{here}",
            f"value_{here}: {_python_value(function, value, shared)}",
            f"keywords_{here}: keyword_{here} {rest}{first}",
            f'more_{here}: (", " keyword_{here}){"?" if optional else ""} {rest}',
        ]
    end = len(parameters)
    return [*rules, f'keywords_{prefix}_{end}: ""', f'more_{prefix}_{end}: ""']


def tag_rules(function: str, schema: Schema, prefix: str) -> list[str]:
    """Rules for arguments in tags, of which `tags_{prefix}` is all; they refer to `TAG_TEXT`.

    Raises:
        InvalidRequestError: There is a keyword of JSON schema that would not be enforced.
    """
    if _takes_anything(function, schema):
        return [rf"tags_{prefix}: (/{PARAMETER}[^<>\n]+>\n/ tag_text)*"]
    rules, tags = [], []
    for index, (name, value, optional) in enumerate(_parameters(function, schema, TAG_NAME)):
        here = f"{prefix}_{index}"
        tags.append(f"tag_{here}{'?' if optional else ''}")
        begin, bodies = quoted(f"{PARAMETER}{name}>\n"), []
        for number, each in enumerate(alternatives(value, schema)):
            body, terminal = _tag_value(function, each, schema, f"{here}_{number}")
            bodies.append(body)
            rules += terminal
        rules.append(f"tag_{here}: {begin} value_{here}")
        rules.append(f"value_{here}: {' | '.join(bodies)}")
    return [*rules, f"tags_{prefix}: {' '.join(tags) or quoted('')}"]


def _takes_anything(function: str, schema: Schema) -> bool:
    """Whether a function says nothing of its arguments.

    Raises:
        InvalidRequestError: It says what cannot be had.
    """
    properties, required = schema.get("properties", {}), schema.get("required", [])
    wrong = sorted(schema.keys() - PLAIN_KEYS)
    if not isinstance(properties, dict):
        wrong.append("properties")
    if not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        wrong.append("required")
    if wrong:
        raise InvalidRequestError(
            f"{function}: {wrong[0]!r} cannot be enforced, as this "
            "model writes arguments one by one",
            "tools",
        )
    open_ended = schema.get("additionalProperties") is not False
    return open_ended and "properties" not in schema and not required


def _parameters(function: str, schema: Schema, names: re.Pattern[str]) -> Iterator[Parameter]:
    """The parameters of a function.

    Args:
        function: Its name.
        schema: The object of its arguments.
        names: What the model can write as a name.

    Raises:
        InvalidRequestError: A name cannot be written.
    """
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for name, value in (properties | {n: {} for n in required if n not in properties}).items():
        if not names.fullmatch(name):
            raise InvalidRequestError(
                f"{function}: this model cannot write {name!r} as the name of an argument", "tools"
            )
        yield Parameter(name, value, name not in required)


def _definitions(schema: Schema) -> dict[str, Any]:
    return {key: schema[key] for key in DEFINITIONS if key in schema}


def _python_value(function: str, schema: Any, shared: dict[str, Any]) -> str:
    """Lark's expression for an argument: JSON, but for what is only one word in Python."""
    for kind, literal in PYTHON_LITERALS.items():
        if schema == {"type": kind}:
            return literal
    return value_rule(function, shared | schema if isinstance(schema, dict) else schema)


def _tag_value(function: str, schema: Schema, root: Schema, name: str) -> tuple[str, list[str]]:
    """Lark's expression for a value in a tag and the end of that, and the rules it needs.

    Raises:
        InvalidRequestError: It is text in a form that would not be enforced.
    """
    if types_of(schema) != {STRING}:
        return f"{value_rule(function, _definitions(root) | dict(schema))} {TAG_END}", []
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength", "")
    wrong = sorted(schema.keys() - TEXT_KEYS)
    wrong += [each for each in ("minLength", "maxLength") if not _is_length(schema.get(each, 0))]
    if wrong:
        raise InvalidRequestError(
            f"{function}: {wrong[0]!r} of text cannot be enforced, as this model writes it "
            "without quotes",
            "tools",
        )
    texts = [schema["const"]] if "const" in schema else schema.get("enum")
    if texts is not None:
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
            raise InvalidRequestError(f"{function}: 'enum' of text must list texts", "tools")
        for text in texts:
            if any(end in text for end in VALUE_ENDS):
                raise InvalidRequestError(
                    f"{function}: this model cannot write {text!r:.80}, in which a value would end",
                    "tools",
                )
        return f"({' | '.join(map(quoted, texts))}) {TAG_END}", []
    if shortest == 0 and longest == "":
        return "tag_text", []
    return f"text_{name}", [
        f"text_{name}[lazy]: TEXT_{name} {TAG_END}",
        # Without what values end at; to say that with "&" would cost one of few conjunctions.
        f"TEXT_{name}: /[^<]{{{shortest},{longest}}}/",
    ]


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LENGTH
