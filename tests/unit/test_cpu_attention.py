"""The attention kernels against a softmax in float64, over paged caches full of stale garbage.

Outputs are weighted means of values, so every bound is relative to the mean of their magnitudes.
float32 pays for its sums alone. bf16 rounds the weights and the output, by 2^-8 each. An int8 cache
rounds keys and values; here these are whole numbers of its steps, so that it rounds nothing.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    BlockTables,
    HeadNorms,
)
from nanovllm.kernels.cpu.attention import CpuAttention
from nanovllm.kernels.cpu.replay import Replays
from tests.cpu_kernels import (
    UNIT,
    UNITS,
    assert_within,
    each_isa,
    is_fast,
    load,
    random_codes,
    sum_error,
    threads,
)

BASE = AttentionConfig(16, 4, 2, 64, torch.float32)
KINDS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float32-int8": (torch.float32, True),
    "bfloat16-int8": (torch.bfloat16, True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)

HEADS = ((1, 1), (4, 4), (4, 2), (8, 2), (7, 1), (14, 2), (16, 1), (128, 1))
HEAD_DIMS = (2, 24, 64, 80, 96, 128, 256)
BLOCK_SIZES = (1, 5, 16, 24, 32, 48, 256)
WINDOWS = (None, 1, 24, 130)

# (start, length) of each row: decode, chunks of a prefill, and whole prompts.
MIXTURE = ((0, 1), (15, 1), (130, 1), (299, 1), (37, 19), (0, 70), (128, 33), (0, 2))


@dataclass
class History:
    """A sequence's blocks, and what was projected for each of its positions."""

    blocks: list[int]
    q: Tensor  # [len, num_heads, head_dim]
    k: Tensor  # [len, num_kv_heads, head_dim]
    v: Tensor


