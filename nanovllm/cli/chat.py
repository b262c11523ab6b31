"""`nanovllm chat`: a conversation in the terminal, or from a pipe."""

import sys
from contextlib import suppress

from nanovllm.cli.generate import write_stream
from nanovllm.cli.options import DEFAULT_CONFIG, DEFAULT_SAMPLING, Engine, Sampling, open_llm
from nanovllm.errors import InvalidRequestError

Messages = list[dict[str, str]]


def chat(
    *,
    system: str | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    engine: Engine = DEFAULT_CONFIG,
) -> None:
    """Talk with a model, turn by turn. `/reset` forgets the turns so far, `/exit` ends.

    Args:
        system: System message that every conversation begins with.
        sampling: How to sample; without `--max-tokens` an answer may fill the context.
        engine: The engine.
    """
    opening: Messages = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    with open_llm(engine) as llm:
        params = sampling.over(llm.default_sampling_params(), max_tokens=None)
        while (line := _read_line()) not in (None, "/exit"):
            if line == "/reset":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = write_stream(llm.stream_chat(messages, params))
                except InvalidRequestError as e:
                    sys.stderr.write(f"{e}; /reset starts afresh\n")
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """Return the next line, or None at the end of the input."""
    with suppress(ImportError):  # gives `input` a history, where the platform has it
        import readline  # noqa: F401
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
