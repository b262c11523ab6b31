"""Parts of a model: together they are the whole, and so are what their ranks make of it."""

import itertools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.layers import parallel
from nanovllm.layers.parallel import TensorParallel, part_of
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.quantization import SCHEMES, quantize
from nanovllm.models.sharding import Sharding, local_kv_heads
from nanovllm.worker import loading
from tests.conftest import EXPERTS, TINY, make_checkpoint
from tests.peft_oracle import ATTENTION, EVERY_LAYER, write_peft
from tests.small_engine import SMALL
from tests.thread_ranks import RankThreads, on_ranks

PROMPTS = [[5, 17, 200, 31], [9] * 20, [300, 2, 44, 251, 7, 7, 19]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

# Key heads that are shared out, one for two ranks, three for two, and two for three; an MLP and a
# vocabulary that do not divide.
UNEVEN = {"vocab_size": 317, "intermediate_size": 99, "head_dim": 16}
WINDOWS = {"sliding_window": 16, "sliding_window_pattern": 2}
UNEVEN_EXPERTS = {**UNEVEN, **EXPERTS, "moe_intermediate_size": 45}
SHAPES: dict[str, tuple[str, dict[str, object], int]] = {
    "qwen3": ("Qwen3", {"head_dim": 32}, 2),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}, 2),
    "llama": ("Llama", {"num_key_value_heads": 4}, 4),
    "qwen2-biases": ("Qwen2", {}, 2),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}, 2),
    "mistral": ("Mistral", {"sliding_window": 32}, 2),
    "gemma3": ("Gemma3", {**UNEVEN, **WINDOWS, "tie_word_embeddings": False}, 2),
    "1-kv-head": ("Llama", {**UNEVEN, "num_key_value_heads": 1}, 2),
    "3-kv-heads": ("Qwen3", {**UNEVEN, "num_attention_heads": 6, "num_key_value_heads": 3}, 2),
    "2-kv-heads": ("Qwen2", {**UNEVEN, "num_attention_heads": 6, "num_key_value_heads": 2}, 3),
    "experts": ("Qwen3Moe", {**UNEVEN_EXPERTS, "mlp_only_layers": [1]}, 2),
    "3-part-experts": ("Qwen3Moe", {**UNEVEN_EXPERTS, "num_attention_heads": 6}, 3),
    "8-ranks": ("Llama", {**UNEVEN, "num_attention_heads": 8, "num_key_value_heads": 2}, 8),
}


@pytest.fixture
def rank_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "RankProcesses", RankThreads)


def config_of(num_heads: int, num_kv_heads: int, **overrides: int) -> ModelConfig:
    raw = TINY | {"architectures": ["LlamaForCausalLM"], "head_dim": 8, **overrides}
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return ModelConfig.from_dict(raw | heads)


