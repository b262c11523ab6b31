"""Kernels that are written down once and then repeated: they must change nothing, to the bit."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.cpu import replay
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.packing import PackedWeight
from nanovllm.kernels.cpu.replay import MAX_ROWS
from nanovllm.kernels.kernels import WeightSpec
from tests.cpu_kernels import kernels_for, random
from tests.replay_log import Log, watch_replays

DEPTH, WIDTH = 48, 40

Part = tuple[Tensor, ...]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return watch_replays(monkeypatch)


class Network:
    """A few kernels on end, which need memory for what comes between them.

    Args:
        dtype: Of the kernels.
        seed: Of its weights.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.kernels = kernels_for("portable", dtype)
        self.up = self._pack(2 * WIDTH, DEPTH, seed, "silu")
        self.down = self._pack(DEPTH, WIDTH, seed + 1)
        self.norm = random(DEPTH, seed=seed + 2)
        self.num_computed = 0
        self.dtype = dtype

    def _pack(
        self, rows: int, depth: int, seed: int, activation: Activation | None = None
    ) -> PackedWeight:
        weight = random(rows, depth, seed=seed) * depth**-0.5
        spec = WeightSpec(rows, depth, activation)
        return self.kernels.pack(spec, weight.chunk(1 + spec.gated), random(rows, seed=seed))

    def compute(self, x: Tensor, residual: Tensor) -> Part:
        self.num_computed += 1
        for _ in range(3):
            x, residual = self.kernels.add_rms_norm(x, residual, self.norm, 1e-5)
            x = self.kernels.linear(self.kernels.linear(x, self.up), self.down)
        return x, residual

    def inputs(self, rows: int, seed: int = 0) -> Part:
        x, residual = random(2, rows, DEPTH, seed=seed, dtype=self.dtype).unbind()
        return x.clone(), residual.clone()

    def check(self, rows: int, seed: int = 0, key: str = "network") -> None:
        """Compare what is repeated with what is computed."""
        expected = self.compute(*self.inputs(rows, seed))
        found = self.kernels.replay(key, self.compute, self.inputs(rows, seed))
        assert_same(found, expected)


def assert_same(found: Part, expected: Part) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def memory_of(kernels: CpuKernels) -> int:
    """Bytes that are kept for recordings, once the tensors of all are gone."""
    free = kernels._replays._memory._free
    return sum(size * len(pieces) for size, pieces in free.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_repeated_is_what_is_computed(dtype: torch.dtype, log: Log) -> None:
    network = Network(dtype)
    sizes = (1, 3, 256, 2, 17)
    for seed in range(4):
        for rows in sizes:
            network.check(rows, seed)
    assert log.recorded == [True] * len(sizes)
    assert log.num_run == 4 * len(sizes)


def test_it_is_written_down_once_for_a_shape(log: Log) -> None:
    network = Network()
    for seed in range(5):
        network.kernels.replay("network", network.compute, network.inputs(4, seed))
    assert network.num_computed == 1
    assert log.recorded == [True]


def test_shapes_and_keys_are_told_apart(log: Log) -> None:
    network = Network()

    def swapped(residual: Tensor, x: Tensor) -> Part:
        return network.compute(x, residual)

    inputs = network.inputs(5)
    for _ in range(2):
        network.check(5)
        found = network.kernels.replay("swapped", swapped, (inputs[1].clone(), inputs[0]))
        assert_same(found, network.compute(*network.inputs(5)))

    def project(x: Tensor) -> Part:
        return (network.kernels.act_and_mul(x, "silu"),)

    for width in (2, 8, 4) * 2:  # as many rows, and elements of which some other shape has as many
        for rows in (2, 4, 8):
            x = random(rows, width, seed=rows)
            assert_same(network.kernels.replay("project", project, (x,)), project(x))
    assert log.recorded == [True] * (2 + 9)


def test_results_are_nobody_else_s() -> None:
    network = Network()
    kept = []
    for seed in range(6):
        for rows in (4, 1 + seed):
            inputs = network.inputs(rows, seed)
            found = network.kernels.replay("network", network.compute, inputs)
            kept.append((found, network.compute(*network.inputs(rows, seed))))
    other = Network(seed=7)
    other.kernels = network.kernels
    other.check(4, key="other")
    for found, expected in kept:
        assert_same(found, expected)
    found = network.kernels.replay("network", network.compute, network.inputs(4))
    for tensor in found:
        tensor.fill_(torch.nan)
    network.check(4)


def test_the_inputs_of_a_repetition_are_read_alone() -> None:
    network = Network()
    for _ in range(3):
        inputs = network.inputs(4)
        network.kernels.replay("network", network.compute, inputs)
        assert_same(inputs, network.inputs(4))


def test_an_input_may_come_out_as_it_went_in() -> None:
    network = Network()

    def compute(x: Tensor, other: Tensor) -> Part:
        return other, network.kernels.linear(x, network.up), x

    for seed in range(3):
        inputs = network.inputs(3, seed)
        assert_same(network.kernels.replay("through", compute, inputs), compute(*inputs))


def test_views_of_what_a_kernel_made_are_repeated(log: Log) -> None:
    network = Network()

    def compute(x: Tensor) -> Part:
        out = network.kernels.linear(x[1:], network.up)
        first, second = out.split([1, 2])  # type: ignore[no-untyped-call]
        return first.view(-1, WIDTH // 2), network.kernels.act_and_mul(second, "silu"), out[:, 3:7]

    for seed in range(3):
        x = network.inputs(4, seed)[0]
        assert_same(network.kernels.replay("views", compute, (x,)), compute(x))
    assert log.recorded == [True]


def test_memory_that_is_still_used_is_not_handed_out() -> None:
    network = Network()
    kernels = network.kernels

    def compute(x: Tensor) -> Part:
        first = kernels.linear(x, network.up)
        second = kernels.linear(first, network.down)  # [num_rows, DEPTH]
        parts = [kernels.rms_norm(second, network.norm, 10.0**-i) for i in range(8)]
        del second
        view = parts[0][:2]
        again = kernels.linear(parts.pop(0), network.up)
        return view, again, *parts

    for rows in (4, 3, 4, 9):
        x = network.inputs(rows, rows)[0]
        assert_same(kernels.replay("fan", compute, (x,)), compute(x))


def test_memory_is_bounded() -> None:
    most = Network()
    most.check(MAX_ROWS)
    needed = memory_of(most.kernels)
    network = Network()
    for rows in (*range(1, MAX_ROWS + 1), *range(MAX_ROWS, 0, -7)):
        network.kernels.replay("network", network.compute, network.inputs(rows))
    pages = 16 * 4096  # what the smallest pieces take, too
    assert 0 < memory_of(network.kernels) <= 3 * needed + pages
    network.check(200)


def test_few_intermediate_results_are_kept_at_a_time() -> None:
    """However many kernels there are: what is gone makes room for what comes."""
    taken = []
    for repeats in (2, 40):
        network = Network()

        def compute(x: Tensor, network: Network = network, repeats: int = repeats) -> Part:
            for _ in range(repeats):
                x = network.kernels.rms_norm(x, network.norm, 1e-5)
                x = network.kernels.linear(network.kernels.linear(x, network.up), network.down)
            return (x,)

        x = network.inputs(64)[0]
        assert_same(network.kernels.replay("deep", compute, (x,)), compute(x))
        taken.append(memory_of(network.kernels))
    assert taken[0] == taken[1]


def test_what_is_no_kernel_is_computed_every_time(log: Log) -> None:
    network = Network()
    changing = [1.0]

    def compute(x: Tensor, residual: Tensor) -> Part:
        x, residual = network.compute(x, residual)
        return x * changing[0], residual

    for seed in range(4):
        changing[0] = seed + 0.5
        found = network.kernels.replay("scaled", compute, network.inputs(3, seed))
        x, residual = network.compute(*network.inputs(3, seed))
        assert_same(found, (x * changing[0], residual))
        network.check(3, seed)
    assert log.recorded == [False, True]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.add_(1.0),
        lambda x: x.t().contiguous().t().contiguous(),
        lambda x: x[torch.arange(len(x))],
        lambda x: torch.cat([x, x])[: len(x)],
        lambda x: x if x[0, 0].item() > 0 else -x,
        lambda x: torch.zeros_like(x) + x,
    ],
    ids=["in-place", "transposed", "gathered", "joined", "branch", "made"],
)
def test_nothing_of_torch_is_lost(spoil: Callable[[Tensor], Tensor], log: Log) -> None:
    network = Network()

    def compute(x: Tensor, residual: Tensor) -> Part:
        return network.compute(spoil(x), residual)

    for seed in range(3):
        found = network.kernels.replay("spoilt", compute, network.inputs(3, seed))
        assert_same(found, compute(*network.inputs(3, seed)))
    assert log.recorded == [False]


