"""Compile the Triton kernels for a GPU that need not be there, in a process of its own.

What launches a kernel is called as ever, but each launch ends once the compiler has made machine
code for compute capability 9.0 (Hopper). `python -m tests.compile_triton [all]` prints a JSON list
of the kernels and what they take of a multiprocessor; `all` is of more shapes and dtypes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    BlockTables,
    HeadNorms,
    PlanBuffers,
)
from nanovllm.kernels.audio import DepthwiseConv, snake_table
from nanovllm.kernels.kernels import Draws, Penalties, Routing, WeightSpec
from nanovllm.kernels.triton.attention import TritonAttention
from nanovllm.kernels.triton.kernels import TritonKernels

CPU = torch.device("cpu")
NUM_BLOCKS = 2048


class HopperDriver:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_launches() -> list[dict[str, Any]]:
    """From now on compile kernels in place of launching them; they are added to what returns."""
    driver.set_active(HopperDriver())
    launch, compiled = JITFunction.run, {}
    kernels: list[dict[str, Any]] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = launch(kernel, *args, grid=grid, warmup=True, **options)
        if binary.hash not in compiled:
            compiled[binary.hash] = binary
            metadata = binary.metadata
            kernels.append(
                {
                    "name": kernel.fn.__name__,
                    "shared": metadata.shared,
                    "num_warps": metadata.num_warps,
                    **resources(binary.asm["ptx"]),
                }
            )
        return binary

    JITFunction.run = compile_only
    return kernels


def resources(ptx: str) -> dict[str, int]:
    """Registers of a thread, and bytes of them that are spilled, as the assembler reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            get_ptxas(90).path,
            "-v",
            "-arch=sm_90a",
            file.name,
            "-o",
            os.devnull,
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = (
        re.search(r"Used (\d+) registers", report),
        re.search(r"(\d+) bytes spill stores", report),
    )
    return {
        "registers": int(registers[1]) if registers else 0,
        "spilled": int(spills[1]) if spills else 0,
    }


