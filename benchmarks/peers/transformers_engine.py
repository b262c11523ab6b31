"""Drives transformers: `generate` for a single request, its continuous batching for many."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from peers.engine import Settings, Trace
from peers.workloads import Request

PAGE_SIZE = 32
MAX_BATCH_TOKENS = 1024


class Engine:
    """A model with SDPA attention; see `peers.engine.Engine`."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.num_threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._kv_bytes = settings.kv_bytes

    def run(self, requests: list[Request], temperature: float, needs_steps: bool) -> Trace:  # noqa: ARG002
        if temperature > 0:
            raise NotImplementedError("only greedy sampling is driven in transformers")
        if len(requests) == 1:
            return self._generate(*requests[0])
        return self._generate_batched(requests)

    def _generate(self, prompt: list[int], output_len: int) -> Trace:
        ids = torch.tensor([prompt])
        self._model.set_attn_implementation("sdpa")
        trace = Trace()
        config = GenerationConfig(max_new_tokens=output_len, do_sample=False, eos_token_id=None)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Ticker(trace),
        )
        return trace

    def _generate_batched(self, requests: list[Request]) -> Trace:
        config = GenerationConfig(do_sample=False, eos_token_id=-1)
        model = self._model.config
        page_bytes = 4 * PAGE_SIZE * model.num_hidden_layers * model.num_key_value_heads
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=self._kv_bytes // (page_bytes * model.head_dim),
            max_batch_tokens=MAX_BATCH_TOKENS,
        )
        with self._model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, persistent_manager=True
        ) as manager:
            trace = Trace()
            for prompt, output_len in requests:
                manager.add_request(prompt, max_new_tokens=output_len, eos_token_id=-1)
            results = (manager.get_result(timeout=600) for _ in requests)
            counts = [len(result.generated_tokens) for result in results if result is not None]
            trace.add(sum(counts))
        return trace


class _Ticker(BaseStreamer):
    """Adds each generated token to a trace; the first thing it is given is the prompt."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._trace.add(value.numel())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to report."""
