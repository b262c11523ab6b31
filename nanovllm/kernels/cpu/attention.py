"""Attention by the CPU kernels."""

import ctypes
import weakref

import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    CacheSpec,
    HeadNorms,
    PlanBuffers,
)
from nanovllm.kernels.cpu.library import AttentionShape
from nanovllm.kernels.cpu.packing import INT8, TYPES
from nanovllm.kernels.cpu.replay import Replays

MAX_HEAD_DIM = 512


class CpuAttention:
    """See `AttentionBackend`. A block and KV head have a *cell* of the cache; see csrc/attention.h.

    Args:
        replays: The kernels, and the memory for what they yield.
        config: Shapes and dtypes.
        cascade: Whether blocks that several rows of a step share are read once for all.
        deterministic: Whether a row's result may not depend on the others'; turns cascade off.

    Raises:
        InvalidRequestError: The heads are too wide, or of odd width.
    """

    def __init__(
        self, replays: Replays, config: AttentionConfig, cascade: bool, deterministic: bool
    ) -> None:
        if config.head_dim % 2:
            raise InvalidRequestError(f"head_dim {config.head_dim} must be even", "head_dim")
        if config.head_dim > MAX_HEAD_DIM:
            raise InvalidRequestError(
                f"head_dim {config.head_dim} is not supported on a CPU; it must be at most "
                f"{MAX_HEAD_DIM}; cpu_isa='torch' has no such limit",
                "head_dim",
            )
        self._empty, self._library = replays.empty, replays.library
        self._config, self._cascade = config, cascade
        self._shape = AttentionShape(
            activation=TYPES[config.dtype],
            cache=INT8 if config.quantize_cache else TYPES[config.dtype],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=config.block_size,
            scale=config.head_dim**-0.5,
            one_path=deterministic,
        )
        self._reference = ctypes.byref(self._shape)
        # One plan, filled anew for each step: on a CPU no two steps are in flight.
        self._plan = self._library.new_plan()
        # Not at exit: a thread that Python leaves behind may still be reading it.
        weakref.finalize(self, self._library.free_plan, self._plan).atexit = False

    @property
    def capturable(self) -> bool:
        return False

    def cache_spec(self, num_blocks: int) -> CacheSpec:
        cell_bytes = self._library.cell_bytes(self._reference)
        return CacheSpec((num_blocks, self._config.num_kv_heads, cell_bytes), torch.uint8)

    def write(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        config = self._config
        num_tokens = qkv.shape[0]
        q = self._empty(num_tokens, config.num_heads, config.head_dim, dtype=config.dtype)
        self._library.write_kv(
            self._reference,
            num_tokens,
            qkv.data_ptr(),
            None if norms is None else norms.q.data_ptr(),
            None if norms is None else norms.k.data_ptr(),
            0.0 if norms is None else norms.eps,
            None if rotary is None else rotary[0].data_ptr(),
            None if rotary is None else rotary[1].data_ptr(),
            slots.data_ptr(),
            q.data_ptr(),
            cache.data_ptr(),
        )
        return q

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> int:  # noqa: ARG002
        tables = batch.row_tables(self._config.block_size)
        self._library.plan_attention(
            self._plan,
            self._reference,
            len(batch.starts),
            batch.starts.ctypes.data,
            batch.lengths.ctypes.data,
            tables.data_ptr(),
            tables.shape[1],
            self._cascade,
        )
        return self._plan  # type: ignore[no-any-return]

    def run(self, q: Tensor, cache: Tensor, metadata: int, window: int | None) -> Tensor:
        out = self._empty(*q.shape, dtype=q.dtype)
        self._library.attend(
            self._reference,
            metadata,
            q.data_ptr(),
            cache.data_ptr(),
            window or 0,
            out.data_ptr(),
        )
        return out
