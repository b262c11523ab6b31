"""The smallest benchmark, to run before `bench.py`: 2 requests, 50 to 100 tokens in, 5 to 10 out.

python benchmarks/mini_bench.py [--model Qwen/Qwen3-0.6B]
"""

from family import model_parser, open_model, show_offline

from nanovllm.bench.offline import draw_workload


def main() -> None:
    options = model_parser(__doc__).parse_args()
    with open_model(options.model) as llm:
        show_offline(llm, draw_workload(llm.model_config.vocab_size, 2, (50, 100), (5, 10)))


if __name__ == "__main__":
    main()
