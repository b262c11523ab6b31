"""A loop that other threads give work to."""

import asyncio
import contextlib
from concurrent.futures import CancelledError

from nanovllm.loop_thread import LoopThread


async def nothing() -> None:
    pass


def test_a_thread_that_the_loop_waits_for_may_close_it() -> None:
    """As the garbage collector does, which comes in any thread."""
    loop = LoopThread()

    async def close() -> None:
        await asyncio.to_thread(loop.close, nothing())

    with contextlib.suppress(CancelledError):
        loop.call(close())
    loop._thread.join(5)
    assert not loop._thread.is_alive()
