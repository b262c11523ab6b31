"""The engine on a CUDA device: the tokens of transformers and of the CPU, whatever it runs with."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, LoRARequest, RequestOutput, SamplingParams
from nanovllm.batch import Batch
from tests.peft_oracle import EVERY_LAYER, greedy, merged, write_peft
from tests.triton_device import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MakeCheckpoint = Callable[[str], Path]

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = (1, 15, 14, 17, 40, 60, 33, 13)
SMALL: dict[str, Any] = {
    "device": DEVICE.type,
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "num_kv_blocks": 64,
}
ON_CPU = SMALL | {"device": "cpu", "cpu_threads": 1}
KINDS = ["qwen3", "qwen3-tied", "qwen2-window", "llama", "llama-bias", "llama3", "mistral"]
WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without graphs": {"enforce_eager": True},
    "without overlap": {"async_scheduling": False},
    "without either": {"enforce_eager": True, "async_scheduling": False},
    "graphs of few sizes": {"max_cudagraph_capture_size": 2},
    "torch's attention": {"attention_backend": "sdpa"},
    "our attention": {"attention_backend": "triton"},
    "small chunks": {"max_num_batched_tokens": 9},
    "wide blocks": {"block_size": 32, "num_kv_blocks": 32},
    "no cascade": {"disable_cascade_attn": True},
    "no prefix cache": {"enable_prefix_caching": False},
}
SAMPLED = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, seed=2, top_p=0.9),
    SamplingParams(temperature=1.3, seed=3, top_k=20),
    SamplingParams(temperature=0.9, seed=4, min_p=0.05),
    SamplingParams(temperature=0.8, seed=5, top_k=50, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, seed=6, logit_bias={5: 3.0, 9: -100.0}),
    SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.3, frequency_penalty=0.5),
]
PENALISED = [
    SamplingParams(temperature=0, repetition_penalty=1.5),
    SamplingParams(temperature=0, presence_penalty=1.0),
    SamplingParams(temperature=0, frequency_penalty=0.7),
    SamplingParams(temperature=0, repetition_penalty=0.8, presence_penalty=-0.5),
]


def prompts(lengths: Sequence[int] = LENGTHS, vocab_size: int = 320) -> list[list[int]]:
    """Random prompts, of which the long ones begin alike."""
    generator = torch.Generator().manual_seed(3)
    shared: list[int] = torch.randint(vocab_size, (32,), generator=generator).tolist()
    made = []
    for length in lengths:
        ids: list[int] = torch.randint(vocab_size, (length,), generator=generator).tolist()
        made.append((shared + ids)[:length] if length > len(shared) else ids)
    return made


def with_tokens(params: Sequence[SamplingParams]) -> list[SamplingParams]:
    """The same for as many tokens as the tests look at."""
    for each in params:
        each.max_tokens, each.ignore_eos = NUM_TOKENS, True
    return list(params)


def run(
    llm: LLM, batch: list[list[int]], params: SamplingParams | Sequence[SamplingParams] = GREEDY
) -> list[RequestOutput]:
    return llm.generate(list(batch), params, use_tqdm=False)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(checkpoint: MakeCheckpoint, kind: str) -> None:
    directory = checkpoint(kind)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with LLM(str(directory), **SMALL) as llm:
        ours = tokens(run(llm, prompts()))
    assert ours == [greedy(reference, prompt, NUM_TOKENS) for prompt in prompts()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_no_way_of_running_changes_a_token(checkpoint: MakeCheckpoint, kind: str, way: str) -> None:
    directory, batch = str(checkpoint(kind)), prompts() * 2
    with LLM(directory, **ON_CPU) as llm:
        expected = tokens(run(llm, batch))
    with LLM(directory, **SMALL | WAYS[way]) as llm:
        first, again = run(llm, batch), run(llm, batch)
    assert tokens(first) == expected
    assert tokens(again) == expected
    if way in ("as it comes", "small chunks"):
        assert again[5].num_cached_tokens == 48
    if way == "no prefix cache":
        assert {output.num_cached_tokens for output in again} == {0}


@pytest.mark.parametrize("way", ["as it comes", "without graphs", "without overlap"])
def test_preempted_sequences_lose_nothing(checkpoint: MakeCheckpoint, way: str) -> None:
    batch = prompts([15, 14, 13, 12] * 2)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(str(checkpoint("qwen3")), **ON_CPU) as llm:
        expected = tokens(run(llm, batch, params))
    few = {"num_kv_blocks": 10, "max_model_len": 64}
    with LLM(str(checkpoint("qwen3")), **SMALL | WAYS[way] | few) as llm:
        assert tokens(run(llm, batch, params)) == expected
        assert llm.engine.stats().num_preemptions > 0


@pytest.mark.parametrize("way", ["as it comes", "without graphs", "without overlap"])
def test_samples_are_those_of_the_cpu(checkpoint: MakeCheckpoint, way: str) -> None:
    """A draw that falls on the border of two tokens may go to either; one of these rows may."""
    directory = str(checkpoint("qwen3"))
    params = with_tokens(SAMPLED)
    with LLM(directory, **ON_CPU) as llm:
        expected = tokens(run(llm, prompts(), params))
    with LLM(directory, **SMALL | WAYS[way]) as llm:
        together = tokens(run(llm, prompts(), params))
        alone = [tokens(run(llm, [p], s))[0] for p, s in zip(prompts(), params, strict=True)]
    for ours in (together, alone):
        differing = [row for row, ids in enumerate(expected) if ours[row] != ids]
        assert len(differing) <= 1, differing


def test_scores_are_close_to_those_of_the_cpu(checkpoint: MakeCheckpoint) -> None:
    directory = str(checkpoint("llama"))
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=2
    )
    scores = []
    for options in (ON_CPU, SMALL):
        with LLM(directory, **options) as llm:
            outputs = run(llm, prompts(), params)
        scores.append(
            [
                {token_id: entry.logprob for token_id, entry in position.items()}
                for output in outputs
                for position in (
                    *(output.prompt_logprobs or []),
                    *(output.outputs[0].logprobs or []),
                )
                if position is not None
            ]
        )
    assert len(scores[0]) == len(scores[1]) > 8 * NUM_TOKENS
    for theirs, ours in zip(*scores, strict=True):
        # The last of the most likely ones may be a near-tie.
        shared = theirs.keys() & ours.keys()
        assert len(shared) >= len(theirs) - 1
        assert all(abs(theirs[i] - ours[i]) < 1e-3 for i in shared)


def test_penalties_change_what_they_change_on_the_cpu(checkpoint: MakeCheckpoint) -> None:
    directory, batch = str(checkpoint("qwen3")), prompts()[2:6]
    params = with_tokens(PENALISED)
    with LLM(directory, **ON_CPU) as llm:
        expected, plain = tokens(run(llm, batch, params)), tokens(run(llm, batch))
    with LLM(directory, **SMALL) as llm:
        assert tokens(run(llm, batch, params)) == expected
        assert tokens(run(llm, batch)) == plain
    assert expected != plain


@pytest.mark.parametrize("way", ["as it comes", "without graphs"])
def test_adapters_side_by_side_are_the_merged_weights(
    checkpoint: MakeCheckpoint, tmp_path: Path, way: str
) -> None:
    base = checkpoint("qwen3")
    paths = [
        write_peft(base, tmp_path / f"a{seed}", seed=seed, r=r, modules=EVERY_LAYER)
        for seed, r in ((1, 4), (2, 8))
    ]
    requests = [None, *(LoRARequest(path.name, 1 + i, str(path)) for i, path in enumerate(paths))]
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)]
    models += [merged(base, path) for path in paths]
    batch = prompts()[1:4]
    options = SMALL | WAYS[way] | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with LLM(str(base), **options) as llm:
        for turn in range(3):
            order = [(turn + row) % 3 for row in range(3)]
            outputs = llm.generate(list(batch), GREEDY, False, [requests[which] for which in order])
            expected = [
                greedy(models[which], prompt, NUM_TOKENS)
                for which, prompt in zip(order, batch, strict=True)
            ]
            assert tokens(outputs) == expected


def test_deterministic_rows_are_bitwise_those_of_a_row_alone() -> None:
    """In bfloat16, with the bundled model: 64 rows at once, and some of them by themselves."""
    batch = prompts([3 + 7 * row % 90 for row in range(64)], vocab_size=4096)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    options: dict[str, Any] = {"device": DEVICE.type, "dtype": "bfloat16", "deterministic": True}
    options |= {"max_model_len": 256, "num_kv_blocks": 64 * 16}

    def scored(llm: LLM, rows: list[list[int]]) -> list[list[float]]:
        return [
            [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
            for out in (output.outputs[0] for output in run(llm, rows, params))
            if out.logprobs is not None
        ]

    with LLM(max_num_seqs=64, **options) as llm:
        together = scored(llm, batch)
    with LLM(max_num_seqs=64, max_num_batched_tokens=64, **options) as llm:
        for row in (0, 13, 40, 63):
            assert scored(llm, [batch[row]]) == [together[row]], row


@contextmanager
def no_waiting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let whatever waits for the device while a step is launched raise."""
    runner: Any = llm.engine._runner
    launch = runner.launch

    def watched(batch: Batch) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", watched)
        yield


