"""One engine in a process of its own: reads `{"workload": "W1", "round": 0}` lines, writes figures.

Run as `python -m peers.worker ENGINE SETTINGS`, the settings as JSON. Standard output is for the
figures alone; what the engine's library prints goes to standard error.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from peers.engine import Engine, Settings
from peers.workloads import WORKLOADS

REST = 3e-9
"""Seconds of rest after the start, for each byte of the KV cache. An engine may use them, as it
could in a server, for what it leaves to the background, such as taking the memory of the cache."""


def run(engine: Engine, name: str, round_number: int) -> dict[str, Any]:
    """Run a workload once and return its figures, times in seconds and memory in MB."""
    workload = WORKLOADS[name]
    requests = workload.requests(round_number)
    if workload.is_heavy:
        for prompt, _ in requests:
            engine.run([(prompt, 1)], 0.0, False)
    trace = engine.run(requests, workload.temperature, workload.needs_steps)
    decode = trace.decode_seconds(len(requests))
    figures = {
        "seconds": trace.seconds,
        "ttft_s": trace.steps[0][0] if workload.needs_steps else None,
        "decode_ms": None if decode is None else 1e3 * decode,
        "output_tokens": trace.num_tokens,
        "tokens_per_s": trace.num_tokens / trace.seconds,
    }
    expected = sum(output_len for _, output_len in requests)
    if trace.num_tokens != expected:
        raise RuntimeError(f"{trace.num_tokens} tokens came of {expected}")
    return figures | _memory()


def _memory() -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"rss_anon_mb": "RssAnon", "rss_mb": "VmRSS", "peak_rss_mb": "VmHWM"}
    return {ours: int(fields[theirs].split()[0]) / 1e3 for ours, theirs in names.items()}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    module, settings = sys.argv[1:]
    given = Settings(**json.loads(settings))
    engine = importlib.import_module(f"peers.{module}").Engine(given)
    time.sleep(REST * given.kv_bytes)
    reply(_memory())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(run(engine, request["workload"], request["round"]))
        except Exception as e:  # noqa: BLE001  # others go on
            traceback.print_exc()
            reply({"error": f"{type(e).__name__}: {e}"})


if __name__ == "__main__":
    main()
