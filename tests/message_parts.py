"""What a message's deltas add up to."""

from collections.abc import Iterable
from typing import NamedTuple

from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta


class Parts(NamedTuple):
    """A whole message.

    Args:
        reasoning: The thoughts.
        content: The answer.
        calls: Names and the JSON text of arguments.
    """

    reasoning: str
    content: str
    calls: list[tuple[str, str]]


def total(deltas: Iterable[Delta]) -> Parts:
    """Add up a message's deltas, and see that each is in order."""
    reasoning, content = "", ""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, ReasoningDelta):
            assert delta.text
            assert not content
            assert not calls
            reasoning += delta.text
        elif isinstance(delta, ContentDelta):
            assert delta.text
            content += delta.text
        elif delta.name is not None:
            assert delta.index == len(calls)
            assert delta.name
            calls.append((delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1
            assert delta.arguments
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + delta.arguments)
    return Parts(reasoning, content, calls)
