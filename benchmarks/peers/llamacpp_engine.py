"""Drives llama.cpp by its C interface, with continuous batching as its server does it."""

import ctypes

import gguf
import llama_cpp as lc
import numpy as np

from peers.engine import Settings, Trace
from peers.workloads import Request, shared_prefix

BATCH_SIZE = 2048
MICRO_BATCH_SIZE = 512


class Engine:
    """A model, and a context of the right size for each workload; see `peers.engine.Engine`."""

    def __init__(self, settings: Settings) -> None:
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        self._model = lc.llama_model_load_from_file(settings.model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings.model}")
        self._vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        self._num_threads = settings.num_threads

    def run(self, requests: list[Request], temperature: float, needs_steps: bool) -> Trace:  # noqa: ARG002
        if temperature > 0:
            raise NotImplementedError("only greedy sampling is driven in llama.cpp")
        context = self._make_context(requests)
        batch = lc.llama_batch_init(BATCH_SIZE, 0, 1)
        try:
            return self._run(context, batch, requests)
        finally:
            lc.llama_batch_free(batch)
            lc.llama_free(context)

    def _make_context(self, requests: list[Request]) -> ctypes.c_void_p:
        """A cache of its own for each sequence: one for all makes each attend to all positions."""
        longest = max(len(prompt) + output_len for prompt, output_len in requests)
        params = lc.llama_context_default_params()
        params.n_seq_max = len(requests)
        params.n_ctx = -(-longest // 256) * 256 * len(requests)
        params.kv_unified = False
        params.n_batch, params.n_ubatch = BATCH_SIZE, MICRO_BATCH_SIZE
        params.n_threads = params.n_threads_batch = self._num_threads
        # Its default: its bf16 cache is slower, and turning flash attention off is no faster.
        params.type_k = params.type_v = gguf.GGMLQuantizationType.F16
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        return lc.llama_init_from_model(self._model, params)

    def _run(
        self, context: ctypes.c_void_p, batch: lc.llama_batch, requests: list[Request]
    ) -> Trace:
        trace = Trace()
        prefix_len = len(shared_prefix(requests))
        pending = [list(prompt) for prompt, _ in requests]
        positions = [0] * len(requests)
        num_left = [output_len for _, output_len in requests]
        if prefix_len:
            self._share_prefix(context, batch, pending[0][:prefix_len], len(requests))
            pending = [prompt[prefix_len:] for prompt in pending]
            positions = [prefix_len] * len(requests)
        while any(num_left):
            batch.n_tokens = 0
            last: list[tuple[int, int]] = []  # (sequence, row of the batch) that yield a token
            decoding_first = sorted(range(len(requests)), key=lambda seq: len(pending[seq]))
            for seq in decoding_first:
                if not num_left[seq]:
                    continue
                chunk = pending[seq][: BATCH_SIZE - batch.n_tokens]
                pending[seq] = pending[seq][len(chunk) :]
                is_last = bool(chunk) and not pending[seq]
                for i, token in enumerate(chunk):
                    wants_logits = is_last and i == len(chunk) - 1
                    _append(batch, token, positions[seq] + i, seq, wants_logits)
                positions[seq] += len(chunk)
                if is_last:
                    last.append((seq, batch.n_tokens - 1))
            self._decode(context, batch)
            for seq, row in last:
                logits = lc.llama_get_logits_ith(context, row)
                values = np.ctypeslib.as_array(logits, shape=(self._vocab_size,))
                pending[seq] = [int(values.argmax())]
                num_left[seq] -= 1
            trace.add(len(last))
        return trace

    def _share_prefix(
        self,
        context: ctypes.c_void_p,
        batch: lc.llama_batch,
        prefix: list[int],
        num_seqs: int,
    ) -> None:
        """Compute the prefix once and hand it to all sequences."""
        batch.n_tokens = 0
        for i, token in enumerate(prefix):
            _append(batch, token, i, 0, False)
        self._decode(context, batch)
        memory = lc.llama_get_memory(context)
        for seq in range(1, num_seqs):
            lc.llama_memory_seq_cp(memory, 0, seq, -1, -1)

    def _decode(self, context: ctypes.c_void_p, batch: lc.llama_batch) -> None:
        if status := lc.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")


def _append(batch: lc.llama_batch, token: int, position: int, seq: int, wants_logits: bool) -> None:
    row = batch.n_tokens
    batch.token[row] = token
    batch.pos[row] = position
    batch.n_seq_id[row] = 1
    batch.seq_id[row][0] = seq
    batch.logits[row] = wants_logits
    batch.n_tokens = row + 1
