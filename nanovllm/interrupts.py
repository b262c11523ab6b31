"""Ctrl-C, made to wait for the end of what must not be left half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class _Hold:
    """The signal handler while interrupts are held back: it defers Ctrl-C.

    Args:
        handler: What heard of it before, and does again behind the end.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self.lets_in = self.is_held = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.lets_in:
            self.lets_in = False  # whoever is interrupted now has to clean up
            self._handler(number, frame)
            self.lets_in = True
        else:
            self.is_held = True


_hold: _Hold | None = None
"""That of the main thread, the only one that hears of Ctrl-C."""


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait for the end of this, but for what `interrupts_let_in` is around.

    It raises `KeyboardInterrupt` there, or whatever else it does in this program; in threads that
    never hear of it nothing changes.
    """
    global _hold
    outer = _hold
    if not _is_main_thread() or (outer is not None and not outer.lets_in):
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # it ends the program at once, or does nothing
        yield
        return
    hold = _Hold(handler)
    try:
        signal.signal(signal.SIGINT, hold)
        _hold = hold
        yield
    finally:
        _hold = outer
        signal.signal(signal.SIGINT, handler)
        if hold.is_held:  # not raised again: asyncio heard of it when it came
            handler(signal.SIGINT, None)


@contextlib.contextmanager
def interrupts_let_in() -> Iterator[None]:
    """Within `interrupts_held_back`, let Ctrl-C interrupt this: it may take long."""
    hold = _hold
    if hold is None or not _is_main_thread():
        yield
        return
    hold.lets_in = True
    try:
        if hold.is_held:
            hold.is_held = False
            hold(signal.SIGINT, None)
        yield
    finally:
        hold.lets_in = False


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
