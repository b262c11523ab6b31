"""Where the time of a step of speech goes, part by part.

python benchmarks/speech_breakdown.py --release 0.5b --num-seqs 1 8
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step_breakdown import Stopwatch

from nanovllm.batch import Key, SpeechRequest
from nanovllm.bench.machine import inspect_machine
from nanovllm.bench.speech_shapes import RELEASES, write_release
from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.loading import LoadedEngine, load_engine

PARTS = (
    ("LocEnc", "model.feat_encoder", "forward"),
    ("base LM", "model.base_lm", "forward"),
    ("FSQ", "model.fsq_layer", "forward"),
    ("residual LM", "model.residual_lm", "forward"),
    ("LocDiT", "model.feat_decoder.estimator", "forward"),
    ("rest of the sampler", "model", "sample"),
    ("stop head", "model", "stop_logits"),
    ("AudioVAE", "model.vae", "decode"),
    ("noise", "", "_noise"),
    ("collect", "", "collect"),
)
NESTED = {"rest of the sampler": ("LocDiT",)}
"""Parts that hold others, whose time is theirs alone."""


def measure(loaded: LoadedEngine, num_seqs: int, num_patches: int) -> dict[str, Any]:
    """Milliseconds a step by part, prefill left out."""
    engine, runner = loaded.engine, loaded.runner
    watch = Stopwatch()
    for part, path, method in PARTS:
        owner: Any = runner
        for name in filter(None, path.split(".")):
            owner = getattr(owner, name)
        watch.wrap(owner, method, part)
    prompt: list[Key] = [*range(300, 340), 101]
    for seed in range(num_seqs):
        params = SamplingParams(max_tokens=num_patches, seed=seed)
        engine.add(prompt, params, payload=SpeechRequest(min_len=num_patches))
    for _ in range(3):
        engine.step()
    watch.seconds.clear()
    steps, start = engine.stats().num_steps, time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    wall, steps = time.perf_counter() - start, engine.stats().num_steps - steps
    seconds = dict(watch.seconds)
    for outer, inner in NESTED.items():
        seconds[outer] -= sum(seconds[part] for part in inner)
    seconds["everything else"] = wall - sum(seconds.values())
    return {
        "num_seqs": num_seqs,
        "ms_per_step": {part: 1e3 * value / steps for part, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", choices=RELEASES, default="0.5b")
    parser.add_argument("--quantization")
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-patches", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_release(Path(directory), args.release)
        config = EngineConfig(
            model=str(model),
            dummy_weights=True,
            quantization=args.quantization,
            max_num_seqs=max(args.num_seqs),
            max_model_len=1024,
        )
        for num_seqs in args.num_seqs:
            results.append(measure(load_engine(config, model), num_seqs, args.num_patches))
    machine = asdict(inspect_machine())
    if args.json:
        sys.stdout.write(json.dumps({"results": results, "machine": machine}, indent=2) + "\n")
        return
    sys.stdout.write(f"{machine['cpu_model']}, {machine['num_cores']} cores; VoxCPM ")
    sys.stdout.write(f"{args.release}, {args.quantization or 'bfloat16'}; ms a step\n")
    totals = [sum(result["ms_per_step"].values()) for result in results]
    heads = "".join(f"{result['num_seqs']:>6} rows" for result in results)
    sys.stdout.write(f"{'':22}{heads}\n")
    for part in results[0]["ms_per_step"]:
        cells = "".join(f"{result['ms_per_step'][part]:11.2f}" for result in results)
        sys.stdout.write(f"{part:22}{cells}\n")
    sys.stdout.write(f"{'step':22}{''.join(f'{total:11.2f}' for total in totals)}\n")


if __name__ == "__main__":
    main()
