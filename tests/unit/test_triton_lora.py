"""Adapters of rows that only the device knows, against groups of rows through linear layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.kernels.kernels import WeightSpec
from nanovllm.kernels.lora import IndexedBatch
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.kernels.triton.lora import BLOCK_M, add_lora
from nanovllm.layers.lora import LoRATable, PartWeights
from nanovllm.worker import loading
from tests.conftest import make_checkpoint
from tests.peft_oracle import write_peft
from tests.recorded_graphs import RecordedGraphs
from tests.small_engine import SMALL
from tests.triton_device import DEVICE, DOT_DTYPES

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Sums are of variance 1; the twin rounds once more."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def check(
    slots: list[int],
    depth: int,
    width: int,
    rank: int,
    num_slots: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Hold tables on both kernels to each other."""
    parts = {"q": slice(0, width // 2), "v": slice(width - width // 3, width)}
    results = []
    x, y = random(len(slots), depth, seed=1), random(len(slots), width, seed=2)
    for kernels in (TorchKernels(DEVICE, dtype), TritonKernels(DEVICE, dtype)):
        table = LoRATable(WeightSpec(width, depth), parts, num_slots, rank, kernels)
        for slot in range(num_slots):
            # Each of its own rank, and some of one projection alone.
            part_rank = 1 + slot % rank
            table.put(
                slot,
                {
                    name: PartWeights(
                        random(part_rank, depth, seed=slot).cpu() * depth**-0.5,
                        random(columns.stop - columns.start, part_rank, seed=slot).cpu()
                        * part_rank**-0.5,
                    )
                    for name, columns in list(parts.items())[slot % 2 :]
                },
            )
        batch = kernels.lora_batch(np.array(slots, dtype=np.int64))
        mine = y.to(dtype)
        results.append(mine if batch is None else table.add(mine, x.to(dtype), batch))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    none = torch.tensor([slot < 0 for slot in slots], device=DEVICE, dtype=torch.bool)
    assert torch.equal(results[1][none], y.to(dtype)[none])


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 24, 40])
def test_ranks(rank: int, dtype: torch.dtype) -> None:
    check([0, 1, -1, 1], 48, 96, rank, 2, dtype)


@pytest.mark.parametrize("depth", [16, 100, 1024, 1025, 3000])
def test_depths(depth: int) -> None:
    """More than are summed by one program among them."""
    check([1, 0], depth, 40, 4, 2)


@pytest.mark.parametrize("width", [6, 63, 64, 65, 200])
def test_widths(width: int) -> None:
    check([1, 0, -1], 32, width, 4, 2)


@pytest.mark.parametrize(
    "slots",
    [
        [],
        [-1],
        [0],
        [3],
        [0] * BLOCK_M,
        [2] * (BLOCK_M + 1),
        [-1] * BLOCK_M + [1],
        [row % 5 - 1 for row in range(2 * BLOCK_M + 3)],
    ],
    ids=lambda slots: f"{len(slots)} rows, slots {set(slots)}",
)
def test_rows(slots: list[int]) -> None:
    check(slots, 32, 48, 4, 4)


