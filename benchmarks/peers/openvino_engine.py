"""Drives OpenVINO GenAI's continuous batching."""

import numpy as np
import openvino as ov
import openvino_genai as genai

from peers.engine import Settings, Trace
from peers.workloads import Request, shared_prefix

MAX_NUM_BATCHED_TOKENS = 2048
"""Its default of 256 makes long prompts slower."""


class Engine:
    """`ContinuousBatchingPipeline`; see `peers.engine.Engine`."""

    def __init__(self, settings: Settings) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(settings.kv_bytes / 2**30))
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
        scheduler.enable_prefix_caching = True
        # Where the processor has no bf16 it computes in float32, and takes no other cache.
        has_bf16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        floats = "bf16" if has_bf16 else "f32"
        properties = {
            "INFERENCE_PRECISION_HINT": floats,
            "KV_CACHE_PRECISION": floats if settings.precision == "bf16" else "u8",
            "INFERENCE_NUM_THREADS": settings.num_threads,
        }
        self._pipeline = genai.ContinuousBatchingPipeline(
            settings.model, scheduler, "CPU", properties
        )
        self._num_requests = 0

    def run(self, requests: list[Request], temperature: float, needs_steps: bool) -> Trace:
        trace = Trace()
        handles = []
        for prompt, output_len in requests:
            config = genai.GenerationConfig(
                max_new_tokens=output_len,
                ignore_eos=True,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
            )
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._num_requests, ids, config))
            self._num_requests += 1
            if len(handles) == 1 and shared_prefix(requests):
                # It finds a prefix only once that is computed: so one request goes ahead.
                self._pipeline.step()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            if needs_steps:
                trace.add(sum(_num_new(handle) for handle in handles))
        if not needs_steps:
            trace.add(sum(_num_new(handle) for handle in handles))
        return trace


def _num_new(handle: genai.py_openvino_genai.GenerationHandle) -> int:
    """Tokens of a request since this was last asked."""
    count = 0
    while handle.can_read():
        count += sum(len(output.generated_ids) for output in handle.read().values())
    return count
