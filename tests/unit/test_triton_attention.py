"""The Triton attention kernels against `SdpaBackend`, over paged caches full of stale garbage."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    BlockTables,
    HeadNorms,
    IntArray,
    PlanBuffers,
    to_device,
)
from nanovllm.kernels.sdpa import SdpaBackend
from nanovllm.kernels.triton import attention
from nanovllm.kernels.triton.attention import TritonAttention, TritonPlan, find_shared_prefix
from tests.triton_device import DEVICE, DOT_DTYPES, INTERPRETED

Row = tuple[int, int, int]
"""Sequence, start, length."""

BASE = AttentionConfig(16, 4, 2, 32, torch.float32)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# (start, length): decodes, chunks of a prefill, whole prompts, and a decode that comes late.
MIXTURE = ((0, 1), (15, 1), (90, 1), (37, 19), (0, 33), (64, 17), (50, 1))
NOWHERE = -(1 << 40)
each_dtype = pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)


@dataclass
class World:
    """A cache with sequences in blocks drawn at random, and NaN in all the others."""

    config: AttentionConfig
    num_blocks: int = 120
    seed: int = 0
    sequences: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        spec = SdpaBackend(self.config).cache_spec(self.num_blocks)
        self.cache = torch.full(spec.shape, torch.nan, dtype=spec.dtype, device=DEVICE)
        self.free = torch.randperm(self.num_blocks, generator=self.generator).tolist()

    def random(self, *shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=self.generator)
        return numbers.to(DEVICE, self.config.dtype)

    def add(self, length: int, parent: int = -1, shared: int = 0) -> int:
        """Write a sequence whose first `shared` blocks are those of its parent."""
        size = self.config.block_size
        kept = self.sequences[parent][:shared] if shared else []
        blocks = [self.free.pop() for _ in range(-(-length // size) - len(kept))]
        position = torch.arange(length - len(kept) * size)
        slots = torch.tensor([*blocks, 0])[position // size] * size + position % size
        for cache in self.cache.flatten(1, 2):
            cache[slots.to(DEVICE)] = self.random(len(slots), *cache.shape[1:])
        self.sequences.append(kept + blocks)
        return len(self.sequences) - 1

    def rows(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        return [(self.add(start + length), start, length) for start, length in rows]

    def tables(self, num_slots: int, width: int) -> BlockTables:
        """Tables whose entries lead nowhere, and one more for rows that pad."""
        host = np.full((num_slots + 1, width), NOWHERE)
        return BlockTables(torch.from_numpy(host).to(DEVICE), host)

    def fill(self, tables: BlockTables, rows: Sequence[Row]) -> IntArray:
        """Enter the rows' blocks; return their slots, which are not in order."""
        slots: IntArray = np.arange(len(rows))[::-1].copy()
        tables.append(
            [
                (
                    int(slot),
                    0,
                    self.sequences[which][: -(-(start + length) // self.config.block_size)],
                )
                for slot, (which, start, length) in zip(slots, rows, strict=True)
            ]
        )
        return slots

    def batch(self, rows: Sequence[Row], width: int | None = None) -> AttentionBatch:
        size = self.config.block_size
        needed = max((-(-(start + length) // size) for _, start, length in rows), default=0)
        tables = self.tables(len(rows), needed if width is None else width)
        slots = self.fill(tables, rows)
        starts, lengths = (np.array([row[i] for row in rows], dtype=np.int64) for i in (1, 2))
        return AttentionBatch.of(starts, lengths, slots, tables)

    def queries(self, rows: Sequence[Row]) -> Tensor:
        """A query for each sequence and position, the same in every batch."""
        width = (self.config.num_heads, self.config.head_dim)
        return torch.cat(
            [torch.empty(0, *width, dtype=self.config.dtype, device=DEVICE)]
            + [
                torch.randn(start + length, *width, generator=torch.Generator().manual_seed(which))[
                    start:
                ].to(DEVICE, self.config.dtype)
                for which, start, length in rows
            ]
        )

    def expected(self, rows: Sequence[Row], window: int | None = None) -> Tensor:
        """What the twin says, on the CPU: on a GPU it might take other kernels for float32."""
        batch = self.batch(rows)
        batch = AttentionBatch.of(
            batch.starts,
            batch.lengths,
            batch.slots,
            BlockTables(torch.from_numpy(batch.tables.host), batch.tables.host),
        )
        twin = SdpaBackend(self.config)
        q, cache = self.queries(rows).cpu(), self.cache.cpu()
        return twin.run(q, cache, twin.plan(batch), window).to(DEVICE)

    def run(
        self,
        rows: Sequence[Row],
        window: int | None = None,
        num_sms: int = 2,
        width: int | None = None,
    ) -> Tensor:
        backend = TritonAttention(self.config, num_sms)
        plan = backend.plan(self.batch(rows, width))
        return backend.run(self.queries(rows), self.cache, plan, window)

    def check(
        self,
        rows: Sequence[Row],
        windows: Sequence[int | None] = (None,),
        num_sms: int = 2,
        width: int | None = None,
    ) -> None:
        for window in windows:
            out = self.run(rows, window, num_sms, width)
            assert_close(out, self.expected(rows, window))


def assert_close(out: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@each_dtype
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
def test_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    world = World(replace(BASE, dtype=dtype, head_dim=head_dim))
    world.check(world.rows(MIXTURE))


@each_dtype
@pytest.mark.parametrize(
    "heads",
    [(1, 1), (2, 2), (2, 1), (3, 1), (6, 2), (4, 1), (6, 1), (8, 1), (16, 2), (16, 1), (7, 7)],
    ids=str,
)
def test_groups_of_heads(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    world = World(replace(BASE, dtype=dtype, num_heads=heads[0], num_kv_heads=heads[1]))
    world.check(world.rows(MIXTURE), (None, 24))


def test_more_heads_in_a_group_than_in_a_tile() -> None:
    world = World(replace(BASE, num_heads=71, num_kv_heads=1))
    world.check(world.rows([(33, 1), (15, 3)]))


@pytest.mark.parametrize("window", [None, 1, 16, 7, 1000])
@pytest.mark.parametrize("block_size", [1, 5, 16, 256])
def test_block_sizes_and_windows(block_size: int, window: int | None) -> None:
    world = World(replace(BASE, block_size=block_size), num_blocks=500 // block_size + 10)
    world.check(world.rows(MIXTURE), (window,))


@pytest.mark.parametrize("end", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96])
def test_ends_at_and_beside_the_bounds_of_blocks_and_tiles(end: int) -> None:
    world = World(BASE)
    chunks = {(end - 1, 1), (0, end), (end // 2, end - end // 2), (max(0, end - 16), min(end, 16))}
    world.check(world.rows(sorted(chunks, key=lambda row: row[1])), (None, 16))


@each_dtype
@pytest.mark.parametrize("num_sms", [1, 5, 30])
def test_decodes_are_split_until_they_fill_the_chip(dtype: torch.dtype, num_sms: int) -> None:
    """Far more splits than some rows have tiles, or blocks; what is left over stays empty."""
    world = World(replace(BASE, dtype=dtype))
    rows = world.rows([(0, 1), (15, 1), (16, 1), (200, 1), (64, 1)])
    world.check(rows, (None, 100), num_sms)
    world.check(rows, (24,), num_sms, width=80)


def test_the_merge_of_many_splits() -> None:
    world = World(replace(BASE, num_heads=1, num_kv_heads=1), num_blocks=90)
    rows = world.rows([(1300, 1)])
    plan = TritonAttention(world.config, 20).plan(world.batch(rows))
    world.check(rows, (None, 900), num_sms=20)
    TritonAttention(world.config, 20).run(world.queries(rows), world.cache, plan, None)
    assert plan.splits is not None
    assert plan.splits.spans.tolist() == [[0, 41]]
    assert attention.COMBINED_SPLITS < 41


@pytest.mark.parametrize(
    ("ends", "num_sms", "spans"),
    [
        ((700, 30, 64), 4, [[0, 4], [4, 1], [5, 1]]),
        ((64, 65, 0), 4, [[0, 2], [2, 3], [5, 1]]),
        ((1,) * 5, 2, [[i, 1] for i in range(5)]),
        ((500, 500), 1, [[0, 1], [1, 1]]),
        ((500, 500), 2, [[0, 2], [2, 2]]),
    ],
)
def test_keys_are_divided_evenly(
    ends: tuple[int, ...], num_sms: int, spans: list[list[int]]
) -> None:
    """Into tiles of 32 keys; a row that pads has its item, too."""
    world = World(BASE)
    batch, _ = captured(world, len(ends), width=200)
    batch = refill(world, batch, world.rows([(end - 1, 1) for end in ends if end]))
    backend = TritonAttention(BASE, num_sms)
    plan = backend.plan(batch)
    backend.run(torch.zeros(len(ends), 4, 32, device=DEVICE), world.cache, plan, None)
    assert plan.splits is not None
    assert plan.splits.spans.tolist() == spans


def test_what_is_split_hangs_on_shapes_alone() -> None:
    world = World(BASE)
    rows = [world.rows([(end - 1, 1) for end in ends]) for ends in ((1, 1), (100, 3), (300, 299))]
    for num_sms, width, spare in ((8, 40, 8), (1, 40, None), (1, 150, 1), (8, 2, None)):
        backend = TritonAttention(BASE, num_sms)
        plans = [backend.plan(world.batch(pair, width)) for pair in rows[: 1 if width < 20 else 3]]
        assert {plan.splits and plan.splits.spare for plan in plans} == {spare}


@pytest.mark.parametrize(
    ("rows", "num_decodes"),
    [
        ((), 0),
        (((0, 1),), 1),
        (((0, 40),), 0),
        (((3, 1), (0, 5), (7, 1), (20, 1)), 1),
        (((0, 17), (7, 1), (0, 1)), 0),
    ],
)
def test_leading_decodes_are_told_from_the_rest(
    rows: tuple[tuple[int, int], ...], num_decodes: int
) -> None:
    world = World(BASE)
    written = world.rows(rows)
    plan = TritonAttention(BASE, 2).plan(world.batch(written))
    assert plan.num_decodes == num_decodes
    world.check(written, (None, 4))
    assert world.run(written).shape == (sum(length for _, length in rows), 4, 32)


def test_large_tiles() -> None:
    world = World(replace(BASE, dtype=torch.float16, num_heads=8))
    rows = world.rows([(0, 70), (13, 200), (50, 1)])
    plan = TritonAttention(world.config, 2).plan(world.batch(rows))
    assert plan.prefill is not None
    assert plan.prefill.tiling.block_m == 128
    world.check(rows, (None, 33))


def test_queries_may_be_views() -> None:
    world = World(BASE)
    rows = world.rows(MIXTURE)
    wide = torch.cat([world.queries(rows)] * 2, dim=1)
    backend = TritonAttention(BASE, 2)
    out = backend.run(wide[:, :4], world.cache, backend.plan(world.batch(rows)), None)
    assert_close(out, world.expected(rows))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=4),
    decodes=st.lists(st.integers(0, 90), max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1), (8, 1)]),
    head_dim=st.sampled_from([16, 24, 32]),
    block_size=st.sampled_from([1, 3, 16, 48]),
    window=st.none() | st.integers(1, 120),
    num_sms=st.integers(1, 12),
    dtype=st.sampled_from(DOT_DTYPES),
    seed=st.integers(0, 100),
)
def test_random_batches(
    rows: list[tuple[int, int]],
    decodes: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int | None,
    num_sms: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    config = AttentionConfig(block_size, *heads, head_dim, dtype)
    world = World(config, 1000 // block_size + 20, seed)
    batch = world.rows([*((start, 1) for start in decodes), *rows])
    world.check(batch, (window,), num_sms)


@pytest.fixture
def eager_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MIN_SAVED_POSITIONS", 16)


def family(world: World, root_blocks: int = 5, members: int = 6) -> list[Row]:
    """Decodes that share a prefix among others that do not, or share less of it."""
    size = world.config.block_size
    root = world.add(root_blocks * size)
    rows = []
    for i in range(members):
        start = root_blocks * size + 7 * i
        rows.append((world.add(start + 1, root, root_blocks), start, 1))
    own = world.add(2 * size + 3)
    less = world.add(size + 9, root, 1)
    return [*rows[:2], (own, 2 * size + 2, 1), *rows[2:], (less, size + 8, 1), (own, 0, 1)]


def header(plan: TritonPlan) -> list[int]:
    """How many rows share, and how many positions."""
    assert plan.shared is not None
    return [int(number) for number in plan.shared.header[:2]]


@each_dtype
@pytest.mark.parametrize(
    ("heads", "num_sms"), [((4, 2), 1), ((6, 2), 9), ((3, 1), 2), ((1, 1), 24)], ids=str
)
@pytest.mark.usefixtures("eager_to_share")
def test_a_shared_prefix_is_read_once(
    dtype: torch.dtype, heads: tuple[int, int], num_sms: int
) -> None:
    world = World(replace(BASE, dtype=dtype, num_heads=heads[0], num_kv_heads=heads[1]))
    rows = [*family(world), *world.rows([(20, 5)])]
    plan = TritonAttention(world.config, num_sms).plan(world.batch(rows))
    assert header(plan) == [6, 80]
    assert plan.shared is not None
    assert plan.shared.begins[:9].tolist() == [80, 80, 0, 80, 80, 80, 80, 0, 0]
    world.check(rows, (None, 24), num_sms)

    # That the prefix is not read row by row: without it nothing else knows these keys.
    out = world.run(rows, num_sms=num_sms)
    world.config = replace(world.config, cascade=False)
    assert TritonAttention(world.config, num_sms).plan(world.batch(rows)).shared is None
    assert_close(out, world.run(rows, num_sms=num_sms))


@pytest.mark.usefixtures("eager_to_share")
def test_rows_take_a_shared_prefix_from_where_it_was_left() -> None:
    """Values of the prefix change for its first member only: all rows see the change."""
    world = World(BASE)
    rows = family(world)
    batch = world.batch(rows)
    backend = TritonAttention(BASE, 9)
    plan = backend.plan(batch)
    batch.tables.device[batch.device_slots[1:], :5] = batch.tables.device[batch.device_slots[2], 0]
    out = backend.run(world.queries(rows), world.cache, plan, None)
    assert_close(out[[0, 1, 3, 4, 5, 6]], world.expected(rows)[[0, 1, 3, 4, 5, 6]])


def test_sharing_must_save_enough() -> None:
    world = World(BASE)
    assert TritonAttention(BASE, 2).plan(world.batch(family(world))).shared is None


@pytest.mark.usefixtures("eager_to_share")
def test_what_a_decode_reads_itself_begins_no_later_than_at_its_query() -> None:
    """Rows at the end of the prefix share what lies before them in whole blocks."""
    world = World(BASE)
    root = world.add(80)
    for start, shared in ((79, 64), (64, 64), (63, 48), (16, 16)):
        rows = [(root, start, 1)] * 5
        plan = TritonAttention(BASE, 4).plan(world.batch(rows))
        assert header(plan) == [5, shared]
        world.check(rows)
    assert TritonAttention(BASE, 4).plan(world.batch([(root, 15, 1)] * 5)).shared is None


@settings(max_examples=8, deadline=None)
@given(
    shared=st.lists(st.integers(0, 4), min_size=4, max_size=8),
    more=st.lists(st.integers(0, 40), min_size=8, max_size=8),
    num_sms=st.integers(1, 12),
)
def test_random_prefixes(shared: list[int], more: list[int], num_sms: int) -> None:
    """Rows that have more or less of one prompt: all in one plan, whoever shares."""
    world = World(BASE)
    root = world.add(64)
    rows = []
    for blocks, rest in zip(shared, more, strict=False):
        start = blocks * 16 + rest
        rows.append((world.add(start + 1, root, blocks), start, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MIN_SAVED_POSITIONS", 16)
        plan = TritonAttention(BASE, num_sms).plan(world.batch(rows))
        assert (plan.shared is not None) == (sum(blocks > 0 for blocks in shared) >= 4)
        world.check(rows, num_sms=num_sms)


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(
            st.integers(-1, 19),
            st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_the_shared_prefix_that_is_found(drawn: list[tuple[int, tuple[int, ...]]]) -> None:
    """It is shared, and what it saves is no less than the first block of the largest group."""
    starts, host = (np.array(column) for column in zip(*drawn, strict=True))
    tables = BlockTables(torch.from_numpy(host), host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MIN_SAVED_POSITIONS", 12)
        rows, length = find_shared_prefix(tables, np.arange(len(drawn)), starts, 4)
    assert length % 4 == 0
    assert sorted(set(rows.tolist())) == rows.tolist()
    if len(rows):
        assert len(rows) >= attention.MIN_MEMBERS
        assert (len(rows) - 1) * length >= 12
        assert (starts[rows] >= length).all()
        assert (host[rows, : length // 4] == host[rows[0], : length // 4]).all()
    able = host[starts >= 4, 0]
    largest = max((able == first).sum() for first in (0, 1))
    if largest >= 4:
        assert (len(rows) - 1) * length >= (largest - 1) * 4


def captured(world: World, sizes: int, width: int) -> tuple[AttentionBatch, PlanBuffers]:
    """Inputs of a graph: at fixed places, all rows padding."""
    tables = world.tables(sizes, width)
    slots, ends = np.full(sizes, sizes), np.zeros(sizes, dtype=np.int64)
    batch = AttentionBatch(
        ends - 1, ends + 1, slots, tables, to_device(slots, DEVICE), to_device(ends, DEVICE)
    )
    return batch, PlanBuffers()


def refill(world: World, batch: AttentionBatch, rows: Sequence[Row]) -> AttentionBatch:
    """The graph's inputs in place for other decodes, padded; what the host plans by, anew."""
    padding = len(batch.slots) - len(rows)
    slots = np.concatenate([world.fill(batch.tables, rows), np.full(padding, len(batch.slots))])
    starts = np.array([start for _, start, _ in rows] + [-1] * padding)
    batch.device_slots.copy_(torch.from_numpy(slots))
    batch.device_ends.copy_(torch.from_numpy(starts + 1))
    return replace(batch, starts=starts, slots=slots)


@each_dtype
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("size", "num_sms"), [(3, 8), (6, 2), (6, 12)])
@pytest.mark.usefixtures("eager_to_share")
def test_captured_plans(dtype: torch.dtype, deterministic: bool, size: int, num_sms: int) -> None:
    """What is launched is frozen at the first plan; later plans only fill its places."""
    world = World(replace(BASE, dtype=dtype, deterministic=deterministic))
    backend = TritonAttention(world.config, num_sms)
    batch, buffers = captured(world, size, width=8)
    frozen = backend.plan(batch, buffers)
    assert (frozen.shared is not None) == (size >= 4 and not deterministic)
    decodes = world.rows([(0, 1), (15, 1), (100, 1)])
    steps = [([], 24), (family(world)[: size - 1], None), (decodes[::-1], 24)]
    for rows, window in [*steps, (decodes[1:], None), (family(world)[:size], None)]:
        backend.plan(refill(world, batch, rows), buffers)
        padding = torch.full((size - len(rows), 4, 32), 3.0, dtype=dtype, device=DEVICE)
        q = torch.cat([world.queries(rows), padding])
        out = backend.run(q, world.cache, frozen, window)
        assert not out[len(rows) :].any()
        if rows:
            assert_close(out[: len(rows)], world.expected(rows, window))
    assert frozen.shared is None or header(frozen) == [5, 80]


@pytest.fixture(scope="module")
def products_in_order() -> Iterator[None]:
    """Have the interpreter sum products as a tensor core does: alike in all rows of a tile.

    It takes them from BLAS, where what is summed first hangs on the row.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    def dot(builder: Any, a: Any, b: Any, sums: Any, *options: Any) -> Any:
        total = sums.data.copy()
        for left, right in zip(a.data.T.astype(np.float32), b.data.astype(np.float32), strict=True):
            total += left[:, None] * right
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


@each_dtype
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("heads", [(4, 2), (5, 1)], ids=str)
@pytest.mark.usefixtures("products_in_order")
def test_deterministic_rows_do_not_hang_on_the_others(
    dtype: torch.dtype, window: int | None, heads: tuple[int, int]
) -> None:
    config = replace(
        BASE, dtype=dtype, deterministic=True, num_heads=heads[0], num_kv_heads=heads[1]
    )
    world = World(config, num_blocks=200)
    sequence = world.add(91)
    whole = world.run([(sequence, 0, 91)], window)
    others = world.rows([(start, 1) for start in range(0, 64, 4)])
    for start, length in ((0, 1), (90, 1), (89, 2), (33, 50)):
        row = (sequence, start, length)
        parts = [world.run([row], window, num_sms=40)]
        first = [*others[:9], row, *others[9:]]
        parts.append(world.run(first, window)[9 : 9 + length])
        if length == 1:
            backend = TritonAttention(config, 2)
            batch, buffers = captured(world, 18, 8)
            plan = backend.plan(refill(world, batch, first), buffers)
            q = torch.cat([world.queries(first), world.queries([row])])
            parts.append(backend.run(q, world.cache, plan, window)[9:10])
        for part in parts:
            assert torch.equal(part, whole[start : start + length]), row


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_tiles_have_one_shape(deterministic: bool) -> None:
    world = World(replace(BASE, dtype=torch.float16, deterministic=deterministic))
    backend = TritonAttention(world.config, 1)
    plans = [backend.plan(world.batch(world.rows([(0, length)]))) for length in (2, 100)]
    assert len({plan.prefill and plan.prefill.tiling for plan in plans}) == 2 - deterministic


@pytest.mark.usefixtures("products_in_order")
@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 69), max_size=6), dtype=st.sampled_from(DOT_DTYPES))
def test_deterministic_chunks(cuts: set[int], dtype: torch.dtype) -> None:
    world = World(replace(BASE, dtype=dtype, deterministic=True))
    sequence = world.add(70)
    bounds = itertools.pairwise([0, *sorted(cuts), 70])
    chunks = [(sequence, start, end - start) for start, end in bounds]
    assert torch.equal(world.run(chunks), world.run([(sequence, 0, 70)]))


@pytest.mark.parametrize("change", [{"quantize_cache": True}, {"head_dim": 320}])
def test_what_the_kernels_lack_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"must be .auto|choose .sdpa"):
        TritonAttention(replace(BASE, **change))


def test_heads_are_written_like_those_of_the_twin() -> None:
    backends = TritonAttention(BASE), SdpaBackend(BASE)
    assert backends[0].capturable
    generator = torch.Generator().manual_seed(0)
    qkv, weights, angles = (
        torch.randn(*shape, generator=generator).to(DEVICE)
        for shape in ((5, 8 * 32), (2, 32), (5, 1, 16))
    )
    norms = HeadNorms(weights[0], weights[1], 1e-6)
    slots = torch.tensor([3, 40, -1, 0, 17], device=DEVICE)
    caches = [torch.zeros(b.cache_spec(4).shape, device=DEVICE) for b in backends]
    rotary = angles.cos(), angles.sin()
    queries = [
        backend.write(qkv, norms, rotary, cache, slots)
        for backend, cache in zip(backends, caches, strict=True)
    ]
    assert_close(queries[0], queries[1])
    assert_close(caches[0], caches[1])
