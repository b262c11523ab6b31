"""Several prompts at once, each answered by the model's chat template.

    python examples/example.py [MODEL]

MODEL is a checkpoint's directory or a hub id; without one the bundled model tells a tale.
"""

import sys

from nanovllm import LLM, SamplingParams

PROMPTS = ["introduce yourself", "list all prime numbers within 100"]


def main(model: str | None) -> None:
    """Answer all prompts in one batch."""
    with LLM(model, max_model_len=2048) as llm:
        conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        outputs = llm.chat(conversations, SamplingParams(temperature=0.6, max_tokens=256))
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            sys.stdout.write(f"\nPrompt: {prompt!r}\nCompletion: {output['text']!r}\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
