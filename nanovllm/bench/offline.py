"""The offline benchmark of the nano-vllm family: many requests queued at once.

Workload and order of random draws are those of nano-vllm's `bench.py`, so that figures compare.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.bench.machine import Machine, inspect_machine
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

TEMPERATURE = 0.6
MAX_TOKEN_ID = 10000
WARM_UP_PROMPT = list(range(8))


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max(
            len(prompt) + output_len
            for prompt, output_len in zip(self.prompts, self.output_lens, strict=True)
        )


def make_workload(vocab_size: int, small: bool = False, seed: int = 0) -> Workload:
    """Draw the family's workload.

    Args:
        vocab_size: Ids are drawn below this, and at most 10000.
        small: 16 sequences of 50 to 256 tokens in and 32 to 64 out, in place of 256 sequences of
            100 to 1024 in and out.
        seed: Of the draws; the family's is 0, with 142,827 tokens in and 133,966 out.
    """
    if small:
        return draw_workload(vocab_size, 16, (50, 256), (32, 64), seed)
    return draw_workload(vocab_size, 256, (100, 1024), (100, 1024), seed)


def draw_workload(
    vocab_size: int,
    num_seqs: int,
    input_range: tuple[int, int],
    output_range: tuple[int, int],
    seed: int = 0,
) -> Workload:
    """Draw so many sequences; all prompts are drawn before the output lengths, as nano-vllm does.

    Args:
        vocab_size: Ids are drawn below this, and at most 10000.
        num_seqs: Sequences.
        input_range: Least and most tokens of a prompt.
        output_range: Least and most tokens to generate.
        seed: Of the draws.
    """
    draw = random.Random(seed).randint
    last_id = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[draw(0, last_id) for _ in range(draw(*input_range))] for _ in range(num_seqs)]
    return Workload(prompts, [draw(*output_range) for _ in range(num_seqs)])


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """Figures of one run. Times are in seconds.

    A step with a prompt in it counts as prefill, with the decodes that ride along; any other step
    as decode. So `prefill_tokens` and `decode_tokens` are what was computed in each kind, and
    neither rate borrows time from the other.

    Args:
        num_seqs: Requests.
        num_prompt_tokens: Tokens of the prompts.
        num_cached_tokens: Of these, tokens that came from the prefix cache.
        num_output_tokens: Tokens generated.
        num_steps: Steps of the engine.
        num_preemptions: Times a sequence was put back for want of memory and computed anew.
        wall_time: From the first request to the last token.
        prefill_time: In steps with a prompt in them.
        prefill_tokens: Computed in those steps.
        decode_time: In the other steps.
        decode_tokens: Computed in those.
        settings: What the engine ran with.
        machine: What it ran on.
    """

    num_seqs: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_steps: int
    num_preemptions: int
    wall_time: float
    prefill_time: float
    prefill_tokens: int
    decode_time: float
    decode_tokens: int
    settings: dict[str, Any]
    machine: Machine

    @property
    def prefill_rate(self) -> float:
        """Tokens per second in steps with a prompt in them."""
        return self.prefill_tokens / self.prefill_time if self.prefill_time else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second in the other steps."""
        return self.decode_tokens / self.decode_time if self.decode_time else 0.0

    @property
    def output_rate(self) -> float:
        """Generated tokens per second of wall time: the family's figure."""
        return self.num_output_tokens / self.wall_time

    @property
    def total_rate(self) -> float:
        """Tokens in and out per second of wall time."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.wall_time


def run_offline(
    llm: "LLM",
    workload: Workload,
    on_step: Callable[[int], None] | None = None,
) -> OfflineResult:
    """Warm up, queue the whole workload, and step until it is done.

    Args:
        llm: An engine with nothing to do.
        workload: What to run, at temperature 0.6 and past the end-of-text ids.
        on_step: Called after each step with the tokens generated so far.

    Raises:
        InvalidRequestError: The workload does not fit the engine's context.
    """
    if workload.longest > llm.engine.max_model_len:
        raise InvalidRequestError(
            f"the workload needs a context of {workload.longest} tokens, and max_model_len is "
            f"{llm.engine.max_model_len}: raise it, or run the small workload",
            "max_model_len",
        )
    llm.generate(WARM_UP_PROMPT, _params(16), use_tqdm=False)
    first = last = llm.engine.stats()
    prefill_tokens = 0
    start = time.perf_counter()
    for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
        llm.add_request(prompt, _params(output_len))
    while llm.has_unfinished():
        llm.step()
        now = llm.engine.stats()
        if now.prefill_time > last.prefill_time:
            prefill_tokens += now.num_computed_tokens - last.num_computed_tokens
        last = now
        if on_step is not None:
            on_step(now.num_output_tokens - first.num_output_tokens)
    wall_time = time.perf_counter() - start
    computed = last.num_computed_tokens - first.num_computed_tokens
    return OfflineResult(
        num_seqs=len(workload.prompts),
        num_prompt_tokens=workload.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens - first.num_cached_tokens,
        num_output_tokens=last.num_output_tokens - first.num_output_tokens,
        num_steps=last.num_steps - first.num_steps,
        num_preemptions=last.num_preemptions - first.num_preemptions,
        wall_time=wall_time,
        prefill_time=last.prefill_time - first.prefill_time,
        prefill_tokens=prefill_tokens,
        decode_time=last.decode_time - first.decode_time,
        decode_tokens=computed - prefill_tokens,
        settings=_settings(llm),
        machine=inspect_machine(),
    )


def _params(output_len: int) -> SamplingParams:
    return SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=output_len)


def _settings(llm: "LLM") -> dict[str, Any]:
    """The options that figures depend on, as the engine resolved them."""
    config, blocks = llm.config, llm.engine.scheduler.block_manager
    return {
        "model": config.model or "bundled demo model",
        "architecture": llm.model_config.architecture,
        "dtype": config.dtype,
        "device": config.device,
        "max_model_len": llm.engine.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": blocks.block_size,
        "num_kv_blocks": blocks.num_blocks,
        "enable_prefix_caching": config.enable_prefix_caching,
        "async_scheduling": config.async_scheduling,
        "seed": config.seed,
    }
