"""The form that an output must have, as a Lark grammar of llguidance.

The dialect is https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.text.conjunctions import LITERALS, check_operators
from nanovllm.text.json_schemas import check_schema, json_rule

MAX_GRAMMAR_SIZE = 64 * 1024
"""Characters of a form, in this grammar's text as in what it is made of."""

MAX_COMPOSED_SIZE = 512 * 1024
"""The same of a grammar that is composed of many forms: it takes less than a second, and 35 MB."""

MAX_RULES = 1000
"""Rules and terminals of a grammar; two thousand, each of which is part of the next, have ended the
process that compiles them."""

# `re` keeps the whole process waiting: none may look twice at what it has seen.
_GBNF_RULE = re.compile(r"^[^\S\n]*[\w-]+[^\S\n]*::=", re.MULTILINE)
_RULE = re.compile(r"^[^\S\n]*[^\s:]+[^\S\n]*:", re.MULTILINE)
_TOKEN_NAME = re.compile(rf"{LITERALS.pattern}|(<[^<>\s]+>)")


@dataclass(slots=True, kw_only=True)
class ComposedGrammar(StructuredOutputsParams):
    """A whole grammar in Lark that this package has put together of forms it has checked."""


class LarkRules(NamedTuple):
    """A rule to refer to, and the text that defines it."""

    name: str
    text: str


class Structure(msgspec.Struct):
    """A tag: how it begins, what is in it, and how it ends."""

    begin: str
    schema: dict[str, Any] | bool
    end: str = ""


class StructuralTag(msgspec.Struct):
    """Tags, each of which begins with one of the triggers."""

    structures: list[Structure]
    triggers: list[str]


def lark(params: StructuredOutputsParams, special_tokens: Mapping[str, int] | None = None) -> str:
    """Write a form down as a whole grammar, whose first rule is `start`.

    Args:
        params: The form.
        special_tokens: Ids of the tokens that are no characters, by their text, such as
            "<|im_end|>". As a trigger, or outside the quotes of a grammar, such a text is the
            token; anywhere else it is what it is made of.

    Raises:
        InvalidRequestError: It is not well-formed, or too large; `param` is the field to blame.
            Whether it can be enforced is up to `GrammarCompiler`.
    """
    kind = params.kind
    special_tokens = special_tokens or {}
    if isinstance(params, ComposedGrammar) and params.grammar is not None:
        if len(params.grammar) > MAX_COMPOSED_SIZE:
            raise _too_large(kind, len(params.grammar), MAX_COMPOSED_SIZE)
        return params.grammar
    _check_size(params, kind)
    try:
        if params.json is not None:
            text = f"start: {json_rule(params.json)}\n"
        elif params.json_object is not None:
            text = f"start: {json_rule({'type': 'object'})}\n"
        elif params.regex is not None:
            text = f"start: FORM\nFORM: /{regex_to_lark(params.regex)}/\n"
        elif params.choice is not None:
            # As a terminal it is one automaton, however many there are.
            text = f"start: FORM\nFORM: {' | '.join(map(quoted, params.choice))}\n"
        elif params.grammar is not None:
            text = _grammar(params.grammar, special_tokens)
        else:
            text = _structural_tag(params.structural_tag or {}, special_tokens)
    except InvalidRequestError as e:
        raise InvalidRequestError(f"{kind}: {e}", kind) from e
    except (ValueError, TypeError, RecursionError) as e:
        raise InvalidRequestError(f"{kind} is not well-formed: {e}", kind) from e
    if len(text) > MAX_GRAMMAR_SIZE:
        raise _too_large(kind, len(text))
    return text


def embedded(
    params: StructuredOutputsParams,
    name: str = "answer",
    special_tokens: Mapping[str, int] | None = None,
) -> LarkRules:
    """Write a form down as one rule of a larger grammar; see `lark`."""
    text = lark(params, special_tokens)
    # The block ends in a line of its own: the last one of the text may be a comment.
    return LarkRules(name, f"{name}: %lark {{\n{text}\n}}\n")


def quoted(text: str) -> str:
    """A text as Lark's literal, in which nothing is a special token."""
    return json.dumps(text) if text else '""'


def token_name(token_id: int) -> str:
    """A special token in Lark, which knows none by its text."""
    return f"<[{token_id}]>"


def _grammar(text: str, special_tokens: Mapping[str, int]) -> str:
    """A user's grammar as Lark.

    Raises:
        InvalidRequestError: It has a schema that we do not take.
        ValueError: It is not well-formed.
    """
    if _GBNF_RULE.search(text):
        try:
            # The library's own patterns take seconds for runs of blank lines.
            text = any_to_lark("\n".join(line for line in text.split("\n") if line.strip()))
        except RecursionError as e:
            raise InvalidRequestError("it is nested too deeply") from e
        except Exception as e:  # of the library, which knows no better class
            raise InvalidRequestError(str(e)) from e
    check_operators(text)
    if len(_RULE.findall(text)) > MAX_RULES:
        raise InvalidRequestError(f"it has more than {MAX_RULES} rules")
    decoder = json.JSONDecoder()
    for match in re.finditer(r"%json\b\s*", text):
        check_schema(decoder.raw_decode(text, match.end())[0])

    def by_id(match: re.Match[str]) -> str:
        token_id = special_tokens.get(match[1])
        return match[0] if token_id is None else token_name(token_id)

    return _TOKEN_NAME.sub(by_id, text)


def _structural_tag(tag: str | Mapping[str, Any], special_tokens: Mapping[str, int]) -> str:
    """Free text in which whatever begins with a trigger is one of the tags.

    Raises:
        InvalidRequestError: It has another shape.
        ValueError: It is not JSON.
    """
    parsed = msgspec.convert(json.loads(tag) if isinstance(tag, str) else tag, StructuralTag)
    if not parsed.structures or not all(parsed.triggers):
        raise InvalidRequestError("'structures' and 'triggers' must not be empty")
    rules = [
        "TEXT: /(.|\\n)*/",
        f"start: ({' | '.join(f'tag_{index}' for index in range(len(parsed.structures)))})* rest",
        "rest: TEXT",
    ]
    for index, (begin, schema, end) in enumerate(map(msgspec.structs.astuple, parsed.structures)):
        trigger = next((text for text in parsed.triggers if begin.startswith(text)), None)
        if trigger is None:
            raise InvalidRequestError(f"{begin!r:.80} begins with none of the triggers")
        body = f"{quoted(begin[len(trigger) :])} {json_rule(schema)} {quoted(end)}"
        if trigger in special_tokens:
            rules.append(f"tag_{index}: TEXT {token_name(special_tokens[trigger])} {body}")
        else:
            # Lazy: the text ends where the trigger does, and what follows is the tag.
            rules.append(f"trigger_{index}[lazy]: TEXT {quoted(trigger)}")
            rules.append(f"tag_{index}: trigger_{index} {body}")
    return "\n".join(rules) + "\n"


def _check_size(params: StructuredOutputsParams, kind: str) -> None:
    value = getattr(params, kind)
    if isinstance(value, str) and len(value) > MAX_GRAMMAR_SIZE:
        raise _too_large(kind, len(value))
    if isinstance(value, list) and sum(map(len, value)) > MAX_GRAMMAR_SIZE:
        raise _too_large(kind, sum(map(len, value)))


def _too_large(kind: str, size: int, most: int = MAX_GRAMMAR_SIZE) -> InvalidRequestError:
    return InvalidRequestError(
        f"{kind} has {size} characters as a grammar, more than the {most} we take: make it smaller",
        kind,
    )
