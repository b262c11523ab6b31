"""Drives vLLM's CPU build, its engine in this process."""

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from peers.engine import Settings, Trace
from peers.workloads import Request


class Engine:
    """`vllm.LLM`; see `peers.engine.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self._llm = LLM(
            settings.model,
            dtype="bfloat16",
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            kv_cache_memory_bytes=settings.kv_bytes,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )

    def run(self, requests: list[Request], temperature: float, needs_steps: bool) -> Trace:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(
                temperature=temperature,
                ignore_eos=True,
                max_tokens=output_len,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            for _, output_len in requests
        ]
        trace = Trace()
        if not needs_steps:  # vLLM itself asks for the final outputs alone here
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            trace.add(sum(len(output.outputs[0].token_ids) for output in outputs))
            return trace
        engine = self._llm.llm_engine
        for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(i), prompt, param)
        while engine.has_unfinished_requests():
            trace.add(sum(len(output.outputs[0].token_ids) for output in engine.step()))
        return trace
