"""A tool that the model calls, on a running server, `nanovllm serve`, by OpenAI's own client.

    python examples/tools.py [http://127.0.0.1:8000/v1]

`tool_choice` makes the bundled model call, which would not by itself; with one that knows of tools
leave it out, and go on for as long as there are calls.
"""

import argparse
import json
import os
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What the sky does.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Oslo"]},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def get_weather(city: str, unit: str) -> str:
    """The tool."""
    degrees = {"Paris": 21, "Oslo": 9}[city]
    return f"{degrees if unit == 'celsius' else degrees * 9 / 5 + 32} degrees"


def main(base_url: str) -> None:
    """Have one call made, tell what came of it, and ask for the answer."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "What is the weather like in Paris?"}
    ]
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    message = answer.choices[0].message
    messages.append(message.model_dump(exclude_none=True))  # type: ignore[arg-type]
    for call in message.tool_calls or []:
        if call.type == "function":
            result = get_weather(**json.loads(call.function.arguments))
            sys.stdout.write(f"{call.function.name}({call.function.arguments}): {result}\n")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    last = client.chat.completions.create(model=model, messages=messages, max_tokens=60)
    sys.stdout.write(f"{last.choices[0].message.content}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Have a tool called by a model.")
    parser.add_argument("base_url", nargs="?", default="http://127.0.0.1:8000/v1")
    main(parser.parse_args().base_url)