@given(st.integers(1, 1 << 18), st.integers(1, 8))
def test_parts_are_all_there_is_and_about_equal(total: int, size: int) -> None:
    parts = [part_of(total, rank, size) for rank in range(size)]
    assert [i for part in parts for i in (part.start, part.stop)][1:-1] == [
        i for part in parts[1:] for i in (part.start, part.start)
    ]
    assert (parts[0].start, parts[-1].stop) == (0, total)
    longest = max(map(len, parts))
    assert longest <= -(-total // size) * 9 // 8 + 1
    if total >= size:
        assert min(map(len, parts)) > 0
    if total % (128 * size) == 0:
        assert min(map(len, parts)) == longest


@pytest.mark.parametrize(
    ("total", "size", "part"), [(3072, 8, 384), (151936, 4, 37888), (9728, 2, 4864), (12, 8, 1)]
)
def test_parts_of_real_models(total: int, size: int, part: int) -> None:
    assert len(part_of(total, 0, size)) == part


@pytest.mark.parametrize("size", range(1, 9))
def test_every_query_head_finds_its_key_head(size: int) -> None:
    for num_heads, num_kv_heads in itertools.product(range(size, 65, size), range(1, 65)):
        if num_heads % num_kv_heads:
            continue
        group, local = num_heads // num_kv_heads, num_heads // size
        for rank in range(size):
            heads = range(rank * local, (rank + 1) * local)
            kv_heads = local_kv_heads(heads, group)
            assert local % len(kv_heads) == 0
            local_group = local // len(kv_heads)
            assert [kv_heads[i // local_group] for i in range(local)] == [h // group for h in heads]
            if num_kv_heads % size == 0:
                assert len(kv_heads) == num_kv_heads // size


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    return x @ (weight.dequantize() if isinstance(weight, QuantizedWeight) else weight).T


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_matrices_compute_what_the_whole_does(scheme: str | None, size: int) -> None:
    config = config_of(8, 4, head_dim=64, intermediate_size=1024, hidden_size=64)
    up, down, x = torch.randn(1024, 64), torch.randn(64, 1024), torch.randn(3, 64)
    o_proj = torch.randn(64, 512)

    def stored(matrix: Tensor) -> Tensor | QuantizedWeight:
        return matrix if scheme is None else quantize(matrix, SCHEMES[scheme])

    shardings = [Sharding(config, rank, size) for rank in range(size)]
    parts = [linear(x, s.matrix("l.up_proj.weight", stored(up))) for s in shardings]
    whole = linear(x, stored(up))
    assert torch.equal(torch.cat(parts, 1), whole)
    for name, matrix, inputs in (("down_proj", down, whole), ("o_proj", o_proj, whole[:, :512])):
        pieces = inputs.chunk(size, 1)
        sums = [
            linear(piece, s.matrix(f"l.{name}.weight", stored(matrix)))
            for piece, s in zip(pieces, shardings, strict=True)
        ]
        torch.testing.assert_close(
            torch.stack(sums).sum(0), linear(inputs, stored(matrix)), rtol=1e-4, atol=1e-3
        )


def test_groups_with_zero_points_are_cut() -> None:
    config = config_of(8, 4, head_dim=16, intermediate_size=96, hidden_size=64)
    codes = torch.randint(16, (64, 128), dtype=torch.uint8)
    scales, zeros = torch.rand(64, 1), torch.randint(16, (64, 1), dtype=torch.uint8)
    whole = QuantizedWeight(codes, scales, zeros, 4, 128)
    grouped = QuantizedWeight(codes, torch.rand(64, 2), zeros.repeat(1, 2), 4, 64)
    for weight in (whole, grouped):
        parts = [Sharding(config, r, 4).matrix("l.o_proj.weight", weight) for r in range(4)]
        values = [part.dequantize() for part in parts if isinstance(part, QuantizedWeight)]
        assert torch.equal(torch.cat(values, 1), weight.dequantize())
    with pytest.raises(InvalidRequestError, match=r"groups of 64 columns.* cuts it at 16"):
        Sharding(config, 0, 8).matrix("l.o_proj.weight", grouped)


def test_biases_behind_a_sum_are_added_once() -> None:
    parts = [Sharding(config_of(4, 2), rank, 2) for rank in range(2)]
    bias = torch.randn(64)
    assert torch.equal(sum(part.tensor("l.o_proj.bias", bias) for part in parts), bias)  # type: ignore[arg-type]
    norm = parts[1].tensor("l.q_norm.weight", bias)
    assert torch.equal(norm, bias)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (config_of(4, 2), 3, "tensor_parallel_size=3 does not divide the model's 4 query heads"),
        (config_of(8, 2, vocab_size=7), 8, "is more than .* its vocabulary, 7"),
        (config_of(8, 2, intermediate_size=5), 8, "is more than the width of the model's MLP, 5"),
    ],
)
def test_models_that_cannot_be_shared_out(config: ModelConfig, size: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Sharding(config, 0, size)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
def test_what_ranks_exchange(size: int, dtype: torch.dtype, ordered: bool) -> None:
    columns = torch.randn(5, 11).to(dtype)

    def work(ranks: TensorParallel) -> tuple[Tensor, Tensor, list[int]]:
        ranks._ordered = ordered  # on a CPU it always is
        total = ranks.all_reduce(torch.full((5, 7), ranks.rank + 1.0, dtype=dtype))
        part = ranks.part(11)
        gathered = ranks.all_gather_columns(columns[:, part.start : part.stop], 11)
        return total, gathered, ranks.minimum(ranks.rank, 10 - ranks.rank)

    for total, gathered, least in on_ranks(size, work):
        assert total.dtype == dtype
        assert (total == size * (size + 1) / 2).all()
        assert torch.equal(gathered, columns)
        assert least == [0, 11 - size]


def test_nobody_waits_for_an_abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted, graphs_gone = threading.Event(), threading.Event()

    class Group:
        def abort(self) -> None:
            aborted.set()
            graphs_gone.wait(20)

    monkeypatch.setattr(parallel, "_nccl", lambda *_: Group())
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(TensorParallel, "wait_for_all", lambda _: None)
    ranks = TensorParallel.connect(0, 1, tmp_path / "meeting", torch.device("cuda"))
    assert not aborted.is_set()
    for _ in range(2):
        ranks.abort()
    assert aborted.wait(5)
    graphs_gone.set()


@pytest.mark.parametrize("kind", SHAPES)
def test_tokens_are_those_of_one_rank(tmp_path: Path, rank_threads: None, kind: str) -> None:
    family, overrides, size = SHAPES[kind]
    directory = make_checkpoint(tmp_path / "base", family, **overrides)
    modules = ATTENTION if family == "Qwen3Moe" else EVERY_LAYER
    adapter = write_peft(directory, tmp_path / "adapter", seed=2, r=8, modules=modules)
    lora = LoRARequest("a", 1, str(adapter))
    outputs = []
    for tensor_parallel_size in (1, size):
        options = SMALL | {"cpu_isa": "torch", "async_scheduling": size % 2 == 0}
        with LLM(str(directory), tensor_parallel_size=tensor_parallel_size, **options) as llm:
            params = replace(GREEDY, logprobs=2, prompt_logprobs=1)
            answers = llm.generate([*PROMPTS, *PROMPTS], params, False, [None] * 3 + [lora] * 3)
            llm.remove_lora(1)
            answers += llm.generate(PROMPTS, SamplingParams(seed=3, max_tokens=9), False)
            outputs.append(answers)
    alone, together = outputs
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    for one, other in zip(alone[:6], together[:6], strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-3)
    assert alone[0].outputs[0].token_ids != alone[3].outputs[0].token_ids


def scores(output: object) -> list[float]:
    first, prompt = output.outputs[0].logprobs, output.prompt_logprobs  # type: ignore[attr-defined]
    return [score.logprob for at in [*first, *prompt[1:]] for score in at.values()]


@pytest.mark.parametrize("quantization", ["int8", "int4", "int4-g64"])
def test_quantized_weights_are_those_of_one_rank(
    tmp_path: Path, rank_threads: None, quantization: str
) -> None:
    shape = {"head_dim": 64, "num_attention_heads": 4, "intermediate_size": 256, "hidden_size": 128}
    directory = make_checkpoint(tmp_path, "Qwen3", **shape)
    tokens = []
    for size in (1, 2):
        options = SMALL | {"enable_lora": False, "cpu_isa": "torch", "quantization": quantization}
        with LLM(str(directory), tensor_parallel_size=size, **options) as llm:
            tokens.append([o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, False)])
    assert tokens[0] == tokens[1]
