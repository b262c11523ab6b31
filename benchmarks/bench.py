"""nano-vllm's benchmark: 256 requests at once, 100 to 1024 random tokens in and as many out.

    python benchmarks/bench.py [--model Qwen/Qwen3-0.6B]

`nanovllm bench offline` runs the same and says more.
"""

from family import model_parser, open_model, show_offline

from nanovllm.bench.offline import make_workload


def main() -> None:
    options = model_parser(__doc__).parse_args()
    with open_model(options.model) as llm:
        show_offline(llm, make_workload(llm.model_config.vocab_size))


if __name__ == "__main__":
    main()
