"""Runs the same workloads on nanovllm and on other engines, in turns, on this machine's CPU.

python benchmarks/cpu_peers.py --engines nanovllm,vllm,openvino,llamacpp --json result.json

An engine is a peer and the precision of its weights: `vllm`, `llamacpp-int4`. On the first run each
peer is installed into a virtual environment of its own under `--work-dir` (with `uv`; llama.cpp is
compiled with clang), and a random checkpoint of the shape is written there. Every engine runs in
a process that loads once, rests for some seconds, and is stopped while others run. They take turns
within each round, so that drift of the machine hits all alike; each round has token ids of its own,
so that no prefix cache knows them. `peers/table.py` has how each peer is tuned.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers.checkpoint import SHAPES, Shape, make_checkpoint
from peers.engine import Precision
from peers.limits import Limits, floor, measure_limits
from peers.process import WorkerError, WorkerProcess, make_settings
from peers.table import Peer, find_engine
from peers.workloads import WORKLOADS, Workload
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from nanovllm.bench.machine import inspect_machine
from nanovllm.config import DEMO_MODEL

WARM_UP_ROUND = -1
QUIET_LOAD = 0.3
WIDTH = 100
UNITS = {"decode_ms": "ms/step", "ttft_s": "s", "seconds": "s", "tokens_per_s": "tok/s"}
DEFAULT_ENGINES = {
    "0.6b": "nanovllm,vllm,openvino,llamacpp",
    "4b": "nanovllm-int4,llamacpp-int4",
    "moe": "nanovllm-int4,llamacpp-int4",
}

logger = logging.getLogger("cpu_peers")


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine that takes part: its name, what it is, and the precision of its weights."""

    name: str
    peer: Peer
    precision: Precision


Results = dict[str, dict[str, list[dict[str, Any]]]]
"""Figures of each round, by workload and by engine."""


class Benchmark:
    """Runs rounds and keeps their figures.

    Args:
        entries: The engines.
        names: The workloads.
        rounds: How often each is run.
        shape: Of the random checkpoint.
        num_threads: Threads each engine computes with.
        work_dir: Where peers and checkpoints are kept.
    """

    def __init__(
        self,
        entries: list[Entry],
        names: list[str],
        rounds: int,
        shape: str,
        num_threads: int,
        work_dir: Path,
    ) -> None:
        self._entries = entries
        self._rounds = rounds
        self._work_dir = work_dir
        self._checkpoint = work_dir / "checkpoints" / shape
        self._num_threads = num_threads
        self._names = names
        self.results: Results = {name: {} for name in names}
        self.errors: dict[str, str] = {}

    def prepare(self, shape: Shape) -> None:
        """Install what is missing and write the checkpoint in the form each engine reads."""
        make_checkpoint(self._checkpoint, shape)
        for entry in self._entries:
            entry.peer.install(self._work_dir)
            python = entry.peer.python(self._work_dir)
            entry.peer.prepare(python, self._checkpoint, entry.precision)

    def run(self) -> None:
        """Run every stage: the engines that are compared, together on the same model."""
        for precision in dict.fromkeys(entry.precision for entry in self._entries):
            entries = [entry for entry in self._entries if entry.precision == precision]
            for model in ("shape", "demo"):
                light = [n for n in self._names if WORKLOADS[n].model == model]
                heavy = [n for n in light if WORKLOADS[n].is_heavy]
                self._run_together(entries, [n for n in light if n not in heavy])
                for name in heavy:
                    for entry in entries:
                        self._run_together([entry], [name])

    def _run_together(self, entries: list[Entry], names: list[str]) -> None:
        """Start these engines, warm each up, and let them take turns."""
        workers: list[tuple[WorkerProcess, list[str]]] = []
        try:
            for entry in entries:
                runnable = [name for name in names if name in entry.peer.workloads]
                if runnable and (worker := self._start(entry, runnable)):
                    workers.append((worker, runnable))
            for worker, runnable in workers:
                for name in runnable:
                    if not WORKLOADS[name].is_heavy:
                        self._measure(worker, name, WARM_UP_ROUND)
            for number in range(self._rounds):
                for name in names:
                    # Whoever goes first is another one each round.
                    turn = number % len(workers) if workers else 0
                    for worker, runnable in workers[turn:] + workers[:turn]:
                        if name in runnable and not (WORKLOADS[name].is_heavy and number):
                            self._measure(worker, name, number)
        finally:
            for worker, _ in workers:
                worker.close()

    def _start(self, entry: Entry, names: list[str]) -> WorkerProcess | None:
        workloads = [WORKLOADS[name] for name in names]
        python = entry.peer.python(self._work_dir)
        model = DEMO_MODEL
        if workloads[0].model == "shape":
            model = entry.peer.prepare(python, self._checkpoint, entry.precision)
        settings = make_settings(model, entry.precision, workloads, self._num_threads)
        start = time.perf_counter()
        try:
            worker = WorkerProcess(entry.name, entry.peer, settings, self._work_dir)
        except WorkerError as e:
            self._fail(entry.name, e)
            return None
        logger.info("%s loaded in %.0f s", entry.name, time.perf_counter() - start)
        return worker

    def _measure(self, worker: WorkerProcess, name: str, number: int) -> None:
        if f"{worker.name} {name}" in self.errors:
            return
        try:
            figures = worker.run(name, number)
        except WorkerError as e:
            self._fail(f"{worker.name} {name}", e)
            return
        figure = figures[WORKLOADS[name].figure]
        logger.info("round %d, %s, %s: %.4g", number, name, worker.name, figure)
        if number != WARM_UP_ROUND:
            self.results[name].setdefault(worker.name, []).append(figures)

    def _fail(self, what: str, error: WorkerError) -> None:
        logger.error("%s", error)
        self.errors[what] = str(error)