@dataclass
class World:
    """A cache with sequences in blocks drawn at random, and garbage in all the others."""

    isa: str
    config: AttentionConfig
    cascade: bool = True
    deterministic: bool = False
    num_blocks: int = 600
    seed: int = 0
    sequences: list[History] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.library = load(self.isa)
        self.backend = self.make_backend(self.cascade)
        spec = self.backend.cache_spec(self.num_blocks)
        self.cache = torch.zeros(spec.shape, dtype=spec.dtype)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.free = torch.randperm(self.num_blocks, generator=self.generator).tolist()
        self._fill_with_garbage()

    def make_backend(self, cascade: bool) -> CpuAttention:
        return CpuAttention(Replays(self.library), self.config, cascade, self.deterministic)

    def _fill_with_garbage(self) -> None:
        """Leave what a sequence may have left: keys that are NaN, values that are huge."""
        config = self.config
        slots = torch.arange(self.num_blocks * config.block_size)
        heads = torch.full((len(slots), config.num_kv_heads, config.head_dim), 1e30)
        self._write(slots, heads[:, : config.num_kv_heads] * torch.nan, heads)

    def _write(self, slots: Tensor, k: Tensor, v: Tensor, q: Tensor | None = None) -> Tensor:
        config = self.config
        if q is None:
            q = torch.zeros(len(slots), config.num_heads, config.head_dim)
        qkv = torch.cat([q, k, v], 1).flatten(1).to(config.dtype).contiguous()
        return self.backend.write(qkv, None, None, self.cache, slots)

    def add(self, length: int, parent: int | None = None, shared: int = 0) -> int:
        """Write a sequence whose first `shared` blocks are those of its parent."""
        config = self.config
        kept = shared * config.block_size
        first = self.sequences[parent] if parent is not None else None
        count = -(-length // config.block_size) - shared
        blocks = [self.free.pop() for _ in range(count)]
        new = length - kept
        q = torch.randn(new, config.num_heads, config.head_dim, generator=self.generator)
        kv = torch.randn(2, new, config.num_kv_heads, config.head_dim, generator=self.generator)
        if config.quantize_cache:
            rows = 2 * new * config.num_kv_heads
            steps = random_codes(rows, config.head_dim, config.head_dim, seed=length) / 64
            kv = steps.view_as(kv)
        k, v = kv
        sequence = History(blocks, q.to(config.dtype), k.to(config.dtype), v.to(config.dtype))
        position = torch.arange(new)
        slots = (
            torch.tensor([*blocks, 0])[position // config.block_size] * config.block_size
            + position % config.block_size
        )
        written = self._write(slots, sequence.k, sequence.v, sequence.q)
        assert torch.equal(written, sequence.q)
        if first is not None:
            sequence = History(
                first.blocks[:shared] + blocks,
                torch.cat([first.q[:kept], sequence.q]),
                torch.cat([first.k[:kept], sequence.k]),
                torch.cat([first.v[:kept], sequence.v]),
            )
        self.sequences.append(sequence)
        return len(self.sequences) - 1

    def add_rows(self, rows: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Write a sequence for each (start, length); return rows that the methods below take."""
        return [(self.add(start + length), start, length) for start, length in rows]

    def batch(self, rows: Sequence[tuple[int, int, int]]) -> AttentionBatch:
        """The rows (sequence, start, length); rows of one position come first."""
        ends = [start + length for _, start, length in rows]
        width = max(-(-end // self.config.block_size) for end in ends)
        tables = BlockTables.zeros(len(rows), width, torch.device("cpu"))
        for row, ((which, _, _), end) in enumerate(zip(rows, ends, strict=True)):
            count = -(-end // self.config.block_size)
            tables.append([(row, 0, self.sequences[which].blocks[:count])])
        return AttentionBatch.of(
            np.array([start for _, start, _ in rows], dtype=np.int64),
            np.array([length for _, _, length in rows], dtype=np.int64),
            np.arange(len(rows)),
            tables,
        )

    def queries(self, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        return torch.cat(
            [self.sequences[which].q[start : start + length] for which, start, length in rows]
        )

    def run(
        self, rows: Sequence[tuple[int, int, int]], window: int | None, cascade: bool | None = None
    ) -> Tensor:
        backend = self.backend if cascade is None else self.make_backend(cascade)
        plan = backend.plan(self.batch(rows))
        return backend.run(self.queries(rows), self.cache, plan, window)

    def num_tasks(self, rows: Sequence[tuple[int, int, int]], cascade: bool) -> int:
        batch = self.batch(rows)
        tables = batch.row_tables(self.config.block_size)
        return int(
            self.library.plan_attention(
                self.backend._plan,
                self.backend._reference,
                len(rows),
                batch.starts.ctypes.data,
                batch.lengths.ctypes.data,
                tables.data_ptr(),
                tables.shape[1],
                cascade,
            )
        )

    def check(
        self, rows: Sequence[tuple[int, int, int]], windows: Sequence[int | None] = (None,)
    ) -> None:
        backend = self.make_backend(self.cascade)
        plan = backend.plan(self.batch(rows))
        q = self.queries(rows)
        for window in windows:
            out = backend.run(q, self.cache, plan, window)
            first = 0
            for row in rows:
                part = out[first : first + row[2]]
                expected, bound = self.expected(row, window)
                assert_within(part, expected, bound, (row, window, self.config))
                first += row[2]

    def expected(self, row: tuple[int, int, int], window: int | None) -> tuple[Tensor, Tensor]:
        """A softmax in float64 `[length, num_heads, head_dim]`, and how far a kernel may be off."""
        which, start, length = row
        sequence, end = self.sequences[which], start + length
        group = self.config.num_heads // self.config.num_kv_heads
        q = sequence.q[start:end].double()
        k = sequence.k[:end].double().repeat_interleave(group, dim=1)
        v = sequence.v[:end].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.config.head_dim**-0.5
        query, key = torch.arange(start, end)[:, None], torch.arange(end)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v)
        mean = torch.einsum("hqk,khd->qhd", weights, v.abs())
        largest = torch.einsum("qhd,khd->hqk", q.abs(), k.abs()).amax() * self.config.head_dim**-0.5
        # An error of a score is a relative error of its weight, and of the sum of weights too.
        error = 2 * (sum_error(self.config.head_dim) * largest + sum_error(end) + 8 * UNIT) * mean
        if self.config.dtype == torch.bfloat16:
            error = error + UNITS[torch.bfloat16] * (mean + out.abs())
        return out, error * 1.01 + 1e-37


def config_of(kind: str, **changes: Any) -> AttentionConfig:
    dtype, quantize = KINDS[kind]
    return replace(BASE, dtype=dtype, quantize_cache=quantize, **changes)


@each_isa
@each_kind
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(isa: str, kind: str, head_dim: int) -> None:
    world = World(isa, config_of(kind, head_dim=head_dim), num_blocks=80)
    world.check(world.add_rows(MIXTURE), WINDOWS)


@each_isa
@each_kind
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_groups_of_heads(isa: str, kind: str, heads: tuple[int, int]) -> None:
    config = config_of(kind, num_heads=heads[0], num_kv_heads=heads[1], head_dim=32)
    world = World(isa, config, num_blocks=80)
    world.check(world.add_rows(MIXTURE), (None, 24))


@each_isa
@each_kind
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(isa: str, kind: str, block_size: int) -> None:
    config = config_of(kind, block_size=block_size, head_dim=40)
    world = World(isa, config, num_blocks=2600 // block_size + 14)
    world.check(world.add_rows([(1100, 1), *MIXTURE, (600, 20)]), (*WINDOWS, 700))


@each_isa
@each_kind
def test_the_widest_heads_over_several_chunks(isa: str, kind: str) -> None:
    config = config_of(kind, head_dim=512, num_kv_heads=1)
    world = World(isa, config, num_blocks=120)
    world.check(world.add_rows([(1100, 1), (600, 3)]), (None, 700))


@pytest.mark.slow
@each_isa
@each_kind
def test_the_whole_grid(isa: str, kind: str) -> None:
    for head_dim, heads, block_size in itertools.product(HEAD_DIMS, HEADS, BLOCK_SIZES):
        config = config_of(
            kind,
            head_dim=head_dim,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            block_size=block_size,
        )
        world = World(isa, config, num_blocks=1000 // block_size + 12)
        world.check(world.add_rows(MIXTURE), WINDOWS)


@each_isa
@each_kind
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_long_sequences_are_split_among_threads(isa: str, kind: str, num_threads: int) -> None:
    config = config_of(kind, num_kv_heads=1, head_dim=32)
    world = World(isa, config, num_blocks=460)
    with threads(world.library, num_threads):
        one = world.add_rows([(3000, 1)])
        world.check(one, (None, 700))
        assert world.num_tasks(one, cascade=False) >= min(num_threads, 2)
        world.check([*one, *world.add_rows([(900, 1), (700, 40), (0, 300)])], (None, 24, 700))


def prefix_tree(world: World) -> list[tuple[int, int, int]]:
    """Rows that share prefixes at several levels, in an order that is not theirs.

    A root of 20 blocks, two branches of 8 more, leaves on each; a row whose own prompt ends within
    the root, so that it may share less of it; suffixes that are prefilled; two prompts that arrive
    in one step; and a row that shares nothing.
    """
    size = world.config.block_size
    root = world.add(20 * size + 3)
    branches = [world.add(28 * size + i, root, 20) for i in (1, 2)]
    rows = []
    for branch in branches:
        for extra in (0, 1, 17, 40):
            leaf = world.add(28 * size + extra + 1, branch, 28)
            rows.append((leaf, 28 * size + extra, 1))
    rows.append((world.add(20 * size + 1, root, 20), 20 * size, 1))
    rows.append((root, 11 * size + 5, 1))
    rows.append((world.add(90), 89, 1))
    suffix = world.add(20 * size + 50, root, 20)
    rows.append((suffix, 20 * size, 50))
    long_suffix = world.add(28 * size + 130, branches[0], 28)
    rows.append((long_suffix, 28 * size, 130))
    rows.append((world.add(28 * size + 20, branches[1], 28), 28 * size + 4, 16))
    twins = world.add(5 * size)
    rows += [(twins, 0, 5 * size), (twins, 0, 5 * size)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    return sorted((rows[i] for i in order), key=lambda row: row[2] > 1)


@each_isa
@each_kind
@pytest.mark.parametrize(
    ("block_size", "num_threads"),
    [
        (5, 3),
        (16, 1),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((16, 2), (48, 1), (48, 3))),
    ],
)
def test_shared_prefixes(isa: str, kind: str, block_size: int, num_threads: int) -> None:
    config = config_of(kind, head_dim=32, block_size=block_size)
    world = World(isa, config, num_blocks=180)
    with threads(world.library, num_threads):
        rows = prefix_tree(world)
        assert world.num_tasks(rows, cascade=True) != world.num_tasks(rows, cascade=False)
        for cascade in (True, False):
            world.cascade = cascade
            world.check(rows, (None, 24, 260))


@each_isa
def test_a_shared_prefix_is_attended_to_once(isa: str) -> None:
    world = World(isa, config_of("float32", head_dim=32), num_blocks=100)
    with threads(world.library, 1):
        root = world.add(33 * 16)
        rows = [(world.add(33 * 16 + 1, root, 32), 33 * 16, 1) for _ in range(20)]
        # One task a tile of 48 tokens for the prefix, and one a row for what is left.
        assert world.num_tasks(rows, cascade=True) <= len(rows) + 1 + 33 * 16 // 256
        world.check(rows)


@each_isa
def test_prefixes_of_random_rows(isa: str) -> None:
    """Forests drawn at random: every row against the reference, cascade on and off."""
    for seed in range(6):
        config = config_of("float32", head_dim=16, block_size=(4, 16)[seed % 2], num_heads=2)
        world = World(isa, config, num_blocks=1200, seed=seed)
        draw = np.random.default_rng(seed)
        for _ in range(3):
            world.add(int(draw.integers(1, 40)) * config.block_size)
        for _ in range(20):
            parent = int(draw.integers(len(world.sequences)))
            full = len(world.sequences[parent].q) // config.block_size
            shared = int(draw.integers(full + 1))
            extra = int(draw.integers(1, 10 * config.block_size))
            world.add(shared * config.block_size + extra, parent, shared)
        rows = []
        for which, sequence in enumerate(world.sequences):
            end = int(draw.integers(1, len(sequence.q) + 1))
            length = 1 if draw.random() < 0.6 else int(draw.integers(1, end + 1))
            rows.append((which, end - length, length))
        rows.sort(key=lambda row: row[2] > 1)
        with threads(world.library, 1 + seed % 3):
            for cascade in (True, False):
                world.cascade = cascade
                world.check(rows, (None, 33))


@each_isa
@each_kind
@pytest.mark.parametrize("window", [None, 200])
def test_a_deterministic_row_is_the_same_alone_and_in_any_batch(
    isa: str, kind: str, window: int | None
) -> None:
    config = config_of(kind, head_dim=48, num_heads=6)
    world = World(isa, config, deterministic=True, num_blocks=900)
    root = world.add(20 * 16)
    rows = [(world.add(20 * 16 + i + 1, root, 20), 20 * 16 + i, 1) for i in range(24)]
    rows += world.add_rows([(i * 7, 1) for i in range(24)] + [(1500, 1), (1023, 1), (1024, 1)])
    rows += world.add_rows([(i * 5, 3 + i * 4) for i in range(12)] + [(900, 200)])
    assert len(rows) == 64
    together = world.run(rows, window)
    world.check(rows[::3], [window])
    first = 0
    for row in rows:
        assert torch.equal(world.run([row], window), together[first : first + row[2]]), row
        first += row[2]
    with threads(world.library, 3):
        assert torch.equal(world.run(rows, window), together)


@each_isa
@each_kind
@pytest.mark.parametrize("window", [None, 24, 200])
def test_a_deterministic_prefill_may_come_in_chunks(
    isa: str, kind: str, window: int | None
) -> None:
    config = config_of(kind, head_dim=48, num_heads=6)
    world = World(isa, config, deterministic=True, num_blocks=90)
    length = 1100 if is_fast(isa) else 530  # more than a chunk of positions
    which = world.add(length)
    whole = world.run([(which, 0, length)], window)
    for size in (512, 256, 100, 37):
        for start in range(0, length, size):
            count = min(size, length - start)
            chunk = world.run([(which, start, count)], window)
            assert torch.equal(chunk, whole[start : start + count]), (size, start)
    for position in (0, 5, 127, 128, 511, 512, length - 1):
        assert torch.equal(world.run([(which, position, 1)], window)[0], whole[position]), position


@each_isa
@each_kind
def test_a_step_of_no_rows(isa: str, kind: str) -> None:
    world = World(isa, config_of(kind), num_blocks=4)
    nothing = torch.zeros(0, dtype=torch.int64)
    for num_threads, cascade in itertools.product((1, 2), (True, False)):
        with threads(world.library, num_threads):
            backend = world.make_backend(cascade)
            qkv = torch.zeros(0, 8 * world.config.head_dim, dtype=world.config.dtype)
            q = backend.write(qkv, None, None, world.cache, nothing)
            none = nothing.numpy()
            tables = BlockTables.zeros(0, 0, torch.device("cpu"))
            empty = AttentionBatch.of(none, none, none, tables)
            assert backend.run(q, world.cache, backend.plan(empty), None).shape == (0, 4, 64)


@each_isa
@each_kind
def test_a_query_that_is_not_a_number_spoils_its_own_row_alone(isa: str, kind: str) -> None:
    world = World(isa, config_of(kind), num_blocks=80)
    rows = world.add_rows(MIXTURE)
    healthy = world.run(rows, None)
    q = world.queries(rows)
    q[2, 1, 3] = torch.nan
    out = world.backend.run(q, world.cache, world.backend.plan(world.batch(rows)), None)
    assert out[2, 1].isnan().all()
    healthy[2, 1] = out[2, 1] = 0
    assert torch.equal(out, healthy)


@each_isa
@each_kind
def test_large_scores(isa: str, kind: str) -> None:
    """Keys so long that the softmax is one position's, and scores that overflow its powers."""
    world = World(isa, config_of(kind), num_blocks=40)
    which = world.add(200)
    sequence = world.sequences[which]
    sequence.q *= 512
    world.check([(which, 199, 1), (which, 0, 150)])


def keys_and_values(world: World, slot: int) -> tuple[Tensor, Tensor]:
    """What the cache holds of a slot, float64 `[num_kv_heads, head_dim]`, read by its layout."""
    config = world.config
    positions, dim = -(-config.block_size // 16) * 16, -(-config.head_dim // 32) * 32
    stored = torch.int8 if config.quantize_cache else config.dtype
    pack = 4 // config.dtype.itemsize
    block, position = divmod(slot, config.block_size)
    found = []
    for cell in world.cache[block]:
        half = positions * dim * stored.itemsize
        halves = cell[: 2 * half].view(stored).view(2, positions * dim)
        keys = halves[0].view(positions // 16, dim // pack, 16, pack).transpose(1, 2)
        values = halves[1].view(dim // 16, positions // pack, 16, pack).transpose(1, 2)
        key = keys.reshape(positions, dim)[position].double()
        value = values.reshape(dim, positions)[:, position].double()
        if config.quantize_cache:
            scales = cell[2 * half :].view(torch.float32).view(2, positions)[:, position].double()
            key, value = key * scales[0], value * scales[1]
        assert not key[config.head_dim :].any(), "scores would take what lies there"
        found.append((key[: config.head_dim], value[: config.head_dim]))
    keys_, values_ = zip(*found, strict=True)
    return torch.stack(keys_), torch.stack(values_)


@each_isa
@each_kind
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("with_rotary", [False, True])
def test_heads_are_normed_rotated_and_written(
    isa: str, kind: str, with_norms: bool, with_rotary: bool
) -> None:
    for head_dim, block_size, num_tokens in ((2, 16, 3), (24, 5, 70), (64, 16, 3), (80, 48, 40)):
        config = config_of(kind, head_dim=head_dim, block_size=block_size)
        world = World(isa, config, num_blocks=-(-80 // block_size))
        generator = torch.Generator().manual_seed(1)
        heads = torch.randn(num_tokens, 8, head_dim, generator=generator).to(config.dtype)
        weights = 1 + 0.3 * torch.randn(2, head_dim, generator=generator)
        norms = HeadNorms(weights[0], weights[1], 1e-6) if with_norms else None
        angles = torch.rand(num_tokens, 1, head_dim // 2, generator=generator) * 6
        rotary = (angles.cos(), angles.sin()) if with_rotary else None
        blocks = torch.randperm(world.num_blocks, generator=generator)
        position = torch.arange(3, 3 + num_tokens)
        slots = blocks[position // block_size] * block_size + position % block_size
        q = world.backend.write(heads.flatten(1), norms, rotary, world.cache, slots)

        exact = heads.double()
        size = exact.abs()
        if norms is not None:
            scale = (exact.square().mean(-1, keepdim=True) + norms.eps).rsqrt()
            by_head = weights.double().repeat_interleave(torch.tensor([4, 2]), dim=0)
            exact = torch.cat([exact[:, :6] * scale[:, :6] * by_head, exact[:, 6:]], 1)
            size = exact.abs()
        if rotary is not None:
            a, b = exact[:, :6].chunk(2, -1)
            cos, sin = (part.double() for part in rotary)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            reach = torch.cat([a.abs() + b.abs()] * 2, -1)
            exact, size = torch.cat([turned, exact[:, 6:]], 1), torch.cat([reach, size[:, 6:]], 1)
        error = sum_error(head_dim) * size + 1e-37
        rounding = UNITS[config.dtype] * exact.abs() * 1.01
        assert_within(q, exact[:, :4], error[:, :4] + rounding[:, :4], head_dim)
        found = [keys_and_values(world, slot) for slot in slots.tolist()]
        if config.quantize_cache:
            # Half a step of the head's largest.
            rounding = (exact.abs() + error).amax(-1, keepdim=True).expand_as(exact) / 254 * 1.001
        for part, expected in ((0, slice(4, 6)), (1, slice(6, 8))):
            stored = torch.stack([pair[part] for pair in found])
            bound = error[:, expected] + rounding[:, expected]
            assert_within(stored, exact[:, expected], bound, (head_dim, part))


@each_isa
@each_kind
def test_threads_that_write_neighbours_lose_nothing(isa: str, kind: str) -> None:
    """Two positions share a lane of bf16 values, so that one thread must write both."""
    for block_size, num_tokens in ((16, 7), (5, 40), (16, 500)):
        config = config_of(kind, block_size=block_size, head_dim=32)
        world = World(isa, config, num_blocks=600 // block_size)
        heads = torch.randn(num_tokens, 8, 32, generator=world.generator).to(config.dtype)
        before, caches = world.cache.clone(), []
        for num_threads in (1, 2, 3):
            with threads(world.library, num_threads):
                for first in (0, 1, 2, 3) * (1 if num_threads == 1 else 8):
                    slots = torch.arange(first, first + num_tokens)
                    cache = before.clone()
                    world.backend.write(heads.flatten(1), None, None, cache, slots)
                    caches.append((first, cache))
        for first, cache in caches[4:]:
            assert torch.equal(cache, caches[first][1]), (block_size, num_tokens, first)


@each_isa
def test_values_that_are_not_finite_are_stored_as_zeros(isa: str) -> None:
    """Weights of zero must not make a NaN of what another sequence left."""
    for kind in KINDS:
        world = World(isa, config_of(kind), num_blocks=2)
        heads = torch.ones(1, 8, 64, dtype=world.config.dtype)
        heads[0, 7, 3:6] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        world.backend.write(heads.flatten(1), None, None, world.cache, torch.tensor([5]))
        _, values = keys_and_values(world, 5)
        assert values[1, 3:6].tolist() == [0, 0, 0]
        assert ((values[1, 6:] - 1).abs() < 1e-6).all()


@each_isa
@each_kind
def test_a_key_that_is_not_a_number_shows(isa: str, kind: str) -> None:
    """Wherever in the head it is: int8 forgot it if a number came after it in the same lane."""
    world = World(isa, config_of(kind), num_blocks=4)
    sequence = world.sequences[world.add(4)]
    for dim in (0, 5, 63):
        keys = sequence.k.clone()
        keys[1, :, dim] = torch.nan
        slots = sequence.blocks[0] * world.config.block_size + torch.arange(4)
        world._write(slots, keys, sequence.v)
        out = world.run([(0, 0, 4)], None)
        assert out[0].isfinite().all()
        assert out[1:].isnan().all(), dim


@each_isa
@each_kind
def test_a_key_that_is_not_a_number_shows_where_a_chunk_sees_no_other(isa: str, kind: str) -> None:
    """A window that begins with a chunk's last position: that chunk has no largest score."""
    world = World(isa, config_of(kind, head_dim=32), num_blocks=40)
    sequence = world.sequences[world.add(540)]
    keys = sequence.k.clone()
    keys[511] = torch.nan
    position = torch.arange(540)
    slots = torch.tensor(sequence.blocks)[position // 16] * 16 + position % 16
    world._write(slots, keys, sequence.v)
    for first, length in ((534, 1), (520, 20)):
        out = world.run([(0, first, length)], 24)
        for row in range(length):
            seen = first + row - 24 < 511
            assert (out[row].isnan() if seen else out[row].isfinite()).all(), (first, row)


@pytest.mark.parametrize("head_dim", [3, 514])
def test_heads_that_do_not_fit_are_refused(head_dim: int) -> None:
    with pytest.raises(InvalidRequestError, match="head_dim"):
        CpuAttention(Replays(load("portable")), replace(BASE, head_dim=head_dim), True, False)
