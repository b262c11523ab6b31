"""Stand-ins for flash-attn and flashinfer, which need a GPU: they check all that the packages
document of their arguments, and compute it plainly.

Signatures are those of flash-attn 2.8 (`flash_attn_interface.py`, `hopper/` for version 3) and of
flashinfer 0.6 (`decode.py`, `prefill.py`).
"""

from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)


def stand_in(name: str) -> ModuleType:
    """A module to put into `sys.modules`."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for attribute, value in vars(CONTENTS[name]).items():
        setattr(module, attribute, value)
    return module


def attend_row(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    """Attend from the last positions of a row, which may have none, seeing `left` before each."""
    queries, keys = len(q), len(k)
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[2] ** -0.5
    position, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    seen = key <= position
    if left >= 0:
        seen &= key >= position - left
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def check_index(tensor: Any, shape: tuple[int, ...] | None = None) -> None:
    assert tensor.dtype == torch.int32
    assert tensor.stride(-1) == 1
    assert shape is None or tensor.shape == shape


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in HALF_TYPES
    assert k.shape == v.shape
    assert k.dim() == 4
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-2] % k.shape[-2] == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


def attend_pages(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, tables: Tensor, left: int
) -> Tensor:
    out = torch.full_like(q, torch.nan)
    for row, end in enumerate(ends.tolist()):
        pages = tables[row, : -(-end // k.shape[1])].long()
        first, last = int(begins[row]), int(begins[row + 1])
        row_k, row_v = (x[pages].flatten(0, 1)[:end] for x in (k, v))
        out[first:last] = attend_row(q[first:last], row_k, row_v, left)
    return out


def check_window(causal: bool, window_size: tuple[int, int]) -> int:
    left, right = window_size
    assert causal
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    return left


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_table: Tensor,
) -> Tensor:
    check_heads(q, k, v)
    assert k.shape[1] % 256 == 0
    num_rows = len(cu_seqlens_q) - 1
    check_index(cu_seqlens_q)
    check_index(cu_seqlens_k, (num_rows + 1,))
    check_index(block_table, (num_rows, block_table.shape[1]))
    lengths, ends = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert (max_seqlen_q, max_seqlen_k) == (int(lengths.max()), int(ends.max()))
    assert isinstance(max_seqlen_q, int)
    assert int(cu_seqlens_q[-1]) == len(q)
    left = check_window(causal, window_size)
    return attend_pages(q, k, v, cu_seqlens_q, ends, block_table, left)


def flash_attn_with_kvcache_2(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert k_cache.shape[1] % 256 == 0
    return flash_attn_with_kvcache_3(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        page_table=block_table,
        causal=causal,
        window_size=window_size,
    )


def flash_attn_with_kvcache_3(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    qv: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    check_heads(q, k_cache, v_cache)
    num_rows = len(cache_seqlens)
    check_index(cache_seqlens, (num_rows,))
    check_index(page_table, (num_rows, page_table.shape[1]))
    left = check_window(causal, window_size)
    if cu_seqlens_q is None:
        assert q.dim() == 4
        assert q.shape[0] == num_rows
        assert max_seqlen_q is None
        begins, queries = torch.arange(num_rows + 1) * q.shape[1], q.flatten(0, 1)
    else:
        check_index(cu_seqlens_q, (num_rows + 1,))
        assert isinstance(max_seqlen_q, int)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert int(cu_seqlens_q[-1]) == len(q)
        begins, queries = cu_seqlens_q, q
    out = attend_pages(queries, k_cache, v_cache, begins, cache_seqlens, page_table, left)
    return out.view_as(q)


class Wrapper:
    """What both of flashinfer's wrappers do."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.fixed: list[Tensor] | None = None

    def plan_pages(
        self, pages: list[Tensor], shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        first, ids, last_lengths = pages
        check_index(first, (len(last_lengths) + 1,))
        check_index(ids, (int(first[-1]),))
        check_index(last_lengths)
        # Of no blocks the kernels make NaN or worse.
        assert (first.diff() >= 1).all()
        assert last_lengths.min() >= 1
        self.num_heads, self.num_kv_heads, self.head_dim, self.page_size = shape
        assert last_lengths.max() <= self.page_size
        assert self.head_dim in (64, 128, 256)
        self.window_left, self.dtype = options["window_left"], options["q_data_type"]
        assert options["kv_data_type"] == self.dtype
        assert self.dtype in HALF_TYPES
        self.num_rows, self.pages = len(last_lengths), [page.clone() for page in pages]
        if self.fixed is not None:
            assert len(self.fixed[2]) == self.num_rows
            assert len(ids) <= len(self.fixed[1])
            for kept, new in zip(self.fixed, pages, strict=True):
                kept[: len(new)] = new
            self.pages = self.fixed

    def attend(self, q: Tensor, kv_cache: tuple[Tensor, Tensor], begins: Tensor) -> Tensor:
        keys, values = kv_cache
        assert q.dtype == self.dtype
        assert q.is_contiguous()
        assert q.shape[1:] == (self.num_heads, self.head_dim)
        assert keys.shape[1:] == (self.page_size, self.num_kv_heads, self.head_dim)
        first, ids, last_lengths = self.pages
        out = torch.full_like(q, torch.nan)
        for row in range(self.num_rows):
            blocks = ids[first[row] : first[row + 1]].long()
            end = (len(blocks) - 1) * self.page_size + int(last_lengths[row])
            k, v = (x[blocks].flatten(0, 1)[:end] for x in (keys, values))
            chosen = slice(int(begins[row]), int(begins[row + 1]))
            out[chosen] = attend_row(q[chosen], k, v, self.window_left)
        return out


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
            self.fixed = [
                paged_kv_indptr_buffer,
                paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer,
            ]

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        assert set(options) == {"window_left", "q_data_type", "kv_data_type"}
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 8)
        shape = num_qo_heads, num_kv_heads, head_dim, page_size
        self.plan_pages([indptr, indices, last_page_len], shape, options)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert len(q) == self.num_rows
        return self.attend(q, paged_kv_cache, torch.arange(len(q) + 1))


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        **options: Any,
    ) -> None:
        assert set(options) == {"causal", "window_left", "q_data_type", "kv_data_type"}
        assert options["causal"] is True
        check_index(qo_indptr, (len(paged_kv_last_page_len) + 1,))
        self.begins = qo_indptr.clone()
        shape = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        pages = [paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len]
        self.plan_pages(pages, shape, options)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert int(self.begins[-1]) == len(q)
        return self.attend(q, paged_kv_cache, self.begins)


CONTENTS = {
    "flash_attn": SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache_2,
    ),
    "flash_attn_interface": SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache_3),
    "flashinfer": SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    ),
}
