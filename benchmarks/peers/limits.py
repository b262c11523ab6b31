"""What the machine could do at best, and so the time that no engine can go below."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from peers.checkpoint import Shape
from peers.engine import Precision
from peers.workloads import Workload, shared_prefix

BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int4": 18 / 32}
"""int4 with a scale of 16 bits for each 32 weights."""
BUFFER_MB = 1500
NUM_REPEATS = 8
MATMUL_SIZES = (1024, 2048, 4096)
MATMUL_SECONDS = 1.0
"""A product that takes longer is the last: larger ones would take minutes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of this machine.

    Args:
        read_rate: Bytes read from memory per second, by all cores together.
        matmul_rate: Floating point operations per second of torch's matrix product, in bf16 or in
            float32: processors without bf16 arithmetic are faster at that.
    """

    read_rate: float
    matmul_rate: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Least time of a workload, in seconds, of its prefill and of all its decode steps."""

    prefill: float
    decode: float
    num_steps: int

    def figure(self, workload: Workload) -> float:
        """The floor of what the workload is judged by."""
        if workload.figure == "decode_ms":
            return 1e3 * self.decode / self.num_steps
        return self.prefill if workload.figure == "ttft_s" else self.prefill + self.decode


def measure_limits(work_dir: Path, num_threads: int) -> Limits:
    """Measure both rates; takes some ten seconds."""
    source = Path(__file__).with_name("read_bandwidth.c")
    program = work_dir / "read_bandwidth"
    flags = ["-O3", "-march=native", "-pthread"]
    subprocess.run(["cc", *flags, str(source), "-o", str(program)], check=True)
    command = [str(program), str(num_threads), str(BUFFER_MB), str(NUM_REPEATS)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    matmul_rate = max(_matmul_rate(dtype) for dtype in ("bfloat16", "float32"))
    return Limits(1e9 * float(run.stdout), matmul_rate)


def _matmul_rate(dtype: str) -> float:
    import torch

    best = 0.0
    for size in MATMUL_SIZES:
        a, b = torch.randn(2, size, size, dtype=getattr(torch, dtype))
        for _ in range(NUM_REPEATS):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 / seconds)
            if seconds > MATMUL_SECONDS:
                return best
    return best


def floor(workload: Workload, shape: Shape, precision: Precision, limits: Limits) -> Floor:
    """Least time of a workload: prefill by arithmetic alone, decode by memory traffic alone.

    All requests run at once, and what prompts share is computed once and read once a step. The
    arithmetic is bf16 for all precisions; the output layer and the embedding of prompts are free.
    """
    requests = workload.requests(0)
    shared = len(shared_prefix(requests))
    attention_flops = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    flops = 2 * shape.num_layer_weights * shared + attention_flops * shared**2 / 2
    kv_positions = 0
    for prompt, output_len in requests:
        own = len(prompt) - shared
        flops += 2 * shape.num_layer_weights * own
        flops += attention_flops * (len(prompt) ** 2 - shared**2) / 2
        kv_positions += sum(own + step for step in range(1, output_len))
    num_steps = max(output_len for _, output_len in requests) - 1
    kv_positions += shared * num_steps
    weight_bytes = BYTES_PER_WEIGHT[precision] * (
        shape.num_layer_weights + shape.num_embedding_weights
    )
    traffic = num_steps * weight_bytes + kv_positions * shape.kv_bytes_per_token
    return Floor(flops / limits.matmul_rate, traffic / limits.read_rate, num_steps)
