"""The kernels one by one: what share of the machine's bandwidth or matrix rate each reaches."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu.roofline import Ceilings, measure_ceilings
from gpu.timer import Timer
from gpu.world import World
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    BlockTables,
    HeadNorms,
)
from nanovllm.kernels.kernels import Draws, Kernels

MAX_CACHE_BYTES = 40 << 30
VOCAB_SIZE = 151_936
EPS = 1e-6


class Case(NamedTuple):
    """A call that is timed, and the least it must do.

    Args:
        name: What it is.
        run: The call.
        num_bytes: Bytes it must move, if these bound it.
        flops: Operations it must do, if those do.
    """

    name: str
    run: Callable[[], Any]
    num_bytes: float = 0.0
    flops: float = 0.0


class Sizes(NamedTuple):
    """Shapes of the calls: those of the 0.6B model, or toys."""

    hidden: int = 1024
    width: int = 3072
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = VOCAB_SIZE
    num_rows: tuple[int, ...] = (1, 256, 8192)
    batches: tuple[int, ...] = (1, 32, 256)
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    prompts: tuple[tuple[int, int, int], ...] = ((1, 0, 8192), (4, 0, 2048), (1, 8192, 512))


TINY = Sizes(64, 96, 4, 2, 32, 512, (1, 4), (1, 3), (48,), ((2, 0, 24), (1, 16, 8)))


def run(world: World) -> None:
    timer = Timer(world.device, *((2, 1) if world.tiny else (30, 3)))
    ceilings = measure_ceilings(timer, world.device, world.tiny)
    world.record("copy, GB/s", ceilings.copy / 1e9)
    world.record("read, GB/s", ceilings.read / 1e9)
    world.record("matrix product, bf16, TFLOP/s", ceilings.flops / 1e12)
    sizes = TINY if world.tiny else Sizes()
    with torch.inference_mode():
        kernels = world.kernels()
        with kernels.running():
            for make in (_elementwise, _kv_write, _decode, _prefill, _sampling):
                with world.record.guard(make.__name__.strip("_")):
                    for case in make(world, kernels, sizes):
                        _time(world, case, timer, ceilings)
                world.free()


def _time(world: World, case: Case, timer: Timer, ceilings: Ceilings) -> None:
    with world.record.guard(case.name):
        seconds = timer.seconds(case.run)
        floor = case.num_bytes / ceilings.bandwidth + case.flops / ceilings.flops
        note = f"{case.flops / seconds / 1e12:.0f} TFLOP/s" if case.flops else ""
        world.record(f"{case.name}, us", 1e6 * seconds, share=floor / seconds, note=note)


def _random(world: World, *shape: int) -> Tensor:
    return torch.randn(shape, device=world.device, dtype=torch.bfloat16)


def _elementwise(world: World, kernels: Kernels, sizes: Sizes) -> Iterator[Case]:
    weight = _random(world, sizes.hidden).float()
    for rows in sizes.num_rows:
        x, residual = _random(world, rows, sizes.hidden), _random(world, rows, sizes.hidden)
        gate_up = _random(world, rows, 2 * sizes.width)
        yield Case(
            f"add_rms_norm, {rows} rows",
            lambda x=x, residual=residual: kernels.add_rms_norm(x, residual, weight, EPS),
            2 * 4 * x.numel(),
        )
        yield Case(
            f"act_and_mul, {rows} rows",
            lambda gate_up=gate_up: kernels.act_and_mul(gate_up, "silu"),
            2 * 3 * rows * sizes.width,
        )


class Cached(NamedTuple):
    """A layer's attention over sequences of equal length, whose blocks lie in disorder."""

    backend: Any
    cache: Tensor
    tables: BlockTables


