"""The shortest way through all of the engine: prefill, decode, streaming, prefix cache.

    python examples/smoke_test.py ["a prompt"] [--max-new-tokens 32] [--model MODEL]

It ends with status 1 if the parts do not agree with each other.
"""

import argparse
import sys

from nanovllm import LLM, SamplingParams
from nanovllm.cli.generate import write_stream

PROMPT = "Once upon a time there was a king who had three sons, and the youngest of them"


def main() -> None:
    """Stream a completion, ask for it again from the cache, and check what came."""
    parser = argparse.ArgumentParser(description="Run prefill, decode and streaming once.")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--model", help="checkpoint or hub id; default: the bundled model")
    options = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=options.max_new_tokens)
    with LLM(options.model) as llm:
        sys.stdout.write(options.prompt)
        write_stream(llm.stream(options.prompt, params))
        # Again, and in one piece: now the prompt's whole blocks are in the prefix cache.
        output = llm.generate(options.prompt, params, use_tqdm=False)[0]
        is_whole = llm.decode(output.outputs[0].token_ids) == output["text"]
    sys.stdout.write(
        f"{len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them cached; "
        f"{len(output.outputs[0].token_ids)} generated; finish reason {output.finish_reason}\n"
    )
    if output.finish_reason not in ("stop", "length") or not is_whole:
        sys.exit("smoke test failed")


if __name__ == "__main__":
    main()
