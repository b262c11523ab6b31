"""One prompt, streamed over HTTP by our server and by another with OpenAI's API.

    python benchmarks/server_bench.py ["a prompt"] [--max-new-tokens 128] [--model ...]

Without `--url` it starts `nanovllm serve`. A server that does not answer is left out.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from family import PREVIEW_LEN, prompt_parser, say

from nanovllm.bench.http import HTTPClient
from nanovllm.bench.load import read_events

PROMPT = "Explain how streaming token generation affects TTFB."
START_TIMEOUT = 300.0


@contextmanager
def our_server(model: str | None) -> Iterator[str]:
    """Run `nanovllm serve` on a free port; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nanovllm", "serve", *([model] if model else [])]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        url = f"http://127.0.0.1:{port}"
        while not asyncio.run(is_ready(url)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("nanovllm serve did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def is_ready(url: str) -> bool:
    try:
        async with HTTPClient(url).send("GET", "/ready") as response:
            return response.status == 200
    except OSError:
        return False


async def stream(url: str, prompt: str, max_new_tokens: int) -> tuple[str, int, float, float]:
    """Text, number of tokens, seconds to the first of them and to the last."""
    client = HTTPClient(url)
    async with client.send("GET", "/v1/models") as response:
        model = json.loads(await response.read())["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    text, num_tokens, ttfb = "", 0, 0.0
    start = time.perf_counter()
    async with client.send("POST", "/v1/completions", json.dumps(body).encode()) as response:
        if response.status != 200:
            raise RuntimeError((await response.read()).decode())
        async for now, event in read_events(response):
            text += "".join(choice.text or "" for choice in event.choices)
            ttfb = ttfb or now - start
            num_tokens = event.usage.completion_tokens if event.usage else num_tokens
    return text, num_tokens, ttfb, time.perf_counter() - start


def show(name: str, url: str, prompt: str, max_new_tokens: int) -> None:
    """Print the family's line for a server, and how its text begins."""
    try:
        text, tokens, ttfb, seconds = asyncio.run(stream(url, prompt, max_new_tokens))
    except OSError as e:
        say(f"- {name:<10} left out: {url} does not answer ({e})")
        return
    say(
        f"- {name:<10} TTFB={ttfb:.3f}s duration={seconds:.3f}s tokens={tokens} "
        f"throughput={tokens / seconds:.2f} tok/s"
    )
    say(f"  {text[:PREVIEW_LEN]!r}")


def main() -> None:
    parser = prompt_parser(__doc__, PROMPT)
    parser.add_argument("--url", help="our server; default: start one")
    parser.add_argument("--sglang-url", default="http://localhost:30000", help="the other server")
    options = parser.parse_args()
    say(f"Server benchmark prompt={options.prompt!r} | max_new_tokens={options.max_new_tokens}")
    show("other", options.sglang_url, options.prompt, options.max_new_tokens)
    if options.url is not None:
        show("nanovllm", options.url, options.prompt, options.max_new_tokens)
        return
    with our_server(options.model) as url:
        show("nanovllm", url, options.prompt, options.max_new_tokens)


if __name__ == "__main__":
    main()
