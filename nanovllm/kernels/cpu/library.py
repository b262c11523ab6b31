"""The compiled kernels, bound to Python."""

import ctypes
import functools
import logging
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.cpu.build import NoCompilerError, choose_instruction_sets, compile_kernels
from nanovllm.kernels.cpu.threads import usable_cpus

logger = logging.getLogger(__name__)


class Weights(Structure):
    """A packed weight; see csrc/weights.h."""

    _fields_ = (
        ("format", c_int32),
        ("activation", c_int32),
        ("group_size", c_int32),
        ("gate", c_int32),
        ("has_zeros", c_int32),
        ("columns", c_int64),
        ("depth", c_int64),
        ("padded_depth", c_int64),
        ("num_tiles", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("blocks", c_void_p),
    )


class AttentionShape(Structure):
    """What the attention kernels know of the layers; see csrc/attention.h."""

    _fields_ = (
        ("activation", c_int32),
        ("cache", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("scale", c_float),
        ("one_path", c_int32),
    )


class Library:
    """The kernels of one instruction set. Pointers are passed as integers.

    Attributes:
        isa: Name of the instruction set.

    Raises:
        NoCompilerError: They cannot be compiled here.
    """

    def __init__(self, isa: str, path: str) -> None:
        self.isa = isa
        try:
            self._library = ctypes.CDLL(path)
        except OSError as e:  # a directory that is mounted noexec, say
            raise NoCompilerError(f"the compiled kernels cannot be loaded: {e}") from e
        pointer, count, flag = c_void_p, c_int64, c_int32
        weights, shape = POINTER(Weights), POINTER(AttentionShape)

        def bind(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
            function = getattr(self._library, f"nanovllm_{name}")
            function.argtypes, function.restype = arguments, result
            return function  # type: ignore[no-any-return]

        self.pack = bind("pack", weights, pointer, pointer, pointer, count, count, count, count)
        self.plan_blocks = bind("plan_blocks", weights, pointer, result=c_int64)
        self.compact = bind("compact", weights, weights)
        self.embed = bind("embed", weights, pointer, count, pointer)
        self.linear = bind("linear", weights, pointer, count, pointer, flag, flag, flag)
        self.mixture = bind(
            "mixture", *[pointer] * 2, count, *[pointer] * 2, *[count] * 2, *[flag] * 2, pointer
        )
        self.add_rms_norm = bind(
            "add_rms_norm", flag, pointer, pointer, pointer, c_float, count, count, pointer
        )
        self.act_and_mul = bind("act_and_mul", flag, flag, pointer, count, count, pointer)
        self.cell_bytes = bind("cell_bytes", shape, result=c_int64)
        self.new_plan = bind("new_plan", result=c_void_p)
        self.free_plan = bind("free_plan", pointer)
        self.plan_attention = bind(
            "plan_attention",
            pointer,
            shape,
            count,
            pointer,
            pointer,
            pointer,
            count,
            flag,
            result=c_int64,
        )
        self.write_kv = bind(
            "write_kv",
            *(shape, count, pointer, pointer, pointer, c_float),
            *(pointer, pointer, pointer, pointer, pointer),
        )
        self.attend = bind("attend", shape, pointer, pointer, pointer, count, pointer)
        self.sample = bind("sample", pointer, count, count, *[pointer] * 7)
        self.local_attention = bind("local_attention", flag, *[pointer] * 3, *[count] * 5, pointer)
        signal = pointer, count, count, count
        self.depthwise_conv = bind("depthwise_conv", *signal, *[pointer] * 3, count, *[pointer] * 4)
        self.causal_windows = bind(
            "causal_windows", *signal, *[pointer] * 2, count, pointer, count, count, pointer
        )
        self.replay = bind("replay", pointer, count)
        self.start_prefault = bind("start_prefault", POINTER(pointer), count, count, result=pointer)
        self.stop_prefault = bind("stop_prefault", pointer)
        self._start_threads = bind("start_threads", flag, POINTER(c_int32), result=c_int32)
        self._num_threads = bind("num_threads", result=c_int32)
        self._enable_amx = bind("enable_amx", result=c_int32)

    def again(self, name: str) -> int:
        """Address of what calls a kernel by its arguments as words, for `replay`."""
        function = getattr(self._library, f"nanovllm_{name}_again")
        return ctypes.cast(function, c_void_p).value or 0

    @property
    def num_threads(self) -> int:
        """Threads that compute, the caller's included."""
        return int(self._num_threads())

    def start_threads(self, num_threads: int) -> None:
        """Make the pool of this size; pin its threads if it has all the cores we may use.

        With fewer threads than cores, another process may be given the same cores, so the system
        places the threads.

        Raises:
            InvalidRequestError: The system does not give that many.
        """
        if num_threads == self.num_threads:
            return
        cpus = usable_cpus()
        pinned = (c_int32 * len(cpus))(*cpus) if num_threads == len(cpus) else None
        if not self._start_threads(num_threads, pinned):
            raise InvalidRequestError(
                f"the system does not give this process {num_threads} threads", "cpu_threads"
            )

    def enable(self) -> None:
        """Ask the system for what the instruction set needs.

        Raises:
            NoCompilerError: It refuses.
        """
        if self.isa.startswith("amx") and not self._enable_amx():
            raise NoCompilerError("the system does not allow the use of AMX tiles")


@functools.cache
def load_library(isa: str = "auto") -> Library:
    """Compile if need be, and load the best kernels this processor can run.

    Raises:
        InvalidRequestError: The processor does not have the instruction set that is asked for.
        NoCompilerError: The kernels cannot be compiled here.
    """
    problem: NoCompilerError | None = None
    for candidate in choose_instruction_sets(isa):
        try:
            library = Library(candidate.name, str(compile_kernels(candidate)))
            library.enable()
        except NoCompilerError as e:
            # An old compiler may not know the newest instructions; the next set needs fewer.
            problem = problem or e
            continue
        if problem is not None:
            logger.warning(
                "running on the %s kernels, the best ones cannot be had: %s", library.isa, problem
            )
        return library
    raise problem or NoCompilerError(f"there are no kernels for this processor and {isa!r}")
