"""Thoughts: what a model writes between `<think>` and `</think>` before it answers."""

import re
from dataclasses import dataclass

from nanovllm.text.parsers.reader import BLANK, Markers, NotACallError, Reader, Steps
from nanovllm.text.parsers.writer import Writer

NEWLINES = re.compile(r"[\r\n]*")


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """How a model marks its thoughts.

    Args:
        begin: What they begin with.
        end: What they end with.
        always: Whether the model thinks even where it does not say that it begins to, so that all
            up to `end` is thought.
    """

    begin: str
    end: str
    always: bool = False


def read_thoughts(
    reader: Reader, writer: Writer, marks: ThoughtMarks, *, begun: bool
) -> Steps[None]:
    """Read the thoughts at the beginning of a message, if there are any.

    Args:
        reader: At the beginning of the message.
        writer: Takes the thoughts.
        marks: What they are marked with.
        begun: Whether the prompt has begun them; the model may say so again.
    """
    reader.hold()
    try:
        yield from reader.run(BLANK)
        found = yield from reader.literal(marks.begin)
    except NotACallError:
        found = ""
    if not found:
        reader.rewind()
        if not begun:
            return
    reader.release()
    yield from reader.until(Markers([marks.end]), writer.reasoning)
    writer.drop_blanks()
    yield from reader.run(NEWLINES)
