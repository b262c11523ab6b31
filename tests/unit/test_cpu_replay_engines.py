"""Engines whose kernels are repeated: their scores and their sound must be the same, to the bit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.kernels.cpu import replay
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.worker import loading
from tests.peft_oracle import write_peft
from tests.replay_log import Log, watch_replays
from tests.speech_engines import Ask, keys_of, make_engine, speak
from tests.thread_ranks import RankThreads

Directory = Callable[[str], Path]

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "cpu_threads": 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 40,
    "max_model_len": 128,
    "num_kv_blocks": 60,
}
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
LENGTHS = (1, 30, 3, 17, 64, 2, 45, 9, 16, 33, 1, 5)

Scores = list[list[dict[int, float]]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return watch_replays(monkeypatch)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scores]:
    """Generates as without replays."""

    def run(model: Path, **options: Any) -> Scores:
        with monkeypatch.context() as patched:
            patched.setattr(replay, "MAX_ROWS", 0)
            return generate(model, **options)

    return run


def prompts(vocab_size: int = 320) -> list[list[int]]:
    """Of many lengths, two with the same beginning."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    return [*drawn, drawn[6][:40] + drawn[3]]


def scores(llm: LLM, **more: Any) -> Scores:
    """What each token was found to be worth, and those that it was preferred to."""
    return [
        [
            {token_id: entry.logprob for token_id, entry in entries.items()}
            for entries in output.outputs[0].logprobs or []
        ]
        for output in llm.generate(prompts(), GREEDY, use_tqdm=False, **more)
    ]


