"""The workloads, as token ids: the same for all engines of a round, and fresh ones each round."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

Request = tuple[list[int], int]
"""Prompt ids and the number of tokens to generate."""
Figure = Literal["decode_ms", "ttft_s", "seconds", "tokens_per_s"]

FIRST_ID, LAST_ID = 10, 4080
"""Ids that every model of the benchmark has and that mean no end of text to any."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all there at the start, and the figure to judge them by.

    Args:
        title: What it is, for the reader of the table.
        figure: `decode_ms` is the mean time of a step once every request has its first token.
        draw: Draws the requests, the same ones each time.
        model: Which model runs it, the random checkpoint or nanovllm's demo model.
        temperature: To sample at; 0 is greedy.
        max_model_len: Context the engines reserve.
        kv_gb: Room for keys and values that the engines reserve, in GB.
        is_heavy: Whether the prompts are computed ahead, into the prefix cache, and the engines
            run one after another and once, for want of time and memory to do it properly.
    """

    title: str
    figure: Figure
    draw: Callable[[], list[Request]]
    model: Literal["shape", "demo"] = "shape"
    temperature: float = 0.0
    max_model_len: int = 4096
    kv_gb: float = 3.0
    is_heavy: bool = False

    @property
    def is_higher_better(self) -> bool:
        return self.figure == "tokens_per_s"

    @property
    def needs_steps(self) -> bool:
        """Whether the time of each step must be known, and not just that of the whole."""
        return self.figure in ("decode_ms", "ttft_s")

    def requests(self, round_number: int) -> list[Request]:
        """The requests with ids that no other round has, so that no prefix cache knows them.

        Lengths and shared prefixes are the same in each round, for it only renames the ids.
        """
        ids = list(range(FIRST_ID, LAST_ID))
        random.Random(f"round {round_number}").shuffle(ids)
        return [
            ([ids[i - FIRST_ID] for i in prompt], output_len) for prompt, output_len in self.draw()
        ]


def shared_prefix(requests: list[Request]) -> list[int]:
    """Ids that all prompts begin with; none for a single one."""
    if len(requests) == 1:
        return []
    columns = zip(*(prompt for prompt, _ in requests), strict=False)
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


def _equal(num_seqs: int, prompt_len: int, output_len: int, shared: int = 0) -> list[Request]:
    rng = random.Random(num_seqs + prompt_len)
    prefix = _ids(rng, shared)
    return [(prefix + _ids(rng, prompt_len), output_len) for _ in range(num_seqs)]


def _mixed() -> list[Request]:
    """5296 tokens in and 2482 out."""
    rng, lengths = random.Random(1), random.Random(0)
    requests = []
    for _ in range(32):
        prompt_len, output_len = lengths.randint(64, 256), lengths.randint(32, 128)
        for _ in range(prompt_len):  # these lengths came with 7000 ids between them
            lengths.randrange(10, 7000)
        requests.append((_ids(rng, prompt_len), output_len))
    return requests


def _family() -> list[Request]:
    """The family's offline benchmark with a quarter of its lengths: 35.6k tokens in, 33.4k out."""
    draw = random.Random(0).randint
    prompts = []
    for _ in range(256):
        prompt = [draw(0, 10000) for _ in range(draw(100, 1024))]
        prompts.append([FIRST_ID + i % (LAST_ID - FIRST_ID) for i in prompt[: len(prompt) // 4]])
    return [(prompt, draw(100, 1024) // 4) for prompt in prompts]


WORKLOADS = {
    "W1": Workload("decode at batch 1: 128 in, 128 out", "decode_ms", lambda: _equal(1, 128, 128)),
    "W2": Workload("32 mixed requests: 5296 in, 2482 out", "seconds", _mixed),
    "W3": Workload("time to first token of 2048 in", "ttft_s", lambda: _equal(1, 2048, 1)),
    "W4": Workload(
        "32 requests of 512 shared + 32 in, 32 out", "seconds", lambda: _equal(32, 32, 32, 512)
    ),
    "W5": Workload(
        "256 mixed requests to the demo model",
        "tokens_per_s",
        _family,
        model="demo",
        temperature=0.6,
        max_model_len=1024,
        kv_gb=1.0,
    ),
    "W6": Workload(
        "decode step of 8 sequences after 8192 in",
        "decode_ms",
        lambda: _equal(8, 8192, 32),
        max_model_len=8192 + 128,
        kv_gb=8.0,
        is_heavy=True,
    ),
}
