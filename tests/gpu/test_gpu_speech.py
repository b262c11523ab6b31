"""Speech on a CUDA device: the patches and the sound of the CPU, whatever it runs with."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.batch import Batch
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.loading import random_vae
from nanovllm.models.voxcpm.model import VoxCPM
from nanovllm.models.weights import expected_tensors
from tests.speech_engines import Ask, Spoken, error, keys_of, make_engine, speak
from tests.triton_device import DEVICE
from tests.voxcpm_checkpoint import KINDS, make_tokenizer, random_value, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MakeModel = Callable[[str], Path]

CLOSE = 2e-3
NUM_PATCHES = 5
ON_DEVICE: dict[str, Any] = {"device": DEVICE.type, "dtype": "float32"}
ON_CPU = ON_DEVICE | {"device": "cpu"}
WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without graphs": {"enforce_eager": True},
    "without overlap": {"async_scheduling": False},
    "small chunks": {"max_num_batched_tokens": 8},
    "torch's attention": {"attention_backend": "sdpa"},
    "few blocks": {"num_kv_blocks": 12, "block_size": 16},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return a function from a kind of VoxCPM to a tiny checkpoint.

    It is made by our own names of its tensors: the reference package, which `speech_checkpoint`
    needs, is seldom where GPUs are.
    """

    @cache
    def get(kind: str) -> Path:
        directory: Path = tmp_path_factory.mktemp(f"voxcpm-{kind}")
        (directory / "config.json").write_text(json.dumps(tiny_config(kind)))
        make_tokenizer(directory)
        shape = VoxCPMConfig.from_directory(directory)
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            expected = expected_tensors(VoxCPM(shape))
        tensors = {
            name: random_value(name, torch.empty(expected[name]), generator)
            for name in sorted(expected)
        }
        save_file(tensors, directory / "model.safetensors")
        vae = {
            name: random_value(name, torch.empty(tensor.shape), generator)
            for name, tensor in sorted(random_vae(shape.vae, 0).items())
        }
        save_file(vae, directory / "audiovae.safetensors")
        return directory

    return get


def asks(shape: VoxCPMConfig, timesteps: tuple[int, ...] = (10,)) -> list[Ask]:
    """Texts of several lengths, of which some go on from a recording."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate((3, 17, 8, 30, 12, 5)):
        ids = torch.randint(5, 400, (length,), generator=generator).tolist()
        prompt = None
        if number % 2:
            size = (2 + number, shape.patch_size, shape.feat_dim)
            prompt = torch.randn(size, generator=generator)
        keys, latents = keys_of(ids, prompt)
        options = {
            # What random weights say of the end means nothing.
            "min_len": NUM_PATCHES,
            "inference_timesteps": timesteps[number % len(timesteps)],
            "cfg_value": 1.0 + number / 2,
        }
        made.append(Ask(keys, latents, number, NUM_PATCHES, options))
    return made


def spoken_by(directory: Path, timesteps: tuple[int, ...], **options: Any) -> list[Spoken]:
    engine, runner = make_engine(directory, **options)
    return speak(engine, asks(runner.model.config, timesteps), runner.model.config)


def assert_close(ours: list[Spoken], theirs: list[Spoken]) -> None:
    """All but one: quantization to few levels may tip, and what follows is then another speech."""
    far = []
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.finish_reason == other.finish_reason == "length"
        errors = error(one.patches, other.patches), error(one.audio, other.audio)
        if max(errors) >= CLOSE:
            far.append((row, errors))
    assert len(far) <= 1, far


@pytest.mark.parametrize("kind", KINDS)
def test_patches_and_sound_are_those_of_the_cpu(model: MakeModel, kind: str) -> None:
    theirs = spoken_by(model(kind), (10,), **ON_CPU)
    assert_close(spoken_by(model(kind), (10,), **ON_DEVICE), theirs)


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_running_changes_what_is_said(model: MakeModel, way: str) -> None:
    """With several numbers of timesteps in one batch, some of which no graph was captured for."""
    timesteps = (10, 4, 7)
    theirs = spoken_by(model("v2"), timesteps, **ON_CPU)
    assert_close(spoken_by(model("v2"), timesteps, **ON_DEVICE | WAYS[way]), theirs)


def test_a_stream_is_the_same_alone_and_among_others(model: MakeModel) -> None:
    engine, runner = make_engine(model("v2"), **ON_DEVICE)
    shape = runner.model.config
    together = speak(engine, asks(shape), shape)
    alone = [speak(engine, [ask], shape)[0] for ask in asks(shape)]
    assert_close(alone, together)


@pytest.mark.parametrize("way", ["as it comes", "without graphs"])
def test_no_launch_of_steady_streams_waits_for_the_device(
    model: MakeModel, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    engine, runner = make_engine(model("v2"), **ON_DEVICE | WAYS[way])
    shape = runner.model.config
    expected = speak(engine, asks(shape), shape)
    launch = runner.launch

    def watched(batch: Batch) -> object:
        # A stream that starts brings its recording along, and may wait for it.
        torch.cuda.set_sync_debug_mode("default" if batch.started else "error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner, "launch", watched)
    assert_close(speak(engine, asks(shape), shape), expected)


def test_bfloat16_speaks_without_nan(model: MakeModel) -> None:
    for said in spoken_by(model("v2"), (10,), **ON_DEVICE | {"dtype": "bfloat16"}):
        assert said.finish_reason == "length"
        assert len(said.patches) == NUM_PATCHES