def launch_attention(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, **changes: Any
) -> None:
    """One layer of a step with decodes that share a prefix, and prompts; then a captured one."""
    config = AttentionConfig(16, num_heads, num_kv_heads, head_dim, dtype, **changes)
    backend = TritonAttention(config)
    cache = torch.zeros(backend.cache_spec(NUM_BLOCKS).shape, dtype=dtype)
    rotary = torch.zeros(1, 1, head_dim // 2), torch.zeros(1, 1, head_dim // 2)
    norms = HeadNorms(torch.ones(head_dim), torch.ones(head_dim), 1e-6)
    tables = BlockTables.zeros(65, 512, CPU)
    tables.append([(slot, 0, list(range(500))) for slot in range(64)])
    for num_decodes, prompts in ((1, []), (32, []), (0, [700, 40]), (0, [3]), (3, [70])):
        lengths = np.array([1] * num_decodes + prompts, dtype=np.int64)
        starts = np.full(len(lengths), 7000, dtype=np.int64)
        num_tokens = int(lengths.sum())
        qkv = torch.zeros(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        slots = torch.zeros(num_tokens, dtype=torch.int64)
        cos, sin = (table.expand(num_tokens, 1, -1).contiguous() for table in rotary)
        for head_norms, rotations in ((norms, (cos, sin)), (None, (cos, sin)), (None, None)):
            q = backend.write(qkv, head_norms, rotations, cache, slots)
        batch = AttentionBatch.of(starts, lengths, np.arange(len(lengths)), tables)
        for window in (None, 1024):
            backend.run(q, cache, backend.plan(batch), window)
        if not prompts:
            backend.run(q, cache, backend.plan(batch, PlanBuffers()), None)


def launch_layers(dtype: torch.dtype, hidden: int, intermediate: int, rows: int) -> None:
    """What a layer has besides attention."""
    for deterministic in (False, True):
        kernels = TritonKernels(CPU, dtype, deterministic)
        x, weight = torch.zeros(rows, hidden, dtype=dtype), torch.ones(hidden)
        kernels.rms_norm(x, weight, 1e-6)
        kernels.add_rms_norm(x, x.clone(), weight, 1e-6)
        for activation in get_args(Activation):
            kernels.act_and_mul(torch.zeros(rows, 2 * intermediate, dtype=dtype), activation)
        if deterministic:
            packed = kernels.pack(WeightSpec(hidden, hidden), [torch.zeros(hidden, hidden)], None)
            kernels.linear(x, packed)
            kernels.logits(x, packed)
        matrices = 16 * [torch.zeros(hidden, hidden)]
        gate_up = kernels.pack_experts(WeightSpec(2 * hidden, hidden, "silu"), 8, matrices)
        down = kernels.pack_experts(WeightSpec(hidden, hidden), 8, matrices[:8])
        kernels.mixture(x, torch.zeros(rows, 8), Routing(2, True), gate_up, down)
    for rank in (16, 96):
        adapters = kernels.lora_weights(WeightSpec(intermediate, hidden), rank, 4)
        batch = kernels.lora_batch(np.zeros(rows, dtype=np.int64))
        adapters.add(torch.zeros(rows, intermediate, dtype=dtype), x, batch)


def launch_local_attention(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Within patches and what stands before them, and at the ends of what there is a kernel for."""
    kernels = TritonKernels(CPU, dtype)
    for length in (1, 5, 11, 64):
        width = (num_heads + 2 * num_kv_heads) * head_dim
        qkv = torch.zeros(3 * length, width, dtype=dtype)
        table = torch.zeros(length, 1, head_dim // 2)
        for rotary in (None, (table, table)):
            kernels.local_attention(qkv, rotary, length, num_heads, num_kv_heads)


def launch_audio(channels: int, num_frames: int) -> None:
    """The layers of a codec."""
    kernels, slots = TritonKernels(CPU, torch.float32), torch.zeros(2, dtype=torch.int64)
    x, snake = torch.zeros(2, num_frames, channels), snake_table(torch.ones(channels))
    for dilation, around in ((1, None), (1, snake), (3, snake), (9, snake)):
        conv = DepthwiseConv(torch.zeros(7, channels), x[0, 0], dilation, around, around)
        kernels.depthwise_conv(x, conv, torch.zeros(3, conv.pad, channels), slots)
    for table, pad, width, stride in ((None, 6, 7, 1), (snake, 0, 1, 1), (snake, 6, 10, 5)):
        kernels.causal_windows(x, table, torch.zeros(3, pad, channels), slots, width, stride)


def launch_sampler(vocab_size: int, rows: int) -> None:
    """Sampling with each setting and with none, and penalties."""
    kernels = TritonKernels(CPU, torch.bfloat16)
    logits = torch.zeros(rows, vocab_size)
    numbers = torch.full((rows,), 0.9)
    top_k = torch.full((rows,), 50)
    for cut, floor in ((False, False), (True, False), (True, True), (False, True)):
        draws = Draws(
            temperature=numbers,
            uniforms=numbers,
            any_sampled=True,
            top_k=top_k if cut else None,
            top_p=numbers if cut else None,
            min_p=numbers if floor else None,
        )
        kernels.choose(logits, draws)
    kernels.choose(logits, Draws(numbers, numbers, False, None, None, None))
    history = torch.zeros(rows, 700, dtype=torch.int32)
    which = torch.arange(rows)
    penalties = Penalties(which, history, top_k, top_k, numbers, numbers, numbers)
    kernels.apply_penalties(logits, penalties)


def shapes(thorough: bool) -> Iterator[tuple[torch.dtype, int, int, int]]:
    """Dtype, heads, KV heads and head width."""
    yield torch.bfloat16, 16, 8, 128  # Qwen3 0.6B
    if not thorough:
        return
    yield torch.bfloat16, 32, 8, 128  # Qwen3 8B
    yield torch.bfloat16, 16, 2, 128  # MiniCPM4, of VoxCPM
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield dtype, 4, 4, 64
        yield dtype, 8, 1, 256
        yield dtype, 6, 2, 80


def main() -> None:
    thorough = sys.argv[1:] == ["all"]
    kernels = compile_launches()
    for dtype, *heads in shapes(thorough):
        launch_attention(dtype, *heads)
        launch_local_attention(dtype, *heads)
        if thorough:
            launch_attention(dtype, *heads, deterministic=True)
    for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
        for rows in (1, 64, 8192) if thorough else (64,):
            launch_layers(dtype, 1024, 3072, rows)
    for channels in (1, 96, 2048) if thorough else (96,):
        launch_audio(channels, 40)
    launch_sampler(151_936, 32)
    sys.stdout.write(json.dumps(kernels) + "\n")


if __name__ == "__main__":
    main()
