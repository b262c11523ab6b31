"""Graphs without a GPU: what a function does on its tensors is recorded, then done again.

Like a CUDA graph, a recording knows operators and addresses and nothing else: what Python decided
when it was made stays decided.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2")
"""Operators whose result on a GPU is waited for."""
READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""Methods that bring a tensor to the host, which no operator shows where it is there already."""


class NoWaits(TorchDispatchMode):
    """Complains of operators that would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError(f"{name} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Complain of all that would wait for a GPU, in code that has no tensors on the host."""

    def complain_of(name: str) -> Callable[..., None]:
        def complain(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            raise AssertionError(f"{name} waits for the device")

        return complain

    with pytest.MonkeyPatch.context() as patch, NoWaits():
        for name in READS:
            patch.setattr(torch.Tensor, name, complain_of(name))
        yield


class Recording(NoWaits):
    """Records operators and launches of Triton kernels while it is entered.

    Attributes:
        calls: What was called, with its arguments and what it returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __enter__(self) -> "Recording":
        launch = interpreter.GridExecutor.__call__

        def record(executor: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            self.calls.append((lambda *a, **k: launch(executor, *a, **k), args, kwargs, None))

        self._launch = launch
        interpreter.GridExecutor.__call__ = record
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        interpreter.GridExecutor.__call__ = self._launch
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Do all of it again; what tensors hold now is what it works on."""
        for func, args, kwargs, before in self.calls:
            after = func(*args, **kwargs)
            for old, new in zip(_tensors(before), _tensors(after), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [tensor for tensor in results if isinstance(tensor, torch.Tensor) and tensor.numel()]


class RecordedGraphs:
    """A `Capture`.

    Attributes:
        num_captured: Graphs made.
        num_replayed: Times that one was run.
    """

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        recording = Recording()
        with recording:
            run()
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            with torch.inference_mode():
                recording.replay()

        return replay