def report(
    results: Results, entries: list[Entry], shape: Shape, limits: Limits, console: Console
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Print a table a workload, with the figure the workload is judged by.

    Returns:
        By workload and engine, the median, least and greatest figure, what share of the machine's
        limit that is, and for nanovllm how many times as fast it is as the best peer.
    """
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, of_engine in results.items():
        workload = WORKLOADS[name]
        unit = UNITS[workload.figure]
        table = Table(title=f"{name}: {workload.title}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("engine", no_wrap=True)
        for header in (unit, "min - max", "floor", "of limit", "x best peer", "MB"):
            table.add_column(header, justify="right", no_wrap=True)
        medians = {
            engine: statistics.median(run[workload.figure] for run in runs)
            for engine, runs in of_engine.items()
        }
        rows = summary[name] = {}
        for entry in entries:
            if entry.name not in medians:
                continue
            runs = of_engine[entry.name]
            figures = [run[workload.figure] for run in runs]
            median = medians[entry.name]
            least_time = (
                floor(workload, shape, entry.precision, limits).figure(workload)
                if workload.model == "shape"
                else None
            )
            ratio = _ratio_to_best_peer(entry, entries, medians, workload)
            rows[entry.name] = {
                "median": median,
                "min": min(figures),
                "max": max(figures),
                "floor": least_time,
                "ratio_to_best_peer": ratio,
            }
            table.add_row(
                entry.name,
                f"{median:.4g}",
                f"{min(figures):.4g} - {max(figures):.4g}",
                f"{least_time:.4g}" if least_time else "",
                f"{least_time / median:.0%}" if least_time else "",
                f"{ratio:.2f}" if ratio else "",
                f"{max(run['rss_anon_mb'] for run in runs):.0f}",
            )
        console.print(table)
    return summary


def _ratio_to_best_peer(
    entry: Entry, entries: list[Entry], medians: dict[str, float], workload: Workload
) -> float | None:
    """How many times as fast nanovllm is as the best other engine of its precision."""
    peers = [
        medians[other.name]
        for other in entries
        if other.name in medians and other.peer.packages and other.precision == entry.precision
    ]
    if entry.peer.packages or not peers:
        return None
    if workload.is_higher_better:
        return medians[entry.name] / max(peers)
    return min(peers) / medians[entry.name]


def _print_machine(machine: dict[str, Any], limits: Limits, console: Console) -> None:
    console.print(
        f"{machine['cpu_model']}, {machine['num_cores']} cores, "
        f"{', '.join(machine['instruction_sets'])}, {machine['memory_total'] / 2**30:.0f} GiB"
    )
    console.print(", ".join(f"{name} {value}" for name, value in machine["versions"].items()))
    console.print(
        f"memory read {limits.read_rate / 1e9:.1f} GB/s, "
        f"torch matrix product {limits.matmul_rate / 1e12:.2f} TFLOP/s"
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--engines", help="such as nanovllm-int4,llamacpp-int4")
    parser.add_argument("--workloads", default="W1,W2,W3,W4", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-dir", type=Path, default=Path("~/.cache/nanovllm/peers"))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    args.engines = (args.engines or DEFAULT_ENGINES[args.shape]).split(",")
    args.workloads = args.workloads.split(",")
    args.work_dir = args.work_dir.expanduser().absolute()
    if unknown := set(args.workloads) - WORKLOADS.keys():
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    return args


def main() -> None:
    args = _parse_arguments()
    # A stopped worker does not see that its parent has gone: so leave no way but through `finally`.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    console = Console(width=WIDTH)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))])
    logger.setLevel(logging.INFO)
    entries = [Entry(name, *find_engine(name)) for name in args.engines]
    shape = SHAPES[args.shape]
    args.work_dir.mkdir(parents=True, exist_ok=True)
    machine = asdict(inspect_machine())
    num_threads = machine["num_cores"]
    benchmark = Benchmark(
        entries, args.workloads, args.rounds, args.shape, num_threads, args.work_dir
    )
    benchmark.prepare(shape)
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        logger.warning("the machine is not quiet: its load is %.2f", load)
    before = measure_limits(args.work_dir, num_threads)
    benchmark.run()
    after = measure_limits(args.work_dir, num_threads)
    limits = Limits(
        max(before.read_rate, after.read_rate), max(before.matmul_rate, after.matmul_rate)
    )
    _print_machine(machine, limits, console)
    summary = report(benchmark.results, entries, shape, limits, console)
    for error in benchmark.errors.values():
        console.print(f"failed: {error}")
    if args.json:
        result = {
            "settings": {"shape": args.shape, "rounds": args.rounds, "num_threads": num_threads},
            "packages": {entry.peer.name: entry.peer.packages for entry in entries},
            "machine": machine,
            "load_before": load,
            "limits": {"before": asdict(before), "after": asdict(after)},
            "summary": summary,
            "runs": benchmark.results,
            "errors": benchmark.errors,
        }
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
