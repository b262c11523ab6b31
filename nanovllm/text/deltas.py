"""What a model's message consists of, as it comes."""

from typing import NamedTuple


class ReasoningDelta(NamedTuple):
    """Text that the model thinks before it answers."""

    text: str


class ContentDelta(NamedTuple):
    """Text of the answer."""

    text: str


class ToolCallDelta(NamedTuple):
    """A call that begins, or more of its arguments.

    Args:
        index: Which call of the message it is, counted from 0.
        name: The function, with a call's first delta alone.
        arguments: What to append to the JSON text of its arguments.
    """

    index: int  # type: ignore[assignment]  # of a tuple it would be a method
    name: str | None
    arguments: str


Delta = ReasoningDelta | ContentDelta | ToolCallDelta