def generate(model: Path, **options: Any) -> Scores:
    with LLM(str(model), **OPTIONS | options) as llm:
        found = [*scores(llm), *scores(llm)]
        assert all(len(row) == GREEDY.max_tokens for row in found)
        if options.get("num_kv_blocks"):
            assert llm.engine.stats().num_preemptions
        return found


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2", "llama-bias", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_s_scores_are_the_same_bits(
    checkpoint: Directory, plain: Callable[..., Scores], log: Log, name: str, dtype: str
) -> None:
    model = checkpoint(name)
    expected = plain(model, dtype=dtype)
    assert log == Log()
    assert generate(model, dtype=dtype) == expected
    assert all(log.recorded)
    assert log.num_run > 2 * len(log.recorded)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "int8", "dtype": "bfloat16"},
        {"num_kv_blocks": 17, "block_size": 8},
        {"deterministic": True},
        {"disable_cascade_attn": True},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 512},
        {"quantization": "int8"},
        {"quantization": "int4", "dtype": "bfloat16"},
        {"attention_backend": "cpu"},
        {"cpu_threads": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_of_an_engine_change_nothing_in_that(
    checkpoint: Directory, plain: Callable[..., Scores], log: Log, options: dict[str, Any]
) -> None:
    model = checkpoint("qwen3")
    expected = plain(model, **options)
    assert generate(model, **options) == expected
    assert all(log.recorded)
    assert log.num_run


def test_attention_of_torch_is_computed(
    checkpoint: Directory, plain: Callable[..., Scores], log: Log
) -> None:
    """What follows the last layer's is repeated all the same where only some rows are wanted."""
    model = checkpoint("qwen3")
    expected = plain(model, attention_backend="sdpa")
    assert generate(model, attention_backend="sdpa") == expected
    assert not all(log.recorded)
    assert log.num_run
    log.recorded.clear()
    with LLM(str(model), **OPTIONS, attention_backend="sdpa") as llm:
        llm.generate([[1]] * 3, GREEDY, use_tqdm=False)  # all rows are wanted
    assert not any(log.recorded)


def test_what_follows_the_last_attention_is_written_down_by_its_rows_alone(
    checkpoint: Directory, log: Log
) -> None:
    """Not by the tokens of the step, too: there were as many recordings as pairs of both."""
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        for length in range(5, 35):
            llm.generate([[length] * length], GREEDY, use_tqdm=False)
    # Of each length what comes before, of one row what follows and the whole.
    assert len(log.recorded) == 30 + 2


def test_the_kernels_of_torch_compute_as_ever(checkpoint: Directory, log: Log) -> None:
    generate(checkpoint("qwen3"), cpu_isa="torch")
    assert log == Log()


def test_a_second_engine_starts_anew_and_both_go_on(checkpoint: Directory, log: Log) -> None:
    """Also when one of them is gone, and its memory with it."""
    model = checkpoint("qwen3")
    first, second = (LLM(str(model), **OPTIONS) for _ in range(2))
    with first:
        expected = scores(first)
        with second:
            assert scores(second) == expected
            assert scores(first) == scores(second)
        del second
        assert scores(first) == scores(first)
        assert all(log.recorded)


def test_engines_in_two_threads_do_not_disturb_each_other(
    checkpoint: Directory, plain: Callable[..., Scores]
) -> None:
    names = ("qwen3", "llama-bias")
    models = [checkpoint(name) for name in names]
    expected = [plain(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert list(pool.map(generate, models)) == expected


def test_steps_with_adapters_are_computed(
    checkpoint: Directory,
    tmp_path: Path,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = checkpoint("qwen3")
    adapters = [
        LoRARequest(str(n), n, str(write_peft(model, tmp_path / str(n), seed=n))) for n in (1, 2)
    ]
    given = [adapters[row % 2] for row in range(len(LENGTHS) + 1)]
    options = OPTIONS | {"enable_lora": True, "max_loras": 2}

    def run() -> list[Scores]:
        with LLM(str(model), **options) as llm:
            alone = scores(llm)
            before = log.num_run
            adapted = scores(llm, lora_request=given)
            assert log.num_run == before
            return [alone, adapted, scores(llm)]

    found = run()
    assert log.num_run
    assert found[0] == found[2] != found[1]
    with monkeypatch.context() as patched:
        patched.setattr(replay, "MAX_ROWS", 0)
        assert run() == found


def test_what_was_written_down_keeps_no_model_alive(checkpoint: Directory) -> None:
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        scores(llm)
        kernels = llm._runner.kernels
        assert isinstance(kernels, CpuKernels)
        recordings: Any = kernels._replays._recordings
        held = [item for key in recordings for item in key[0]]
    assert held
    assert not any(isinstance(item, nn.Module) for item in held)


def test_steps_of_several_ranks_are_computed(
    checkpoint: Directory, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "RankProcesses", RankThreads)
    model = checkpoint("qwen3")
    with LLM(str(model), **OPTIONS | {"tensor_parallel_size": 2}) as llm:
        found = [list(row[-1]) for row in scores(llm)]
    assert log == Log()
    with LLM(str(model), **OPTIONS) as llm:
        assert [list(row[-1]) for row in scores(llm)] == found


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_speech_is_the_same_bits(
    speech_checkpoint: Callable[..., Path], log: Log, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def run() -> list[Any]:
        engine, runner = make_engine(speech_checkpoint(kind), max_num_seqs=4, max_model_len=128)
        shape = runner.model.config
        generator = torch.Generator().manual_seed(0)
        asks = []
        for index, length in enumerate((3, 9, 1, 14, 6)):
            ids = torch.randint(5, 400, (length,), generator=generator).tolist()
            size = (1 + index, shape.patch_size, shape.feat_dim)
            prompt = torch.randn(size, generator=generator) if index % 2 else None
            options = {"cfg_value": (2.0, 1.0)[index % 2]}
            asks.append(Ask(*keys_of(ids, prompt), index, 2 + index, options))
        return speak(engine, asks, shape)

    found = run()
    assert log.num_run
    monkeypatch.setattr(replay, "MAX_ROWS", 0)
    for one, other in zip(found, run(), strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.patches.tobytes() == other.patches.tobytes()
        assert one.audio.tobytes() == other.audio.tobytes()
