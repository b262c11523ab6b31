"""An engine's worker process, from the benchmark's side."""

import json
import os
import select
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from peers.engine import Precision, Settings
from peers.table import BENCHMARKS, Peer
from peers.workloads import Workload

TIMEOUT = 1800
"""Seconds to wait for a reply; vLLM compiles for minutes before it has loaded."""


class WorkerError(Exception):
    """An engine did not start, failed or did not answer; the message says where its log is."""


class WorkerProcess:
    """A process that has loaded an engine, and that is stopped whenever it has nothing to do.

    Args:
        name: As the tables call the engine.
        peer: What to run.
        settings: What to start it with.
        work_dir: Where the peers and their logs are.

    Raises:
        WorkerError: It did not start.
    """

    def __init__(self, name: str, peer: Peer, settings: Settings, work_dir: Path) -> None:
        self.name = name
        python = peer.python(work_dir)
        self._log = work_dir / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "peers.worker", f"{peer.name}_engine", json.dumps(asdict(settings))],
                cwd=BENCHMARKS,
                env=os.environ | peer.tune(python, settings.num_threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.load_figures = self._reply()

    def run(self, workload: str, round_number: int) -> dict[str, Any]:
        """Run a workload; returns its figures as `peers.worker.run` has them."""
        if self._process.poll() is not None or self._process.stdin is None:
            raise WorkerError(f"{self.name} has ended; its log is {self._log}")
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"workload": workload, "round": round_number}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End the process and whatever it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _reply(self) -> dict[str, Any]:
        """Wait for a line of the worker, then stop it so that no thread of its spins."""
        if self._process.stdout is None:
            raise WorkerError(f"{self.name} has no standard output")
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise WorkerError(f"{self.name} ended or hung; its log is {self._log}")
        self._signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}; its log is {self._log}")
        return reply

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def make_settings(
    model: Path, precision: Precision, workloads: list[Workload], num_threads: int
) -> Settings:
    """Settings that have room for each of the workloads."""
    return Settings(
        model=str(model),
        precision=precision,
        num_threads=num_threads,
        max_model_len=max(workload.max_model_len for workload in workloads),
        kv_bytes=int(1e9 * max(workload.kv_gb for workload in workloads)),
    )