def _cached(world: World, kernels: Kernels, sizes: Sizes, num_seqs: int, length: int) -> Cached:
    block_size = 16
    backend = kernels.attention(
        AttentionConfig(
            block_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, torch.bfloat16
        )
    )
    blocks_each = -(-length // block_size)
    spec = backend.cache_spec(num_seqs * blocks_each)
    cache = torch.zeros(spec.shape, dtype=spec.dtype, device=world.device)
    if cache.is_floating_point():
        cache.normal_()
    tables = BlockTables.zeros(num_seqs + 1, blocks_each, world.device)
    order = np.random.default_rng(0).permutation(num_seqs * blocks_each)
    rows = order.reshape(num_seqs, blocks_each).tolist()
    tables.append([(slot, 0, blocks) for slot, blocks in enumerate(rows)])
    return Cached(backend, cache, tables)


def _attend(world: World, sizes: Sizes, cached: Cached, start: int, length: int) -> Any:
    """A call that attends from so many positions of every sequence, planned before."""
    num_seqs = len(cached.tables.host) - 1
    starts, lengths = (np.full(num_seqs, value, dtype=np.int64) for value in (start, length))
    batch = AttentionBatch.of(starts, lengths, np.arange(num_seqs), cached.tables)
    plan = cached.backend.plan(batch)
    q = _random(world, num_seqs * length, sizes.num_heads, sizes.head_dim)
    return lambda: cached.backend.run(q, cached.cache, plan, None)


def _kv_write(world: World, kernels: Kernels, sizes: Sizes) -> Iterator[Case]:
    norms = HeadNorms(*_random(world, 2, sizes.head_dim).float(), EPS)
    heads = sizes.num_heads + 2 * sizes.num_kv_heads
    for rows in sizes.num_rows:
        cached = _cached(world, kernels, sizes, 1, rows)
        qkv = _random(world, rows, heads * sizes.head_dim)
        angles = torch.rand(rows, 1, sizes.head_dim // 2, device=world.device)
        slots = torch.randperm(rows, device=world.device)
        rotary = angles.cos(), angles.sin()
        yield Case(
            f"kv_write with norms and rotary, {rows} tokens",
            lambda qkv=qkv, rotary=rotary, c=cached, slots=slots: c.backend.write(
                qkv, norms, rotary, c.cache, slots
            ),
            2 * 2 * qkv.numel() + 2 * 4 * angles.numel() + 8 * rows,
        )


def _decode(world: World, kernels: Kernels, sizes: Sizes) -> Iterator[Case]:
    for context, batch in itertools.product(sizes.contexts, sizes.batches):
        kv_bytes = 2 * 2 * batch * context * sizes.num_kv_heads * sizes.head_dim
        name = f"decode attention, batch {batch}, context {context}"
        if kv_bytes > MAX_CACHE_BYTES:
            world.record.skip(name, f"a cache of {kv_bytes >> 30} GiB")
            continue
        cached = _cached(world, kernels, sizes, batch, context)
        queries = 2 * 2 * batch * sizes.num_heads * sizes.head_dim
        yield Case(name, _attend(world, sizes, cached, context - 1, 1), kv_bytes + queries)


def _prefill(world: World, kernels: Kernels, sizes: Sizes) -> Iterator[Case]:
    for num_seqs, prefix, length in sizes.prompts:
        cached = _cached(world, kernels, sizes, num_seqs, prefix + length)
        pairs = num_seqs * sum(range(prefix + 1, prefix + length + 1))
        yield Case(
            f"prefill attention, {num_seqs} x {length} behind {prefix}",
            _attend(world, sizes, cached, prefix, length),
            flops=4 * pairs * sizes.num_heads * sizes.head_dim,
        )


def _sampling(world: World, kernels: Kernels, sizes: Sizes) -> Iterator[Case]:
    for rows in sizes.batches:
        logits = 4 * torch.randn(rows, sizes.vocab_size, device=world.device)
        full = torch.ones(rows, device=world.device)
        uniforms = torch.rand(rows, device=world.device)
        top_k = torch.full((rows,), 50, dtype=torch.int64, device=world.device)
        kinds = {
            "greedy": Draws(0 * full, uniforms, False, None, None, None),
            "temperature": Draws(0.6 * full, uniforms, True, None, None, None),
            "top-k 50 and top-p 0.9": Draws(0.6 * full, uniforms, True, top_k, 0.9 * full, None),
        }
        for kind, draws in kinds.items():
            yield Case(
                f"sampling of {sizes.vocab_size}, {kind}, {rows} rows",
                lambda logits=logits, draws=draws: kernels.choose(logits, draws),
                logits.nbytes,
            )
