"""Requests that come and go on one event loop, while the engine runs in a process of its own.

python examples/async_example.py [MODEL]
"""

import asyncio
import sys
from contextlib import aclosing

from nanovllm import AsyncLLM, SamplingParams

PROMPTS = ["Once upon a time", "There was a king who", "The wolf said to the child"]


async def tell(llm: AsyncLLM, prompt: str) -> str:
    """Stream one completion; what has come so far is in the output all the time."""
    text = ""
    async for output in llm.generate(prompt, SamplingParams(temperature=0.8, max_tokens=60)):
        text = output.outputs[0].text
    return f"{prompt}{text}"


async def tell_until(llm: AsyncLLM, prompt: str, word: str) -> str:
    """Stop reading at a word; leaving the loop ends the request in the engine too."""
    text = ""
    params = SamplingParams(temperature=0.8, max_tokens=1000)
    async with aclosing(llm.generate(prompt, params)) as stream:
        async for output in stream:
            text = output.outputs[0].text
            if word in text:
                break
    return f"{prompt}{text.partition(word)[0]}"


async def main(model: str | None) -> None:
    """Run all requests at the same time."""
    async with AsyncLLM(model) as llm:
        tales = await asyncio.gather(
            *(tell(llm, prompt) for prompt in PROMPTS), tell_until(llm, PROMPTS[0], ".")
        )
    for tale in tales:
        sys.stdout.write(f"\n{tale}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
