"""One place in the queue for requests that follow one another."""

import asyncio
from collections.abc import Callable


class Admission:
    """What the requests of one utterance share, such as the sentences of a long text.

    The first is admitted as any other, and *opens* it. From then on the others get in however full
    the queue is, and a drain waits, until it is closed or dropped.

    Args:
        hold: Told `True` when it opens, and `False` when it is closed.

    Attributes:
        is_open: Whether the first request has been admitted, and more may follow.
    """

    def __init__(self, hold: Callable[[bool], None]) -> None:
        self._hold = hold
        self._loop = asyncio.get_running_loop()
        self.is_open = False

    def open(self) -> None:
        """Have drains wait; without effect if they do."""
        if not self.is_open:
            self.is_open = True
            self._hold(True)

    def close(self) -> None:
        """No more requests follow."""
        if self.is_open:
            self.is_open = False
            self._hold(False)

    def __del__(self) -> None:
        # The garbage collector runs in any thread; the pool belongs to the loop's.
        if self.is_open and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hold, False)
