"""Calls of tools as a grammar, in the forms that models write them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.text.grammars import quoted
from nanovllm.text.json_schemas import ABOUT_PROPERTIES, COMBINING
from nanovllm.text.parameter_grammars import (
    NAME,
    TAG_TEXT,
    keyword_rules,
    tag_rules,
    value_rule,
)
from nanovllm.text.parsers.calls import Function
from nanovllm.text.parsers.qwen3_coder import CALL, CALL_END, FUNCTION, FUNCTION_END

Mark = Callable[[str], str]
"""Lark's name of a string that may be a special token."""

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_PARAMETERS = {"type": "object"}
ANNOTATIONS = frozenset(("$comment", "default", "description", "examples", "title"))
VERBATIM = frozenset(("const", "enum"))


@dataclass(frozen=True, slots=True)
class CallRules:
    """How to write calls.

    Args:
        rules: Lark rules that the others refer to.
        inside: Lark's expression for one call behind its mark.
        several: The same for one call or more, where they share a mark; "" where each has its own.
        mark: What calls begin with anywhere in a text.
        between: What stands between calls that have a mark each.
        opening: What calls without a mark begin with, at the beginning of a line.
    """

    rules: list[str]
    inside: str
    several: str = ""
    mark: str = ""
    between: str = ""
    opening: str = ""


CallStyle = Callable[[Sequence[Function], Mark, bool], CallRules]
"""Writes down the calls of some functions: these, how to name special tokens, and whether the
arguments of all functions have the form of their schema, not only of those with "strict"."""


def hermes(functions: Sequence[Function], mark: Mark, all_strict: bool) -> CallRules:
    """`<tool_call>`, an object, `</tool_call>`, each in a line of its own."""
    rules = _objects(functions, "arguments", all_strict)
    inside = f'"\\n" call "\\n" {mark("</tool_call>")}'
    return CallRules(rules, inside, mark="<tool_call>", between='"\\n"')


def llama3_json(functions: Sequence[Function], _mark: Mark, all_strict: bool) -> CallRules:
    """Objects, parted by semicolons."""
    rules = _objects(functions, "parameters", all_strict)
    return CallRules(rules, "call", 'call ("; " call)*', opening="{")


def mistral(functions: Sequence[Function], _mark: Mark, all_strict: bool) -> CallRules:
    """`[TOOL_CALLS]` and a list of objects."""
    rules = _objects(functions, "arguments", all_strict)
    several = '/ ?\\[/ call (", " call)* "]"'
    return CallRules(rules, '/ ?\\[/ call "]"', several, mark="[TOOL_CALLS]")


def mistral_v11(functions: Sequence[Function], mark: Mark, all_strict: bool) -> CallRules:
    """`[TOOL_CALLS]`, a name, `[ARGS]`, an object."""
    rules = []
    for index, function in enumerate(functions):
        name, schema = quoted(_plain_name(function)), _parameters(function, all_strict)
        rules.append(f"call_{index}: {name} {mark('[ARGS]')} args_{index}")
        rules.append(f"args_{index}: {value_rule(function['name'], schema)}")
    return CallRules([*rules, _choice(functions)], "call", mark="[TOOL_CALLS]")


def pythonic(functions: Sequence[Function], _mark: Mark, all_strict: bool) -> CallRules:
    """A list of calls as Python writes them."""
    rules = []
    for index, function in enumerate(functions):
        name, schema = _plain_name(function), _parameters(function, all_strict)
        rules.append(f'call_{index}: {quoted(f"{name}(")} keywords_{index}_0 ")"')
        rules += keyword_rules(name, schema, str(index))
    several = '"[" call (", " call)* "]"'
    return CallRules([*rules, _choice(functions)], '"[" call "]"', several, opening="[")


def qwen3_coder(functions: Sequence[Function], mark: Mark, all_strict: bool) -> CallRules:
    """`<tool_call>`, `<function=f>`, each argument in a tag, `</function>`, `</tool_call>`."""
    rules = [TAG_TEXT]
    for index, function in enumerate(functions):
        name, schema = _plain_name(function), _parameters(function, all_strict)
        begin, end = quoted(f"\n{FUNCTION}{name}>\n"), quoted(f"{FUNCTION_END}\n")
        rules.append(f"call_{index}: {begin} tags_{index} {end} {mark(CALL_END)}")
        rules += tag_rules(name, schema, str(index))
    return CallRules([*rules, _choice(functions)], "call", mark=CALL, between='"\\n"')


def _objects(functions: Sequence[Function], key: str, all_strict: bool) -> list[str]:
    """Rules for objects with a name and arguments, of which `call` is one."""
    rules = []
    for index, function in enumerate(functions):
        name, schema = function["name"], _parameters(function, all_strict)
        begin = f'{{"name": {json.dumps(name)}, "{key}": '
        rules.append(f'call_{index}: {quoted(begin)} args_{index} "}}"')
        rules.append(f"args_{index}: {value_rule(name, schema)}")
    return [*rules, _choice(functions)]


def _choice(functions: Sequence[Function]) -> str:
    return "call: " + " | ".join(f"call_{index}" for index in range(len(functions)))


def _plain_name(function: Function) -> str:
    name: str = function["name"]
    if not NAME.fullmatch(name):
        raise InvalidRequestError(
            f"this model cannot call {name!r}: names of functions consist of letters, digits, "
            "'_', '-' and '.'",
            "tools",
        )
    return name


def _parameters(function: Function, all_strict: bool) -> dict[str, Any]:
    """The schema of a function's arguments, less what does not bind them.

    Raises:
        InvalidRequestError: It is no schema of an object.
    """
    if not (all_strict or function.get("strict")):
        return ANY_PARAMETERS
    name, schema = function["name"], function.get("parameters")
    if not schema:
        return NO_PARAMETERS
    kind = schema.get("type", "object") if isinstance(schema, dict) else None
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequestError(
            f"{name}: 'parameters' must be a schema of type 'object', got {schema!r:.80}", "tools"
        )
    bound = {**_bare(schema), "type": "object"}
    return {**bound, **NO_PARAMETERS} if _takes_nothing(bound) else bound


def _takes_nothing(schema: Mapping[str, Any]) -> bool:
    """Whether it lists no properties and says nothing of others: so tools say they have none."""
    says_more = schema.keys() & (ABOUT_PROPERTIES | COMBINING)
    return schema.get("properties") == {} and not schema.get("required") and not says_more


def _bare(schema: Any) -> Any:
    """Leave out what only explains: descriptions are most of the text of most schemas."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in VERBATIM else _bare(value)
        for key, value in schema.items()
        # A property of that name has a schema.
        if not (key in ANNOTATIONS and not isinstance(value, dict | bool))
    }
