"""flash-attn and flashinfer themselves, where they are installed, against torch's attention."""

from dataclasses import replace

import pytest
import torch

from nanovllm.kernels import attention_select
from nanovllm.kernels.attention_backend import AttentionBackend, AttentionConfig
from nanovllm.kernels.attention_select import flash_attn_version
from nanovllm.kernels.paired_attention import PairedAttention
from tests.attention_world import BACKENDS, DECODES, HEADS, MIXTURE, World, config_for, make
from tests.triton_device import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def installed(name: str, config: AttentionConfig) -> AttentionBackend:
    """The backend; skips the test if its package does not run here."""
    package = name.split()[0]
    if problem := attention_select.REGISTRY[package].problem(config, DEVICE):
        pytest.skip(problem)
    if package == "flash-attn" and flash_attn_version(DEVICE)[0] != int(name[-1]):
        pytest.skip("another version is installed")
    return make(name, config, DEVICE)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_of_all_kinds(name: str, heads: tuple[int, int], head_dim: int) -> None:
    config = replace(config_for(name, heads), head_dim=head_dim)
    backend, world = installed(name, config), World(config, DEVICE)
    for rows in (DECODES, MIXTURE, MIXTURE[4:]):
        for window in (None, 1, 7, 16):
            world.check(PairedAttention(backend, backend, backend), rows, window)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_sees_what_is_planned_for_its_replays(name: str) -> None:
    config = config_for(name)
    World(config, DEVICE).check_captured(installed(name, config), (None, 7))
