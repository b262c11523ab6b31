"""What users of litellm do. Arguments: the server's URL, its model."""

# mypy: disable-error-code="import-not-found"

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import litellm

URL, MODEL = sys.argv[1:]
ASKED = [{"role": "user", "content": "Tell me a fairy tale."}]
# The dialect of vLLM servers, and that of any server with OpenAI's API.
ROUTES: list[dict[str, Any]] = [
    {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1"},
    {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "any"},
]
TEXT_ROUTES: list[dict[str, Any]] = [
    {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1"},
    {"model": f"text-completion-openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "any"},
]
litellm.suppress_debug_info = True
SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "num_retries": 0}


def check_chat(route: dict[str, Any]) -> None:
    """Whole and streamed answers agree, and count their tokens."""
    request = route | SETTINGS | {"messages": ASKED}
    whole = litellm.completion(**request)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(
        litellm.completion(**request, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    built = litellm.stream_chunk_builder(chunks, messages=ASKED)
    assert built.choices[0].message.content == text
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def check_options(route: dict[str, Any]) -> None:
    """What OpenAI's API has besides, and what vLLM adds to it."""
    request = route | SETTINGS | {"messages": ASKED, "temperature": 1}
    answer = litellm.completion(**request, n=2, seed=1, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    assert all(len(t.top_logprobs) == 2 for t in answer.choices[0].logprobs.content)
    answer = litellm.completion(**request, top_k=1, extra_body={"min_p": 0.1, "ignore_eos": True})
    assert answer.usage.completion_tokens == 12
    stopped = litellm.completion(**request | {"temperature": 0}, stop=["a"])
    assert "a" not in stopped.choices[0].message.content


def check_text(route: dict[str, Any]) -> None:
    """The older API."""
    request = route | SETTINGS | {"prompt": "Once upon a time"}
    text = litellm.text_completion(**request).choices[0].text
    assert text
    chunks = litellm.text_completion(**request, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == text


def check_errors(route: dict[str, Any]) -> None:
    """Each error arrives as the class that litellm's users catch."""
    request = route | SETTINGS | {"messages": ASKED}
    long = [{"role": "user", "content": "far away " * 5000}]
    expect(litellm.ContextWindowExceededError, **request | {"messages": long})
    expect(litellm.NotFoundError, **request | {"model": f"{request['model']}-2"})
    expect(litellm.BadRequestError, **request | {"temperature": -1})
    never = {"name": "never", "schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}
    form = {"type": "json_schema", "json_schema": never}
    expect(litellm.BadRequestError, **request, response_format=form)


def expect(error: type[Exception], **request: Any) -> None:
    """The request fails so, whole and streamed."""
    for stream in (False, True):
        try:
            answer = litellm.completion(**request, stream=stream)
            if stream:
                list(answer)
        except error:
            continue
        raise AssertionError(f"no {error.__name__} with stream={stream}")


async def check_async(route: dict[str, Any]) -> None:
    """Many requests at once, each the answer it gets alone."""
    request = route | SETTINGS | {"messages": ASKED}
    answers = await asyncio.gather(*(litellm.acompletion(**request) for _ in range(8)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    stream = await litellm.acompletion(**request, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answers[0].choices[0].message.content


def main() -> None:
    checks: list[Callable[[dict[str, Any]], None]] = [check_chat, check_options, check_errors]
    for route in ROUTES:
        for check in checks:
            check(route)
        asyncio.run(check_async(route))
    for route in TEXT_ROUTES:
        check_text(route)


main()
