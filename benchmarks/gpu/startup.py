"""From the start of a process to its first token or sound."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gpu.speech import speech_options
from gpu.world import World

ROOT = Path(__file__).parents[2]
LIMIT = 90
FIRST = "kernels not compiled yet"
TEXT = """
import json, sys
from nanovllm import LLM, SamplingParams
if __name__ == "__main__":
    with LLM(**json.loads(sys.argv[1])) as llm:
        stream = llm.stream([1, 2, 3, 4], SamplingParams(temperature=0, max_tokens=2))
        next(stream)
        sys.stdout.write("first\\n")
        sys.stdout.flush()
        stream.close()
"""
SPEECH = """
import json, sys
from pathlib import Path
from nanovllm import EngineConfig, SamplingParams
from nanovllm.batch import SpeechRequest
from nanovllm.worker.loading import load_engine
if __name__ == "__main__":
    config = EngineConfig(**json.loads(sys.argv[1]))
    engine = load_engine(config, Path(config.model)).engine
    engine.add([5, 6, 7, 101], SamplingParams(max_tokens=1), payload=SpeechRequest())
    while not any(news.payload for news in engine.step()):
        pass
    sys.stdout.write("first\\n")
    sys.stdout.flush()
"""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def run(world: World) -> None:
    # Places of their own for what compilers make, empty at first.
    caches = {name: str(world.directory / name.lower()) for name in CACHES}
    text, speech = world.options("0.6b"), speech_options(world, max_num_seqs=8)
    eager, compiled = {"enforce_eager": True}, {"compile_model": True}
    cases: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        (f"0.6b start to first token, {FIRST}", TEXT, text, {}),
        ("0.6b start to first token", TEXT, text, {}),
        ("0.6b start to first token, without graphs", TEXT, text, eager),
        (f"speech start to first audio, {FIRST}", SPEECH, speech, {}),
        ("speech start to first audio", SPEECH, speech, {}),
        ("speech start to first audio, compile_model, first time", SPEECH, speech, compiled),
        ("speech start to first audio, compile_model", SPEECH, speech, compiled),
    ]
    for name, child, options, more in cases:
        title = f"{name}, s"
        reason = world.missing_option(**more)
        if not world.on_cuda and FIRST in name:
            reason = "no kernels are compiled in these places"
        if reason:
            world.record.skip(title, reason)
            continue
        with world.record.guard(title):
            world.record(title, seconds_to_first(child, options | more, caches))


def seconds_to_first(child: str, options: dict[str, Any], environment: dict[str, str]) -> float:
    """Start an engine in a process of its own.

    Args:
        child: Its program.
        options: Of the engine.
        environment: More variables.

    Raises:
        RuntimeError: It ended without a token, or took too long.
    """
    variables = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", child, json.dumps(options)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        # Whatever hangs is ended, and then there is no line to read.
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        with process:
            line = process.stdout.readline() if process.stdout else b""
            seconds = time.perf_counter() - start
        timer.cancel()
        if line.strip() != b"first":
            errors.seek(0)
            raise RuntimeError(f"no token: {errors.read().strip()[-300:]}")
    return seconds
