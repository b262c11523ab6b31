"""`python -m nanovllm.worker.rank FD`: a tensor-parallel rank, started by `RankProcesses`."""

import contextlib
import logging
import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, cast

from nanovllm.errors import NotEnoughMemoryError, RankDiedError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.runners.parallel import follow
from nanovllm.runners.text import TextRunner
from nanovllm.worker.loading import load_runner, rank_device
from nanovllm.worker.ranks import Failed, Ready, Task, link_of_rank, listen, portable

logger = logging.getLogger(__name__)


def main(descriptor: int) -> None:
    """Be a rank until the first one says so, or is gone."""
    # What all ranks have to say is said by the first one.
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    link = link_of_rank(descriptor)
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(link, calls), daemon=True).start()
    try:
        _run(calls.get(), link, calls)
    except Exception as e:
        if not isinstance(e, ValueError | OSError | NotEnoughMemoryError | RankDiedError):
            logger.exception("a tensor-parallel rank cannot go on")
        with contextlib.suppress(OSError):
            link.send(Failed(portable(e)))
    # At once: what is under way with other ranks may never end.
    os._exit(1)


def _run(task: Task, link: Connection, calls: "queue.SimpleQueue[Any]") -> None:
    config, size = task.config, task.config.tensor_parallel_size
    device = rank_device(config, task.rank)
    link.send(Ready())
    parallel = TensorParallel.connect(
        task.rank, size, task.meeting, device, ordered=config.deterministic
    )
    runner, _ = load_runner(config, task.directory, None, parallel)
    link.send(Ready())
    follow(cast(TextRunner, runner), calls.get)


if __name__ == "__main__":
    main(int(sys.argv[1]))
