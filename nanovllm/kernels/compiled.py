"""What `torch.compile` makes of functions of rows."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])


def compile_rows(function: Function) -> Function:
    """Compile a function whose tensor arguments have a row each for as many rows, in any number.

    It is compiled when it runs first, once for one row and once for more; Inductor's cache on the
    disk makes that quick the next time. What it takes besides, in lists for instance, is always of
    the same shapes.
    """
    compiled = torch.compile(function)

    def run(*args: Any) -> Tensor:
        for arg in args:
            if isinstance(arg, Tensor):
                torch._dynamo.maybe_mark_dynamic(arg, 0)
        return compiled(*args)

    return cast(Function, run)
