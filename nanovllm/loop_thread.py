"""An event loop in a thread of its own, for callers that have none."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines for other threads. The thread does not keep the process alive."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._own = threading.local()
        self._loop.set_default_executor(ThreadPoolExecutor(initializer=self._adopt))
        self._closed = False
        # What is begun comes before the end. Reentrant: the garbage collector may come in between.
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="nanovllm", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine and wait for its result; it is cancelled if the wait is interrupted.

        Raises:
            RuntimeError: The loop has been closed.
        """
        future = self._begin(work)
        if future is None:
            raise RuntimeError("this pool has been stopped")
        try:
            return future.result()
        finally:
            future.cancel()

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that ends something, and wait for it; without effect once closed.

        The garbage collector may call it in one of the loop's own threads, which do not wait: the
        loop may be waiting for them.
        """
        future = self._begin(work)
        if future is not None and not self._is_own():
            future.result()

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run a last coroutine, then end the loop and the thread; whoever waits is cancelled.

        Of several threads that call it the first one's coroutine runs, and all wait for the end but
        the loop's own ones, see `finish`.
        """
        with self._lock:
            future = self._begin(self._end(last))
            self._closed = True
        if future is None:
            last.close()
        if not self._is_own():
            self._thread.join()
            if future is not None:
                future.result()

    def _adopt(self) -> None:
        self._own.is_here = True

    def _is_own(self) -> bool:
        """Whether this thread is the loop's, or one of those that it has wait for something."""
        return hasattr(self._own, "is_here")

    def _begin(self, work: Coroutine[Any, Any, Result]) -> "Future[Result] | None":
        """Have a coroutine run; None once closed, or in a fork, where the thread is not."""
        with self._lock:
            if self._closed or not self._thread.is_alive():
                work.close()
                return None
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self, last: Coroutine[Any, Any, None]) -> None:
        try:
            await last
        finally:
            self._loop.stop()

    def _run(self) -> None:
        self._adopt()
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
