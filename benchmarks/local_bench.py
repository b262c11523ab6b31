"""One prompt, streamed by the engine in this process and, where installed, by transformers.

python benchmarks/local_bench.py ["a prompt"] [--max-new-tokens 128] [--model ...]
"""

import logging
import time
from importlib.util import find_spec

from family import PREVIEW_LEN, prompt_parser, say, say_where

from nanovllm import LLM, SamplingParams
from nanovllm.config import DEMO_MODEL

PROMPT = "Explain how streaming reduces latency for chat users."


def run_ours(llm: LLM, prompt: str, max_new_tokens: int) -> tuple[str, int, float]:
    """Text, number of tokens and seconds of a greedy completion."""
    start = time.perf_counter()
    *_, last = llm.stream(prompt, SamplingParams(temperature=0, max_tokens=max_new_tokens))
    return last.outputs[0].text, len(last.outputs[0].token_ids), time.perf_counter() - start


def run_transformers(model: str, prompt: str, max_new_tokens: int) -> tuple[str, int, float]:
    """The same by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    inputs = tokenizer(prompt, return_tensors="pt")
    start = time.perf_counter()
    ids = network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    seconds = time.perf_counter() - start
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new_ids, skip_special_tokens=True), len(new_ids), seconds


def main() -> None:
    parser = prompt_parser(__doc__, PROMPT)
    parser.add_argument("--log-level", default="INFO")
    options = parser.parse_args()
    logging.basicConfig(level=options.log_level.upper())
    say(f"Benchmarking prompt={options.prompt!r} | max_new_tokens={options.max_new_tokens}")
    with LLM(options.model) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8), use_tqdm=False)
        results = {"nanovllm": run_ours(llm, options.prompt, options.max_new_tokens)}
        if find_spec("transformers") is not None:
            directory = options.model or str(DEMO_MODEL)
            results["transformers"] = run_transformers(
                directory, options.prompt, options.max_new_tokens
            )
        for name, (_, tokens, seconds) in results.items():
            say(
                f"- {name + ':':<14}tokens={tokens} duration={seconds:.3f}s "
                f"throughput={tokens / seconds:.2f} tok/s"
            )
        for name, (text, _, _) in results.items():
            say(f"- {name + ':':<14}{text[:PREVIEW_LEN]!r}")
        say_where(llm)


if __name__ == "__main__":
    main()
