"""The engine's tokens and scores against transformers, however the work is cut up."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.config import DEMO_MODEL
from tests.conftest import CHECKPOINTS

LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 60, 64, 65, 90, 100, 130)
NUM_OUTPUT = 64
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Scenario:
    """A way to cut the work up.

    Args:
        chunked: Whether prompts are computed in pieces of 24 positions, mixed with decodes.
        prefix: "miss", "hit" (each prompt ran before) or "shared" (prompts have a common beginning
            and arrive together).
        preempted: Whether the KV cache is so small that sequences are preempted.
        depth: Steps in flight beyond the one being collected.
    """

    chunked: bool
    prefix: str
    preempted: bool
    depth: int

    def __str__(self) -> str:
        return "-".join(
            (
                "chunked" if self.chunked else "whole",
                self.prefix,
                "preempted" if self.preempted else "roomy",
                f"depth{self.depth}",
            )
        )

    def options(self) -> dict[str, int | bool | str]:
        return {
            "dtype": "float32",
            "max_model_len": 240,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 24 if self.chunked else 2048,
            "block_size": 8,
            "num_kv_blocks": 60 if self.preempted else 600,
            "async_scheduling": bool(self.depth),
        }


SCENARIOS = [
    Scenario(chunked, prefix, preempted, depth)
    for chunked in (False, True)
    for prefix in ("miss", "hit", "shared")
    for preempted in (False, True)
    for depth in (0, 1)
]


def make_prompts(vocab_size: int, shared: bool) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    beginning: list[int] = torch.randint(vocab_size, (40,), generator=generator).tolist()
    return [beginning + prompt for prompt in prompts] if shared else prompts


class Oracle:
    """Logits and greedy continuations by transformers, in fp32, one prompt at a time."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        out: torch.Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return out

    def greedy(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_OUTPUT,
            do_sample=False,
            pad_token_id=0,
        )
        token_ids: list[int] = out[0, len(prompt) :].tolist()
        return token_ids


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[[str], Oracle]:
    oracles: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in oracles:
            oracles[name] = Oracle(DEMO_MODEL if name == "demo" else checkpoint(name))
        return oracles[name]

    return get


def assert_same_tokens(oracle: Oracle, prompt: list[int], ours: list[int]) -> None:
    """Each is the likeliest token behind those before it, so they are transformers' greedy ones.

    A token that is another's tie is told with its margin.
    """
    assert len(ours) == NUM_OUTPUT
    logits = oracle.logits(prompt + ours[:-1])[len(prompt) - 1 :]
    margins = logits.amax(-1) - logits.gather(-1, torch.tensor(ours)[:, None])[:, 0]
    for at in margins.nonzero()[:, 0].tolist():
        told = f"token {at}: {ours[at]} for {logits[at].argmax()}, margin {margins[at]:.2e}"
        assert margins[at] < LOGIT_TOLERANCE, told
        warnings.warn(f"near-tie at {told}", stacklevel=1)


def run_scenario(
    directory: Path, oracle: Oracle, scenario: Scenario, cpu_isa: str = "auto"
) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    vocab_size = oracle.model.config.vocab_size
    prompts = make_prompts(vocab_size, shared=scenario.prefix == "shared")
    with LLM(str(directory), cpu_isa=cpu_isa, **scenario.options()) as llm:
        if scenario.prefix == "hit":
            for prompt in reversed(prompts):  # the small cache keeps the last ones
                llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        stats = llm.engine.stats()
        assert (stats.num_preemptions > 0) is scenario.preempted
        assert (stats.num_cached_tokens > 0) is (scenario.prefix != "miss")
        assert stats.num_used_blocks == 0
        assert llm.engine.scheduler.num_free_slots == 16
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_tokens(oracle, prompt, output.outputs[0].token_ids)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_greedy_tokens_are_transformers_however_the_work_is_cut_up(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle], scenario: Scenario
) -> None:
    run_scenario(checkpoint("qwen3"), oracle("qwen3"), scenario)


GROWING = "llama-dynamic-short"
"""Its original context is 48. A prompt beyond that is rotated by its whole length in transformers,
by each position's own here, so only what is decoded past the context can be compared."""

NAMES = sorted(set(CHECKPOINTS) - {GROWING})
KERNELS = ("auto", "torch")
PLAIN = Scenario(chunked=False, prefix="miss", preempted=False, depth=0)
HARDEST = Scenario(chunked=True, prefix="shared", preempted=True, depth=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("cpu_isa", "scenario"),
    [
        ("auto", PLAIN),
        ("auto", HARDEST),
        pytest.param("torch", PLAIN, marks=pytest.mark.slow),
        ("torch", HARDEST),
    ],
    ids=str,
)
def test_every_architecture_gives_transformers_tokens(
    checkpoint: Callable[[str], Path],
    oracle: Callable[[str], Oracle],
    name: str,
    cpu_isa: str,
    scenario: Scenario,
) -> None:
    run_scenario(checkpoint(name), oracle(name), scenario, cpu_isa)


@pytest.mark.parametrize("scenario", [PLAIN, HARDEST], ids=str)
def test_the_bundled_model_gives_transformers_tokens(
    oracle: Callable[[str], Oracle], scenario: Scenario
) -> None:
    run_scenario(DEMO_MODEL, oracle("demo"), scenario)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen3"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_every_architecture_in_every_scenario(
    checkpoint: Callable[[str], Path],
    oracle: Callable[[str], Oracle],
    name: str,
    scenario: Scenario,
) -> None:
    run_scenario(checkpoint(name), oracle(name), scenario)


def test_dynamic_rope_decodes_past_the_original_context_as_transformers_does(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """48 positions without scaling, then each with the frequencies of its own length."""
    reference = oracle(GROWING)
    prompts = make_prompts(reference.model.config.vocab_size, shared=False)[4:9]
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
    with LLM(str(checkpoint(GROWING)), dtype="float32", max_num_batched_tokens=20) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in outputs] == [reference.greedy(p) for p in prompts]


@pytest.mark.parametrize("name", [*NAMES, "demo"])
@pytest.mark.parametrize("cpu_isa", KERNELS)
def test_scores_are_transformers_log_probabilities(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle], name: str, cpu_isa: str
) -> None:
    """Prompt and sampled scores, over chunks, within 1e-4; the spread makes that a hard test."""
    directory = DEMO_MODEL if name == "demo" else checkpoint(name)
    reference = oracle(name)
    vocab_size = reference.model.config.vocab_size
    prompts = make_prompts(vocab_size, shared=False)[::5]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2)
    options = {"dtype": "float32", "max_num_batched_tokens": 50, "max_num_seqs": 4}
    with LLM(str(directory), cpu_isa=cpu_isa, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = prompt + output.outputs[0].token_ids
        logits = reference.logits(token_ids)
        if name != "demo":
            assert logits.std() >= 2
        expected = logits.log_softmax(-1)
        scores = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        assert scores[0] is None
        assert len(scores) == len(token_ids)
        for position, entry in enumerate(scores[1:], start=1):
            assert entry is not None
            assert token_ids[position] in entry
            for token_id, logprob in entry.items():
                assert abs(logprob.logprob - expected[position - 1, token_id]) < LOGIT_TOLERANCE
