"""What a grammar costs per token, and how many tokens it saves a step.

    python benchmarks/structured_output.py [--rounds 5] [--num-seqs 8] [--model DIR] [--json]

The same requests run in turns without a form, with a form in which every token is free (text of a
fixed length), and with JSON schemas whose certain tokens are taken without a step, or not.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from header import headline, machine
from rich.console import Console
from rich.table import Table

from nanovllm import LLM, SamplingParams, StructuredOutputsParams

PROMPT = "Once upon a time there was"
NUM_FREE_CHARS = 2000
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "occupation": {"enum": ["carpenter", "fisherman", "shepherd", "musician"]},
        "age_in_years": {"type": "integer", "minimum": 10, "maximum": 99},
        "is_enchanted": {"type": "boolean"},
    },
    "required": ["first_name", "occupation", "age_in_years", "is_enchanted"],
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the rounds of one way to run.

    Args:
        way: Which one.
        us_per_token: Microseconds of the whole run for each token that came out.
        us_per_step: The same for each step.
        num_tokens: Tokens that came out.
        num_forced: Of these, tokens without a step of their own.
    """

    way: str
    us_per_token: float
    us_per_step: float
    num_tokens: int
    num_forced: int


def ways(num_tokens: int) -> dict[str, SamplingParams]:
    free = StructuredOutputsParams(regex=f"(?s:.){{{NUM_FREE_CHARS}}}")
    person = StructuredOutputsParams(json=PERSON)
    length: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True}
    return {
        "no form": SamplingParams(**length),
        "free text as a form": SamplingParams(structured_outputs=free, **length),
        "schema": SamplingParams(structured_outputs=person, max_tokens=200),
        # Where stop ids are asked for, every token is sampled.
        "schema, nothing forced": SamplingParams(
            structured_outputs=person, max_tokens=200, stop_token_ids=[0]
        ),
    }


def measure(llm: LLM, params: SamplingParams, num_seqs: int, seed: int) -> tuple[float, Any, Any]:
    """Run all requests once; returns seconds, and the engine's counters before and after."""
    params.seed = seed
    before = asdict(llm.engine.stats())
    begun = time.perf_counter()
    llm.generate([PROMPT] * num_seqs, params, use_tqdm=False)
    return time.perf_counter() - begun, before, asdict(llm.engine.stats())


def run(llm: LLM, rounds: int, num_seqs: int, num_tokens: int) -> list[Figures]:
    given = ways(num_tokens)
    samples: dict[str, list[tuple[float, float, int, int]]] = {way: [] for way in given}
    for number in range(rounds + 1):
        for way, params in given.items():
            seconds, before, after = measure(llm, params, num_seqs, number)
            tokens, forced, steps = (
                after[name] - before[name]
                for name in ("num_output_tokens", "num_forced_tokens", "num_steps")
            )
            if number:  # the first round warms up
                sample = (seconds / tokens * 1e6, seconds / steps * 1e6, tokens, forced)
                samples[way].append(sample)
    return [
        Figures(
            way,
            statistics.median(sample[0] for sample in taken),
            statistics.median(sample[1] for sample in taken),
            sum(sample[2] for sample in taken),
            sum(sample[3] for sample in taken),
        )
        for way, taken in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint; the bundled model if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-seqs", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with LLM(args.model, max_num_seqs=args.num_seqs, seed=0) as llm:
        figures = run(llm, args.rounds, args.num_seqs, args.num_tokens)
        settings = (f"{llm.config.model_id}", f"{args.num_seqs} sequences", f"{args.rounds} rounds")
    if args.json:
        result = {**machine(), "settings": settings, "figures": [asdict(row) for row in figures]}
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    table = Table("way", "us a token", "us a step", "tokens", "of these forced")
    for row in figures:
        share = f"{row.num_forced} ({row.num_forced / row.num_tokens:.0%})"
        table.add_row(
            row.way,
            f"{row.us_per_token:.0f}",
            f"{row.us_per_step:.0f}",
            str(row.num_tokens),
            share,
        )
    console = Console()
    console.print(headline(*settings), highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
