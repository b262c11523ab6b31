"""Ctrl-C at every place of some code, one after the other."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


@contextmanager
def ctrl_c_at_line(number: int, *modules: ModuleType) -> Iterator[None]:
    """Press Ctrl-C as this thread comes to so many lines of the modules."""
    files = {module.__file__ for module in modules}
    num_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num_lines
        if frame.f_code.co_filename not in files:
            return None
        num_lines += event == "line"
        if num_lines == number:
            sys.settrace(before)
            num_lines += 1
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
