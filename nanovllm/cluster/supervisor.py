"""Watches an engine process, and starts another in its place when it dies."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from nanovllm.cluster.worker import Worker
from nanovllm.errors import EngineDeadError, UnavailableError
from nanovllm.worker.client import WorkerClient

logger = logging.getLogger(__name__)

FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
"""Seconds before an engine is started anew; doubled each time it does not come up."""
STABLE_AFTER = 60.0
"""Seconds after which an engine's death no longer counts as the same trouble as the last one."""


class Supervision(NamedTuple):
    """What a pool wants of those who watch its workers.

    Args:
        make_client: Makes the link to a new process for the worker of an index.
        step_timeout: Seconds that a step may take.
        start_timeout: Seconds that a process may take to start.
        on_died: Told of a worker, the sequences that it had, and what to say to who waits for them.
        on_restarted: Told of a worker that runs again.
    """

    make_client: Callable[[int], WorkerClient]
    step_timeout: float
    start_timeout: float
    on_died: Callable[[Worker, list[int], UnavailableError], None]
    on_restarted: Callable[[Worker], None]


async def supervise(worker: Worker, supervision: Supervision) -> None:
    """Watch a worker for ever; when its process dies, end its requests and start another."""
    backoff = FIRST_BACKOFF
    while True:
        started = time.monotonic()
        ending = await worker.client.run(supervision.step_timeout)
        worker.state = "dead"
        error = EngineDeadError("the engine died while it worked on this; try again")
        lost = worker.client.give_up(error)
        logger.error(
            "engine %d died (%s) with %d sequences; another one is started",
            worker.index,
            ending,
            len(lost),
        )
        # Whoever waits must not wait for a process that is stuck to be reaped.
        supervision.on_died(worker, lost, error)
        await worker.client.kill()
        if time.monotonic() - started > STABLE_AFTER:
            backoff = FIRST_BACKOFF
        while worker.state != "ready":
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)
            await _restart(worker, supervision)


async def _restart(worker: Worker, supervision: Supervision) -> None:
    worker.num_restarts += 1
    worker.state = "starting"
    worker.client = supervision.make_client(worker.index)
    try:
        await asyncio.wait_for(worker.client.start(), supervision.start_timeout)
    except Exception as e:  # noqa: BLE001  # whatever it is, the next attempt may succeed
        reason = str(e) or f"not within {supervision.start_timeout:g} s"
        logger.error("engine %d does not start: %s", worker.index, reason)
        worker.state = "dead"
        await worker.client.kill()
    else:
        logger.info("engine %d runs again", worker.index)
        worker.state = "ready"
        supervision.on_restarted(worker)
