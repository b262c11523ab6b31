"""The backends of flash-attn and flashinfer, on stand-ins for them, against torch's attention."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels import flashinfer
from nanovllm.kernels.attention_backend import AttentionConfig, HeadNorms
from nanovllm.kernels.paired_attention import PairedAttention
from nanovllm.kernels.sdpa import SdpaBackend
from tests.attention_packages import CONTENTS, stand_in
from tests.attention_world import BACKENDS, DECODES, HEADS, MIXTURE, World, config_for, make


@pytest.fixture(autouse=True, scope="module")
def packages() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
        for name in CONTENTS:
            patch.setitem(sys.modules, name, stand_in(name))
        yield


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [DECODES, MIXTURE, MIXTURE[4:]], ids=["decodes", "mixed", "long"])
def test_rows_of_all_kinds(
    name: str, heads: tuple[int, int], window: int | None, rows: list[tuple[int, int]]
) -> None:
    config = config_for(name, heads)
    backend, world = make(name, config), World(config)
    world.check(backend, rows, window)
    world.check(PairedAttention(backend, backend, backend), rows, window)


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=15)
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 70),
    block_size=st.sampled_from([1, 4, 16, 32]),
)
def test_any_rows(
    name: str, rows: list[tuple[int, int]], window: int | None, block_size: int
) -> None:
    config = config_for(name, block_size=block_size)
    World(config).check(make(name, config), rows, window)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_sees_what_is_planned_for_its_replays(name: str) -> None:
    backend = make(name, config_for(name))
    assert backend.capturable
    World(config_for(name)).check_captured(backend, (None, 7))


def test_a_pair_shares_its_rows_out() -> None:
    config = config_for("flash-attn 3")
    world, sdpa = World(config), SdpaBackend(config)
    flash = make("flash-attn 3", config)
    for prefill, decode in ((flash, sdpa), (sdpa, flash)):
        pair = PairedAttention(prefill, decode, sdpa)
        assert pair.capturable is decode.capturable
        assert pair.cache_spec(3) == sdpa.cache_spec(3)
        for rows in (DECODES, MIXTURE, MIXTURE[4:]):
            world.check(pair, rows, 9)
    plan = PairedAttention(flash, sdpa, sdpa).plan(world.batch(MIXTURE))
    assert plan.num_decodes == 4
    assert plan.prefill is not None
    assert len(plan.prefill.ends) == 4


@pytest.mark.parametrize(
    "slots", [[5, -1, 0, -1], [-1, 31, -1, 2], [-1, -1, -1, -1], [31, 0, 1, 2]]
)
@pytest.mark.parametrize("with_norms", [False, True])
def test_tokens_without_a_slot_are_written_nowhere(slots: list[int], with_norms: bool) -> None:
    config = AttentionConfig(4, 4, 2, 8, torch.float32)
    backend = SdpaBackend(config)
    cache = torch.randn(backend.cache_spec(8).shape)
    qkv, weight = torch.randn(4, 8 * 8), torch.rand(2, 8)
    norms = HeadNorms(weight[0], weight[1], 1e-6) if with_norms else None
    angles = torch.randn(4, 1, 4)
    rotary = angles.cos(), angles.sin()
    kept = [token for token, slot in enumerate(slots) if slot >= 0]
    expected, index = cache.clone(), torch.tensor(slots)
    for token in kept:
        one = slice(token, token + 1)
        backend.write(qkv[one], norms, (rotary[0][one], rotary[1][one]), expected, index[one])
    q = backend.write(qkv, norms, rotary, cache, index)
    torch.testing.assert_close(cache, expected, rtol=0, atol=1e-6)
    assert q.shape == (4, 4, 8)
