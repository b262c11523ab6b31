"""A running server, `nanovllm serve`, asked by OpenAI's own client (`pip install openai`).

    python examples/openai_client.py [http://127.0.0.1:8000/v1]

The key is what the server was given with `--api-key`; without one it takes any.
"""

import argparse
import os
import sys

from openai import OpenAI


def main(base_url: str) -> None:
    """Stream one answer."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me of a wolf."}],
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 50},  # what OpenAI does not know goes here, as with vLLM
    ) as stream:
        for event in stream:
            for choice in event.choices:
                sys.stdout.write(choice.delta.content or "")
                sys.stdout.flush()
            if event.usage is not None:
                sys.stdout.write(f"\n({event.usage.completion_tokens} tokens of {model})\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stream one answer of a running server.")
    parser.add_argument("base_url", nargs="?", default="http://127.0.0.1:8000/v1")
    main(parser.parse_args().base_url)
