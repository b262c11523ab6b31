"""Tensor-parallel ranks as threads of this process: they start at once, and talk through gloo."""

import pickle
import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import RankDiedError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.runners.parallel import Call, follow
from nanovllm.runners.text import TextRunner
from nanovllm.worker.loading import load_runner

CPU = torch.device("cpu")
ResultT = TypeVar("ResultT")


def on_ranks(size: int, work: Callable[[TensorParallel], ResultT]) -> list[ResultT]:
    """What each of some ranks makes of its end."""
    results: dict[int, ResultT] = {}
    with tempfile.TemporaryDirectory() as directory:

        def run(rank: int) -> None:
            results[rank] = work(TensorParallel.connect(rank, size, Path(directory, "m"), CPU))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [results[rank] for rank in range(size)]


class RankThreads:
    """In place of `RankProcesses`. What is sent is pickled all the same."""

    def __init__(self, config: EngineConfig, directory: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self.meeting = Path(self._scratch.name, "meeting")
        self.abort: Callable[[], None] = lambda: None
        self.error: Exception | None = None
        self._calls: list[queue.SimpleQueue[bytes]] = []
        for rank in range(1, config.tensor_parallel_size):
            calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
            self._calls.append(calls)
            args = pickle.dumps((config, directory)), rank, calls
            threading.Thread(target=self._run, args=args, daemon=True).start()

    def _run(self, task: bytes, rank: int, calls: "queue.SimpleQueue[bytes]") -> None:
        config, directory = pickle.loads(task)
        size = config.tensor_parallel_size
        try:
            parallel = TensorParallel.connect(rank, size, self.meeting, CPU)
            runner, _ = load_runner(config, directory, None, parallel)
            follow(cast(TextRunner, runner), lambda: pickle.loads(calls.get()))
        except EOFError:  # the end
            pass
        except Exception as e:  # noqa: BLE001  # told to the first rank
            self.error = e.with_traceback(None)

    def wait_until_ready(self) -> None: ...

    def meet(self, connect: Callable[[], ResultT]) -> ResultT:
        return connect()

    def loaded(self) -> None: ...

    def failure(self, timeout: float = 0.0) -> Exception | None:
        return self.error

    def check(self) -> None:
        if self.error is not None:
            raise RankDiedError(f"{type(self.error).__name__}: {self.error}")

    def send(self, call: Call) -> None:
        self.check()
        for calls in self._calls:
            calls.put(pickle.dumps(call))

    def lost(self) -> RankDiedError:
        return RankDiedError(str(self.error))

    def fail(self, error: Exception) -> Exception:
        self.error = self.error or error
        return self.error

    def close(self) -> None:
        for calls in self._calls:
            calls.put(b"")
        self._scratch.cleanup()