def test_an_error_leaves_the_kernels_as_they_were(log: Log) -> None:
    network = Network()

    def compute(x: Tensor, residual: Tensor) -> Part:
        network.compute(x, residual)
        raise ZeroDivisionError

    before = {name: getattr(network.kernels._library, name) for name in replay.REPLAYABLE}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            network.kernels.replay("network", compute, network.inputs(3))
        for name, kernel in before.items():
            assert getattr(network.kernels._library, name) is kernel
    assert log.recorded == []
    assert not network.kernels._replays._recordings
    network.check(3)
    network.check(3, seed=1)
    assert log.recorded == [True]


@pytest.mark.parametrize("rows", [0, MAX_ROWS + 1, 2 * MAX_ROWS])
def test_no_rows_and_many_are_computed(rows: int, log: Log) -> None:
    network = Network()
    for seed in range(2):
        network.check(rows, seed)
    assert log == Log()


def test_while_one_is_recorded_others_are_computed(log: Log) -> None:
    """Those of other engines, whose kernels are of the same library."""
    recorded, beside = Network(), Network(seed=9)
    expected = beside.compute(*beside.inputs(5))
    first, second = beside.inputs(5), beside.inputs(5)
    found = []

    def compute(x: Tensor, residual: Tensor) -> Part:
        with ThreadPoolExecutor(1) as pool:
            plain = pool.submit(beside.compute, *first)
            replayed = pool.submit(beside.kernels.replay, "beside", beside.compute, second)
            found.extend([plain.result(60), replayed.result(60)])
        return recorded.compute(x, residual)

    for seed in range(2):
        out = recorded.kernels.replay("network", compute, recorded.inputs(4, seed))
        assert_same(out, recorded.compute(*recorded.inputs(4, seed)))
    assert len(found) == 2
    for result in found:
        assert_same(result, expected)
    assert log.recorded == [True, True]


def test_one_part_s_recordings_do_not_disturb_another_thread() -> None:
    """Each has kernels of its own, as two engines of a process have."""
    together = threading.Barrier(2)

    def work(seed: int) -> None:
        network = Network(seed=seed)
        expected = {
            rows: network.compute(*network.inputs(rows, rows)) for rows in range(1, MAX_ROWS, 3)
        }
        together.wait(60)
        for _ in range(2):
            for rows, given in expected.items():
                found = network.kernels.replay(
                    "network", network.compute, network.inputs(rows, rows)
                )
                assert_same(found, given)
                if rows % 4 == seed:  # and what is just computed, while the other records
                    assert_same(network.compute(*network.inputs(rows, rows)), given)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, seed) for seed in range(2)]:
            done.result(120)
