"""Triton's interpreter, for machines without a GPU, with what is wrong in that of Triton 3.6."""

import importlib.util
import os
from typing import Any

import numpy as np
import torch


def use_interpreter() -> None:
    """Interpret kernels; called before anything imports them."""
    # Triton reads it when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        _patch_once()
        _mend_range()
        _mend_arithmetic()
        _mend_masks()


def _patch_once() -> None:
    """It redirects `triton.language` at every launch and back again, for half of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    patched = set()

    def patch_if_new(function: Any) -> Any:
        names = function.__globals__
        modules = frozenset(name for name in names if names[name] is tl or names[name] is tl.core)
        if modules not in patched:
            patched.add(modules)
            patch(function)
        return nothing

    interpreter._patch_lang = patch_if_new


def _mend_range() -> None:
    """Scalars are arrays of one value, of which NumPy 2.4 makes no int any more; `range` does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def _mend_arithmetic() -> None:
    """Values are bits as uint16: it multiplies these as integers, and rounds towards zero.

    And in a product, which BLAS makes, the last bits of a row depend on where it stands; on a GPU
    they do not. Exact sums, rounded once, do not either.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended_cast(self: Any, x: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return cast(self, widened(x), dtype)
        values = torch.from_numpy(widened(x).data.astype(np.float32))
        return handle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def mended_dot(self: Any, a: Any, b: Any, sums: Any, *args: Any) -> Any:
        if a.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
            return dot(self, a, b, sums, *args)
        product = widened(a).data.astype(np.float64) @ widened(b).data.astype(np.float64)
        return handle(product.astype(sums.data.dtype) + sums.data, sums.dtype.scalar)

    builder.cast_impl, builder.create_dot = mended_cast, mended_dot


def _mend_masks() -> None:
    """Since Triton 3.8 what loads and stores takes masks of booleans alone, and not all are."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    def mended_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        return load(self, ptrs, boolean(mask), *args)

    def mended_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, ptrs, value, boolean(mask), *args)

    builder.create_masked_load, builder.create_masked_store = mended_load, mended_store
