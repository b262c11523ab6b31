"""Measure the demo model with the engine: bits per byte on held-out tales, and what it copies.

    python scripts/evaluate_demo.py

The share of copied 8-grams is that of the eight-word windows of sampled text that stand, case and
punctuation aside, anywhere in the training tales.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from train_demo import CORPUS, END_OF_TEXT, read_tales

from nanovllm import LLM, SamplingParams

NGRAM = 8
PROMPTS = ("Once upon a time", "There was once a king who", "The fox said to the wolf", "")


def bits_per_byte(llm: LLM, tales: list[str]) -> float:
    """Cross entropy over whole tales, end of text included, in bits per byte of their UTF-8.

    A tale longer than the context is read in windows that each start afresh.
    """
    end = llm.encode(END_OF_TEXT)
    size = llm.engine.max_model_len - 2  # a token to begin after, and one that is generated
    windows = []
    for tale in tales:
        token_ids = end + llm.encode(tale) + end
        windows += [token_ids[i : i + size + 1] for i in range(0, len(token_ids) - 1, size)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    nats = 0.0
    for window, output in zip(windows, llm.generate(windows, params), strict=True):
        scores = zip(window[1:], (output.prompt_logprobs or [])[1:], strict=True)
        nats -= sum(entry[token_id].logprob for token_id, entry in scores if entry is not None)
    return nats / math.log(2) / sum(len(tale.encode()) for tale in tales)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def sample_tales(llm: LLM, count: int, temperature: float, max_tokens: int) -> list[str]:
    """Sample `count` texts, each prompt in turn."""
    prompts = [PROMPTS[i % len(PROMPTS)] or END_OF_TEXT for i in range(count)]
    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i) for i in range(count)
    ]
    return [output.outputs[0].text for output in llm.generate(prompts, params)]


def copied_share(texts: list[str], tales: list[str]) -> float:
    """Share of the texts' 8-grams that stand in the tales."""
    known = set().union(*(ngrams(tale) for tale in tales))
    found = [ngram for text in texts for ngram in ngrams(text)]
    return sum(ngram in known for ngram in found) / max(len(found), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of the model; the bundled one by default")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    train, held_out = read_tales(args.corpus)
    with LLM(args.model, dtype="float32") as llm:
        report: dict[str, object] = {"held_out_bits_per_byte": bits_per_byte(llm, held_out)}
        for temperature in (0.7, 1.0):
            texts = sample_tales(llm, args.samples, temperature, 300)
            report[f"copied_8grams_at_{temperature}"] = copied_share(texts, train)
    report["samples"] = texts[:3]
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
