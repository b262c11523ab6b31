"""Ask a model in the terminal; every line is a prompt of its own or, with --multi-turn, a turn.

    python examples/cli_demo.py [--multi-turn] [--max-new-tokens 512] [--model MODEL]

`nanovllm chat` does more.
"""

import argparse
import sys
from collections.abc import Iterator

from nanovllm import LLM, SamplingParams
from nanovllm.cli.generate import write_stream


def lines() -> Iterator[str]:
    """Lines of standard input up to its end, an empty one, or `/exit`."""
    try:
        while (line := input("> " if sys.stdin.isatty() else "").strip()) not in ("", "/exit"):
            yield line
    except EOFError:
        return


def main() -> None:
    """Answer line by line."""
    parser = argparse.ArgumentParser(description="Ask a model in the terminal.")
    parser.add_argument("--multi-turn", action="store_true", help="remember the turns before")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--model", help="checkpoint or hub id; default: the bundled model")
    options = parser.parse_args()
    with LLM(options.model) as llm:
        params = SamplingParams(temperature=0.7, max_tokens=options.max_new_tokens)
        messages: list[dict[str, str]] = []
        for line in lines():
            if not options.multi_turn:
                messages.clear()
            messages.append({"role": "user", "content": line})
            answer = write_stream(llm.stream_chat(messages, params))
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
