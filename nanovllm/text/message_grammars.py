"""A whole message as a grammar: thoughts, then calls, an answer, or text in which calls may be."""

from collections.abc import Mapping

from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.text.call_grammars import CallRules, Mark
from nanovllm.text.grammars import embedded
from nanovllm.text.parsers.thoughts import ThoughtMarks

GAP = r"/\n{0,2}/"
"""What models write behind their thoughts, which is no part of the answer."""


def thoughts_rules(marks: ThoughtMarks, mark: Mark, *, must_end: bool, may_begin: bool) -> str:
    """Write down `thoughts`, which a message begins with.

    Args:
        marks: How they are marked.
        mark: Names special tokens.
        must_end: Whether they have begun, and end in any case.
        may_begin: Whether they may begin (again).
    """
    begin, thinking = mark(marks.begin), _up_to("thinking", "ANYTHING", mark(marks.end))
    whole = f"{begin} thinking {GAP}" if may_begin else ""
    if must_end:
        whole = f"({begin})? thinking {GAP}" if whole else f"thinking {GAP}"
    else:
        whole = f"({whole})?"
    return f"ANYTHING: /(.|\\n)*/\n{thinking}\nthoughts: {whole}\n"


def message_grammar(
    calls: CallRules | None,
    answer: StructuredOutputsParams | None,
    mark: Mark,
    *,
    special_tokens: Mapping[str, int],
    parallel: bool,
    free: bool,
    never: str,
) -> str:
    """Write down `message`, which is all but the thoughts.

    Args:
        calls: How to call tools; None if there are none to call.
        answer: The form of an answer; None if there is none, so that there are calls.
        mark: Names special tokens.
        special_tokens: See `nanovllm.text.grammars.lark`.
        parallel: Whether there may be more than one call.
        free: Whether there may be text instead of calls, and before them.
        never: What no text begins with, or "".
    """
    rules: list[str] = []
    bodies: list[str] = []
    if calls is not None:
        one = f"{mark(calls.mark) if calls.mark else ''} {calls.inside}"
        if parallel:
            several = f"{mark(calls.mark) if calls.mark else ''} {calls.several}"
            one = several if calls.several else f"{one} ({calls.between} {one})*"
        rules += [*calls.rules, f"calls: {one}"]
        bodies.append("calls")
    if free and calls is not None:
        rules += _text_rules(calls, mark, parallel, never)
        bodies = ["text"]
    if answer is not None:
        name, text = embedded(answer, "answer", special_tokens)
        rules.append(text)
        bodies.append(name)
    return "\n".join([*rules, f"message: {' | '.join(bodies)}", ""])


def _text_rules(calls: CallRules, mark: Mark, parallel: bool, never: str) -> list[str]:
    """Rules for `text`, anywhere in which, or at whose end, there may be calls."""
    less = rf" & ~/{never}(.|\n)*/" if never else ""
    if calls.opening:
        # No line of the text begins as a call does, so that what does is one.
        line = rf"[ \t\r]*([^\{calls.opening} \t\r\n][^\n]*)?"
        return [
            rf"TEXT: /{line}(\n{line})*/{less}",
            rf"LINES: /({line}\n)+/{less}",
            "text: TEXT | LINES? calls",
        ]
    whole = calls.several if parallel and calls.several else calls.inside
    lead = _up_to("lead", "TEXT", mark(calls.mark))
    body = f"(lead {whole})* TEXT" if parallel else f"TEXT | lead {whole}"
    return [rf"TEXT: /(.|\n)*/{less}", lead, f"text: {body}"]


def _up_to(name: str, text: str, mark: str) -> str:
    """Lark's rule for a text up to a mark, and that."""
    # Special tokens are in no text. A text that is not lazy would go on behind other marks.
    return f"{name}: {text} {mark}" if mark.startswith("<") else f"{name}[lazy]: {text} {mark}"
