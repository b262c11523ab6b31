"""Options of an engine for tests that look at its adapters."""

from typing import Any

SMALL: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "cpu_threads": 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "max_model_len": 128,
    "num_kv_blocks": 64,
    "enable_lora": True,
}
