"""`nanovllm generate`: one prompt, written on."""

import json as json_format
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanovllm.cli.options import (
    DEFAULT_CONFIG,
    DEFAULT_SAMPLING,
    Engine,
    Sampling,
    open_llm,
)
from nanovllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from nanovllm.outputs import RequestOutput

DEFAULT_MAX_TOKENS = 200


def generate(
    prompt: str | None = None,
    /,
    *,
    file: Path | None = None,
    json: bool = False,
    n: Annotated[int, Parameter(name=["--n", "-n"])] = 1,
    sampling: Sampling = DEFAULT_SAMPLING,
    engine: Engine = DEFAULT_CONFIG,
) -> None:
    """Write on from a prompt, as it comes; at most 200 tokens unless `--max-tokens` says else.

    Args:
        prompt: The prompt. Without one, and without `--file`, it is read from standard input.
        file: File whose whole text is the prompt.
        json: Whether to print one JSON object at the end, with token ids and timings.
        n: Completions of the same prompt; more than one needs `--json`.
        sampling: How to sample.
        engine: The engine.
    """
    if n > 1 and not json:
        raise InvalidRequestError("-n above 1 needs --json: one stream shows one completion", "n")
    text = read_prompt(prompt, file)
    with open_llm(engine) as llm:
        params = sampling.over(llm.default_sampling_params(), max_tokens=DEFAULT_MAX_TOKENS, n=n)
        if json:
            output = llm.generate(text, params, use_tqdm=False)[0]
            sys.stdout.write(json_format.dumps(describe(output), ensure_ascii=False) + "\n")
        else:
            write_stream(llm.stream(text, params))


def read_prompt(
    prompt: str | None, file: Path | None, example: str = 'nanovllm generate "Once upon a time"'
) -> str:
    """Return the prompt from where it was given, without the newline that ends a file."""
    if prompt is not None:
        if file is not None:
            raise InvalidRequestError("give the prompt or --file, not both", "file")
        return prompt
    if file is None and sys.stdin.isatty():
        raise InvalidRequestError(
            f"no prompt: give one in quotes, as in {example}, or --file, or pipe it in",
            "prompt",
        )
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InvalidRequestError(f"the prompt is not UTF-8 text: {e}", "prompt") from e
    return text.removesuffix("\n").removesuffix("\r")


def write_stream(outputs: "Iterator[RequestOutput]") -> str:
    """Write a text to standard output while it grows; return it."""
    text = ""
    for output in outputs:
        if output.finish_reason == "error":
            sys.stderr.write(f"nanovllm: error: {output.stop_reason}\n")
            sys.exit(1)
        grown = output.outputs[0].text
        sys.stdout.write(grown[len(text) :])
        sys.stdout.flush()
        text = grown
    if not text.endswith("\n"):
        sys.stdout.write("\n")
    return text


def describe(output: "RequestOutput") -> dict[str, Any]:
    """Return what `--json` prints of a finished request; times are seconds since it came."""
    metrics = output.metrics

    def since_arrival(time: float | None) -> float | None:
        return None if time is None else round(time - metrics.arrival_time, 6)

    described: dict[str, Any] = {
        "text": output.outputs[0].text,
        "token_ids": output.outputs[0].token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        "num_cached_tokens": output.num_cached_tokens,
        "timings": {
            "scheduled": since_arrival(metrics.first_scheduled_time),
            "first_token": since_arrival(metrics.first_token_time),
            "finished": since_arrival(metrics.finished_time),
        },
    }
    if len(output.outputs) > 1:
        described["outputs"] = [
            {
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            for completion in output.outputs
        ]
    return described