@settings(max_examples=25, deadline=None)
@given(
    slots=st.lists(st.integers(-1, 2), max_size=40),
    depth=st.integers(1, 150),
    width=st.integers(3, 130),
    rank=st.integers(1, 20),
    dtype=st.sampled_from(DOT_DTYPES),
)
def test_any_shape(slots: list[int], depth: int, width: int, rank: int, dtype: torch.dtype) -> None:
    check(slots, depth, width, rank, 3, dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, y = random(40, 1100, seed=1, dtype=dtype), random(40, 70, seed=2, dtype=dtype)
    down, up = random(3, 12, 1100, seed=3, dtype=dtype), random(3, 70, 12, seed=4, dtype=dtype)
    slots = torch.arange(40, device=DEVICE) % 4 - 1
    together = add_lora(y.clone(), x, down, up, slots)
    for first, last in ((0, 1), (7, 8), (5, 22), (39, 40)):
        rows = slice(first, last)
        found = add_lora(y[rows].clone(), x[rows], down, up, slots[rows])
        assert torch.equal(found, together[rows])


def test_rows_with_gaps_between_them() -> None:
    x, y = random(5, 90, seed=1), random(5, 70, seed=2)
    down, up = random(2, 4, 64, seed=3), random(2, 40, 4, seed=4)
    slots = torch.tensor([1, 0, 0, -1, 1], device=DEVICE)
    expected = add_lora(y[:, 10:50].clone(), x[:, 8:72].contiguous(), down, up, slots)
    before = y.clone()
    found = add_lora(y[:, 10:50], x[:, 8:72], down, up, slots)
    assert torch.equal(found, expected)
    assert torch.equal(y[:, :10], before[:, :10])
    assert torch.equal(y[:, 50:], before[:, 50:])
    again = add_lora(before[:, 10:50], x[:, 8:72].T.contiguous().T, down, up, slots)
    assert torch.equal(again, expected)


def test_slots_are_replaced_in_place() -> None:
    """A captured step goes on with what a slot holds by then, and adds nothing once it is empty."""
    kernels = TritonKernels(DEVICE, torch.float32)
    table = LoRATable(WeightSpec(8, 8), {"o": slice(0, 8)}, 2, 2, kernels)
    batch = kernels.lora_batch(np.array([1, 1]))
    assert batch is not None
    x = random(2, 8)

    def added() -> Tensor:
        return table.add(torch.zeros(2, 8, device=DEVICE), x, batch)

    assert not added().any()
    for seed in (1, 2):
        weights = PartWeights(random(2, 8, seed=seed).cpu(), random(8, 2, seed=seed).cpu())
        table.put(1, {"o": weights})
        expected = x @ (weights.up @ weights.down).T.to(DEVICE)
        torch.testing.assert_close(added(), expected, rtol=1e-4, atol=1e-4)
    table.put(0, {"o": weights})
    table.put(1, {})
    assert not added().any()


def test_a_batch_of_other_rows_is_refused() -> None:
    kernels = TritonKernels(DEVICE, torch.float32)
    table = LoRATable(WeightSpec(8, 8), {"o": slice(0, 8)}, 1, 2, kernels)
    batch = kernels.lora_batch(np.array([0, 0]))
    assert batch is not None
    with pytest.raises(RuntimeError, match="the adapters of 2 rows for 3 others"):
        table.add(torch.zeros(3, 8, device=DEVICE), random(3, 8), batch)


def test_rows_made_of_others() -> None:
    batch = IndexedBatch(torch.tensor([2, -1, 0], device=DEVICE))
    taken = batch.take(torch.tensor([0, 1, 2, 0], device=DEVICE), repeats=2)
    assert taken.slots.tolist() == [2, 2, -1, -1, 0, 0, 2, 2]
    assert len(taken) == 8
    assert batch.take(torch.tensor([1], device=DEVICE)).slots.tolist() == [-1]


def test_no_adapter_is_no_batch() -> None:
    kernels = TritonKernels(DEVICE, torch.float32)
    assert kernels.lora_batch(np.array([-1, -1])) is None
    assert kernels.lora_batch(np.array([], dtype=np.int64)) is None


def test_captured_steps_have_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of their own step, though others had them when it was captured."""
    model = make_checkpoint(tmp_path / "model", "Qwen3", num_hidden_layers=1, head_dim=32)
    first, second = (
        LoRARequest(str(seed), seed, str(write_peft(model, tmp_path / str(seed), seed=seed)))
        for seed in (1, 2)
    )
    recorded = RecordedGraphs()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = SMALL | {"max_loras": 1, "num_kv_blocks": 16, "max_cudagraph_capture_size": 2}

    def generate(**more: Any) -> list[list[int]]:
        prompts = [[5, 17, 200, 31]] * 2
        with LLM(str(model), **options | more) as llm:
            outputs = llm.generate(prompts, params, False, [None, first])
            outputs += llm.generate(prompts, params, False, [second, None])  # in the same slot
        return [output.outputs[0].token_ids for output in outputs]

    expected = generate()
    assert expected[0] == expected[3]
    assert len({tuple(tokens) for tokens in expected}) == 3
    monkeypatch.setattr(loading, "graph_capture", lambda config, device: recorded)
    assert generate(attention_backend="triton") == expected
    assert recorded.num_replayed > 6
