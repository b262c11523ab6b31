"""What the API process costs: CPU per streamed token, and how late its event loop is under load.

    python benchmarks/api_overhead.py --concurrency 256 --output-len 200

Starts `nanovllm serve` on the bundled model with one engine thread, and `nanovllm bench serve` in
a process of its own. The CPU is that of the API process between the first and the last request; the
lag of its event loop is the time that `GET /health` takes meanwhile, every 20 ms on a connection of
its own, less what it takes when nothing runs.
"""

import argparse
import http.client
import json
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from header import headline
from local_server import HOST, PORT, put_under_load, serving
from rich.console import Console
from rich.table import Table

PROBE_INTERVAL = 0.02


@dataclass(frozen=True)
class Figures:
    """Of one round. Times are milliseconds, but for the CPU's."""

    num_tokens: int
    num_errors: int
    tokens_per_s: float
    cpu_us_per_token: float
    lag_p50: float
    lag_p99: float
    lag_max: float


class Probe(threading.Thread):
    """Asks for /health again and again, and keeps how long that takes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection(HOST, PORT)
        while not self._stopped.wait(PROBE_INTERVAL):
            begun = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.seconds.append(time.perf_counter() - begun)
        connection.close()

    def stop(self) -> list[float]:
        self._stopped.set()
        self.join()
        return self.seconds


def run_round(process: psutil.Process, args: argparse.Namespace) -> Figures:
    """Put the server under load once."""
    idle = Probe()
    idle.start()
    time.sleep(1)
    baseline = statistics.median(idle.stop())
    probe = Probe()
    probe.start()
    before = process.cpu_times()
    measured = put_under_load(
        *("--concurrency", args.concurrency, "--num-requests", args.num_requests),
        *("--input-len", 16, "--output-len", args.output_len),
    )
    after = process.cpu_times()
    lags = sorted(1000 * max(s - baseline, 0) for s in probe.stop())
    cpu = after.user + after.system - before.user - before.system
    num_tokens = measured["num_output_tokens"]
    return Figures(
        num_tokens=num_tokens,
        num_errors=sum(measured["errors"].values()),
        tokens_per_s=num_tokens / measured["duration"],
        cpu_us_per_token=1e6 * cpu / num_tokens,
        lag_p50=lags[len(lags) // 2],
        lag_p99=lags[int(len(lags) * 0.99)],
        lag_max=lags[-1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--num-requests", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    with serving("--cpu-threads", "1") as process:
        rounds = [run_round(process, args) for _ in range(args.rounds)]
    console = Console()
    console.print(headline(f"{args.concurrency} streams", f"{args.rounds} rounds"))
    table = Table("", "median", "least", "most")
    for name in asdict(rounds[0]):
        values = [getattr(figures, name) for figures in rounds]
        cells = (statistics.median(values), min(values), max(values))
        table.add_row(name.replace("_", " "), *(f"{value:.1f}" for value in cells))
    console.print(table)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(figures) for figures in rounds], indent=2))


if __name__ == "__main__":
    main()
