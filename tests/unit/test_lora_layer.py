"""Adapters of one linear layer: rows grouped by adapter, and each row's own product."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.kernels.grouped_lora import GroupedBatch
from nanovllm.kernels.kernels import WeightSpec
from nanovllm.kernels.lora import NO_ADAPTER
from nanovllm.kernels.select import select_kernels
from nanovllm.layers.lora import LoRATable, PartWeights

CPU = torch.device("cpu")


def test_no_adapter_is_no_batch() -> None:
    assert GroupedBatch.of(np.array([NO_ADAPTER, NO_ADAPTER]), CPU) is None
    assert GroupedBatch.of(np.array([], dtype=np.int64), CPU) is None


def test_rows_are_grouped() -> None:
    batch = GroupedBatch.of(np.array([2, NO_ADAPTER, 0, 2]), CPU)
    assert batch is not None
    groups = dict(batch.groups)
    assert {slot: rows.tolist() for slot, rows in groups.items() if rows is not None} == {
        0: [2],
        2: [0, 3],
    }


def test_one_adapter_for_all_gathers_nothing() -> None:
    batch = GroupedBatch.of(np.array([1, 1]), CPU)
    assert batch is not None
    assert batch.groups == ((1, None),)


def test_rows_made_of_others() -> None:
    batch = GroupedBatch.of(np.array([2, NO_ADAPTER, 0]), CPU)
    assert batch is not None
    taken = batch.take(torch.tensor([0, 1, 2, 0]), repeats=2)
    assert taken is not None
    assert taken.slots.tolist() == [2, 2, -1, -1, 0, 0, 2, 2]
    kept = batch.take(torch.tensor([False, True, True]))
    assert kept is not None
    assert kept.slots.tolist() == [-1, 0]
    assert batch.take(torch.tensor([False, True, False])) is None


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_each_row_gets_its_own_product(kernels: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def weights(rank: int, width: int) -> PartWeights:
        return PartWeights(
            torch.randn(rank, 64, generator=generator),
            torch.randn(width, rank, generator=generator),
        )

    config = EngineConfig(cpu_isa=kernels, cpu_threads=1)
    made = select_kernels(config, CPU, torch.float32)
    parts = {"q": slice(0, 40), "v": slice(60, 90)}
    table = LoRATable(WeightSpec(90, 64), parts, 2, 3, made)
    held: list[dict[str, PartWeights]] = [
        {"v": weights(2, 30), "q": weights(2, 40)},
        {"v": weights(3, 30)},
    ]
    table.put(1, {"q": weights(3, 40)})  # what a slot held before does not matter
    for slot, adapter in enumerate(held):
        table.put(slot, adapter)
    x = torch.randn(5, 64, generator=generator)
    slots = [1, NO_ADAPTER, 0, 0, 1]
    expected = torch.ones(5, 90)
    for row, slot in enumerate(slots):
        for part, (down, up) in held[slot].items() if slot != NO_ADAPTER else ():
            expected[row, parts[part]] += up @ down @ x[row]
    batch = GroupedBatch.of(np.array(slots), CPU)
    assert batch is not None
    found = table.add(torch.ones(5, 90), x, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for row, slot in enumerate(slots):
        if slot != NO_ADAPTER:
            alone = GroupedBatch.of(np.array([slot]), CPU)
            assert alone is not None
            found = table.add(torch.ones(1, 90), x[row : row + 1], alone)
            torch.testing.assert_close(found[0], expected[row], rtol=1e-4, atol=1e-4)
    table.put(0, {})
    nothing = GroupedBatch.of(np.array([0]), CPU)
    assert nothing is not None
    assert table.add(torch.ones(1, 90), x[:1], nothing).eq(1).all()


def test_rows_of_deterministic_kernels_do_not_depend_on_each_other() -> None:
    config = EngineConfig(cpu_threads=1, deterministic=True)
    kernels = select_kernels(config, CPU, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    table = LoRATable(WeightSpec(96, 64), {"o": slice(0, 96)}, 2, 8, kernels)
    for slot in range(2):
        down = torch.randn(8, 64, generator=generator)
        table.put(slot, {"o": PartWeights(down, torch.randn(96, 8, generator=generator))})
    x, y = (torch.randn(40, n, generator=generator).bfloat16() for n in (64, 96))
    slots = np.arange(40) % 3 - 1

    def add(rows: slice) -> Tensor:
        batch = GroupedBatch.of(slots[rows], CPU)
        mine = y[rows].clone()
        return mine if batch is None else table.add(mine, x[rows].contiguous(), batch)

    together = add(slice(None))
    for row in range(40):
        assert torch.equal(add(slice(row, row + 1))[0], together[row])
