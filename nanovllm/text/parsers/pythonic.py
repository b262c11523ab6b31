"""Calls written as Python does: `[f(a=1, b="x"), g()]`."""

from nanovllm.text.parsers.calls import NAME, CallParser, begin
from nanovllm.text.parsers.python_arguments import PythonArguments
from nanovllm.text.parsers.reader import BLANK, NotACallError, Reader, Steps
from nanovllm.text.parsers.writer import Writer


class PythonicParser(CallParser):
    """Lists of calls with keyword arguments that are literals, as of Llama 3.2 and 4."""

    marks = ("<|python_start|>",)
    ignored = ("<|python_end|>",)
    opening = "["

    def read_calls(self, reader: Reader, writer: Writer) -> Steps[None]:
        closed = yield from reader.expect("[")
        yield from reader.run(BLANK)
        while closed != "]":
            name = yield from reader.run(NAME)
            if not name or not (yield from reader.literal("(")):
                raise NotACallError
            keyword = yield from self._read_keyword(reader)
            begin(reader, writer, name)
            yield from PythonArguments(reader, writer.arguments, keyword).read()
            reader.hold()
            closed = yield from reader.expect(",", "]")
            if closed == ",":
                yield from reader.run(BLANK)
                closed = yield from reader.literal("]")
        reader.release()

    def _read_keyword(self, reader: Reader) -> Steps[str]:
        """Read up to the first argument's value and return its name, or "" if there is none."""
        yield from reader.run(BLANK)
        if (yield from reader.peek()) == ")":
            return ""
        keyword = yield from reader.run(NAME)
        yield from reader.expect("=")
        if not keyword or (yield from reader.peek()) in ("", "="):
            raise NotACallError
        return keyword
