"""Requests that arrive at random moments at an engine in this process, stepped in a loop.

    python benchmarks/serving_bench.py [--num-requests 256] [--request-rate 8] [--model ...]

Gaps are exponentially distributed and times count from the moment a request arrives, also while a
step keeps the loop busy. `nanovllm bench serve` puts a server under such a load, over HTTP.
"""

import math
import time
from statistics import fmean

from family import model_parser, open_model, say, say_where

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.bench.load import send_times
from nanovllm.bench.offline import Workload, draw_workload

LENGTHS = (100, 1024)


def serve(llm: LLM, workload: Workload, arrivals: list[float]) -> dict[str, RequestOutput]:
    """Step until all requests have come and are done; returns them by id, in order of arrival."""
    arriving = zip(workload.prompts, workload.output_lens, arrivals, strict=True)
    upcoming = next(arriving, None)
    outputs: dict[str, RequestOutput] = {}
    while upcoming is not None or llm.has_unfinished():
        while upcoming is not None and upcoming[2] <= time.monotonic():
            prompt, output_len, _ = upcoming
            params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output_len)
            llm.add_request(prompt, params)
            upcoming = next(arriving, None)
        if llm.has_unfinished():
            outputs |= {output.request_id: output for output in llm.step()}
        elif upcoming is not None:
            time.sleep(max(0.0, upcoming[2] - time.monotonic()))
    return dict(sorted(outputs.items(), key=lambda item: int(item[0])))


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--request-rate", type=float, default=8, help="requests per second")
    options = parser.parse_args()
    with open_model(options.model) as llm:
        vocab_size = llm.model_config.vocab_size
        workload = draw_workload(vocab_size, options.num_requests, LENGTHS, LENGTHS)
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8), use_tqdm=False)
        start = time.monotonic()
        offsets = send_times(options.num_requests, options.request_rate, seed=0)
        arrivals = [start + offset for offset in offsets]
        outputs = serve(llm, workload, arrivals)
        seconds = time.monotonic() - start
        show(list(outputs.values()), arrivals, seconds)
        say_where(llm)


def show(outputs: list[RequestOutput], arrivals: list[float], seconds: float) -> None:
    """Print the family's figures."""
    ttft, tpot, latency = [], [], []
    for output, arrival in zip(outputs, arrivals, strict=True):
        first, last = output.metrics.first_token_time, output.metrics.finished_time
        if first is None or last is None:
            raise RuntimeError(f"request {output.request_id} ended without a token")
        ttft.append(first - arrival)
        latency.append(last - arrival)
        if len(output.outputs[0].token_ids) > 1:
            tpot.append((last - first) / (len(output.outputs[0].token_ids) - 1))
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    say("--- Benchmark Results ---")
    say(f"Total time: {seconds:.2f}s")
    say(f"Requests sent: {len(outputs)}")
    say(f"Throughput: {num_tokens / seconds:.2f} tokens/s")
    say(f"Average TTFT: {fmean(ttft) * 1e3:.2f} ms")
    say(f"Average TPOT: {(fmean(tpot) if tpot else math.nan) * 1e3:.2f} ms/token")
    say(f"Average latency: {fmean(latency):.2f} s")
    say("-------------------------")


if __name__ == "__main__":
    main()
