"""Drives nanovllm, as this checkout has it."""

from nanovllm import LLM, SamplingParams
from peers.engine import Settings, Trace
from peers.workloads import Request


class Engine:
    """`nanovllm.LLM`; see `peers.engine.Engine`."""

    def __init__(self, settings: Settings) -> None:
        quantized = {} if settings.precision == "bf16" else {"quantization": settings.precision}
        self._llm = LLM(
            settings.model,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            kv_cache_memory_bytes=settings.kv_bytes,
            **quantized,
        )

    def run(self, requests: list[Request], temperature: float, needs_steps: bool) -> Trace:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(
                temperature=temperature, ignore_eos=True, max_tokens=output_len, detokenize=False
            )
            for _, output_len in requests
        ]
        trace = Trace()
        if not needs_steps:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            trace.add(sum(len(output.outputs[0].token_ids) for output in outputs))
            return trace
        for prompt, param in zip(prompts, params, strict=True):
            self._llm.add_request(prompt, param)
        num_seen: dict[str, int] = {}
        while self._llm.has_unfinished():
            before = sum(num_seen.values())
            for output in self._llm.step():
                num_seen[output.request_id] = len(output.outputs[0].token_ids)
            trace.add(sum(num_seen.values()) - before)
        return trace
