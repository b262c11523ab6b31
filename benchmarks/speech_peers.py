"""How fast we speak beside the reference package, on the same work, in turns.

    python benchmarks/speech_peers.py --release 0.5b

Both get random weights of a published size, one text, and the same number of patches; ours also as
many streams at once as are asked for, which the reference has no way to run. The reference is
`voxcpm` of PyPI with `pip install --no-deps voxcpm==2.0.3 einops`; what it would compile it
compiles on CUDA alone. Each is a process of its own, stopped while the other one runs.
"""

import argparse
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from header import headline
from rich.console import Console
from rich.table import Table

from nanovllm.bench.speech_shapes import RELEASES, write_release

BENCHMARKS = Path(__file__).parent
TIMEOUT = 1800


class Speaker:
    """A process that has loaded an engine.

    Args:
        name: "ours" or "reference".
        settings: What to load.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"peers.speech_{name}", json.dumps(settings)],
            cwd=BENCHMARKS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reply()

    def speak(self, num_streams: int) -> dict[str, float]:
        """Speak; returns `seconds` in all and to the `first` sound, and the `audio`'s duration."""
        os.killpg(self._process.pid, signal.SIGCONT)
        if self._process.stdin is None:
            raise RuntimeError("no standard input")
        self._process.stdin.write(json.dumps({"num_streams": num_streams}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()  # it ends, and ends what it has started
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reply(self) -> dict[str, float]:
        if self._process.stdout is None:
            raise RuntimeError("no standard output")
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"{self.name} ended or hung")
        os.killpg(self._process.pid, signal.SIGSTOP)
        reply: dict[str, float] = json.loads(line)
        return reply


def run(settings: dict[str, Any], rounds: int, streams: list[int]) -> dict[str, list[Any]]:
    """Let them take turns; returns the figures of each round by who and how many streams."""
    figures: dict[str, list[Any]] = {}
    speakers = [Speaker(name, settings) for name in ("ours", "reference")]
    try:
        for number in range(rounds + 1):
            turn = number % 2
            for speaker in speakers[turn:] + speakers[:turn]:
                for num_streams in streams if speaker.name == "ours" else [1]:
                    result = speaker.speak(num_streams)
                    if number:  # the first round warms up
                        name = f"{speaker.name}, {num_streams} at once"
                        figures.setdefault(name, []).append(result)
    finally:
        for speaker in speakers:
            speaker.close()
    return figures


def report(figures: dict[str, list[Any]], console: Console) -> None:
    table = Table("", "RTF median", "least", "most", "first sound [s]", "sound s/s", "of reference")
    for column in table.columns[1:]:
        column.justify = "right"
    rates = {}
    for name, results in figures.items():
        factors = [r["seconds"] / r["audio"] for r in results]
        rates[name] = [1 / factor for factor in factors]
    reference = rates["reference, 1 at once"]
    for name, results in figures.items():
        factors = sorted(1 / rate for rate in rates[name])
        ratio = statistics.median(a / b for a, b in zip(rates[name], reference, strict=True))
        table.add_row(
            name,
            f"{statistics.median(factors):.3f}",
            f"{factors[0]:.3f}",
            f"{factors[-1]:.3f}",
            f"{statistics.median(r['first'] for r in results):.3f}",
            f"{statistics.median(rates[name]):.2f}",
            f"{ratio:.2f}x",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", choices=RELEASES, default="0.5b")
    parser.add_argument("--quantization", help="of ours, such as int8")
    parser.add_argument("--audio-seconds", type=float, default=4.0)
    parser.add_argument("--inference-timesteps", type=int, default=10)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = RELEASES[args.release]
        vae = config["audio_vae_config"]
        rate = vae.get("out_sample_rate", vae["sample_rate"])
        samples = config["patch_size"] * math.prod(vae["decoder_rates"])
        settings = {
            "model": str(write_release(Path(directory), args.release)),
            "quantization": args.quantization,
            "num_patches": math.ceil(args.audio_seconds * rate / samples),
            "inference_timesteps": args.inference_timesteps,
            "num_threads": len(os.sched_getaffinity(0)),
        }
        figures = run(settings, args.rounds, args.streams)
    console = Console()
    console.print(headline(f"VoxCPM {args.release}", f"{args.rounds} rounds", str(settings)))
    report(figures, console)
    if args.json:
        args.json.write_text(json.dumps({"settings": settings, "runs": figures}, indent=2))


if __name__ == "__main__":
    main()