WAITLESS: dict[str, list[SamplingParams]] = {
    "greedy": [GREEDY],
    "sampled": SAMPLED,
    "scored": [SamplingParams(temperature=0, logprobs=3)],
    "penalised": PENALISED,
}


@pytest.mark.parametrize("kind", WAITLESS)
@pytest.mark.parametrize("way", ["as it comes", "without graphs"])
def test_no_launch_waits_for_the_device(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, way: str, kind: str
) -> None:
    params = with_tokens(WAITLESS[kind])
    batch = prompts()[: len(params)]
    with LLM(str(checkpoint("qwen3")), **SMALL | WAYS[way]) as llm:
        expected = tokens(run(llm, batch, params))
        with no_waiting(llm, monkeypatch):
            assert tokens(run(llm, batch, params)) == expected


def test_no_launch_with_adapters_waits(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint("qwen3")
    request = LoRARequest("a", 1, str(write_peft(base, tmp_path, modules=EVERY_LAYER)))
    with LLM(str(base), **SMALL, enable_lora=True) as llm:
        loras = [request, None]
        expected = llm.generate(prompts()[:2], GREEDY, False, loras)
        with no_waiting(llm, monkeypatch):
            again = llm.generate(prompts()[:2], GREEDY, False, loras)
    assert tokens(again) == tokens(expected)


def test_memory_stays_within_what_was_granted(tmp_path: Path) -> None:
    """Weights, graphs and a cache that could take far more, with all rows running."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    if free_before < 12 << 30:
        pytest.skip("needs 12 GiB")
    granted = total - free_before + (10 << 30)
    with LLM(
        str(tmp_path),
        dummy_weights=True,
        device=DEVICE.type,
        gpu_memory_utilization=granted / total,
    ) as llm:
        batch = prompts([200] * 256, vocab_size=10_000)
        run(llm, batch, SamplingParams(temperature=0.8, top_p=0.9, seed=0, max_tokens=20))
        used = total - torch.cuda.mem_get_info()[0]
    assert used <= granted + (256 << 20)
    # And the cache has taken most of it.
    assert used > granted - (4 << 30)


def test_closed_engines_give_their_memory_back(checkpoint: MakeCheckpoint) -> None:
    directory = str(checkpoint("qwen3"))
    left = []
    for _ in range(3):
        with LLM(directory, **SMALL) as llm:
            run(llm, prompts()[:2])
        del llm
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert left[2] <= left[0]
