"""Checkpoints of VoxCPM that are read, and those that are refused with a reason."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.layers.linear import Linear
from nanovllm.models.voxcpm.config import VoxCPMConfig, is_speech
from tests.voxcpm_checkpoint import KINDS, tiny_config
from tests.voxcpm_speaker import Speaker, edit_config, first_patch


@pytest.fixture
def directory(speech_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return Path(shutil.copytree(speech_checkpoint("v1"), tmp_path / "model"))


def state_of(speaker: Speaker) -> dict[str, Tensor]:
    linears = {
        path: module.weight.weight
        for path, module in speaker.model.named_modules()
        if isinstance(module, Linear)
    }
    return linears | dict(speaker.model.named_parameters())


def assert_same(one: Speaker, other: Speaker) -> None:
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestLoading:
    @pytest.mark.parametrize("wrapped", [False, True])
    @pytest.mark.parametrize("legacy", [False, True])
    def test_pickled_weights(self, directory: Path, wrapped: bool, legacy: bool) -> None:
        expected = Speaker(directory)
        weights = directory / "model.safetensors"
        tensors = load_file(weights)
        weights.unlink()
        torch.save(
            {"state_dict": tensors} if wrapped else tensors,
            directory / "pytorch_model.bin",
            _use_new_zipfile_serialization=not legacy,
        )
        assert_same(Speaker(directory), expected)
        # The autoencoder's file is not mistaken for the model's.
        state = torch.load(directory / "audiovae.pth", weights_only=True)["state_dict"]
        (directory / "audiovae.pth").unlink()
        save_file(state, directory / "audiovae.safetensors")
        assert_same(Speaker(directory), expected)

    @pytest.mark.parametrize("pickled", [False, True])
    def test_weights_in_parts(self, directory: Path, pickled: bool) -> None:
        expected = Speaker(directory)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
        names = sorted(tensors)
        parts = {f"{stem}-{i}-of-2.{suffix}": names[i::2] for i in range(2)}
        for file, part in parts.items():
            content = {name: tensors[name] for name in part}
            if pickled:
                torch.save(content, directory / file)
            else:
                save_file(content, directory / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        assert_same(Speaker(directory), expected)
        (directory / next(iter(parts))).unlink()
        with pytest.raises(FileNotFoundError, match="names files that are missing"):
            Speaker(directory)

    def test_missing_and_unexpected_tensors(self, directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        del tensors["base_lm.embed_tokens.weight"], tensors["stop_head.weight"]
        save_file(tensors, path)
        message = r"^Missing parameters: \['base_lm.embed_tokens.weight', 'stop_head.weight'\]$"
        with pytest.raises(ValueError, match=message):
            Speaker(directory)
        save_file(load_file(path) | {"fusion_concat_proj.bias": torch.zeros(64)}, path)
        with pytest.raises(ValueError, match=r"Unexpected parameters: \['fusion_concat_proj.bias"):
            Speaker(directory)

    def test_wrong_shape(self, directory: Path) -> None:
        edit_config(directory, {"scalar_quantization_latent_dim": 16})
        with pytest.raises(ValueError, match=r"fsq_layer.in_proj.weight has shape"):
            Speaker(directory)

    def test_missing_files(self, directory: Path) -> None:
        (directory / "audiovae.pth").rename(directory / "elsewhere")
        with pytest.raises(FileNotFoundError, match=r"no audiovae.pth or audiovae.safetensors in"):
            Speaker(directory)
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors").mkdir()  # no file either
        with pytest.raises(
            ValueError, match=r"Missing parameters: \['base_lm.embed_tokens.weight', "
        ):
            Speaker(directory)
        (directory / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no config.json in"):
            VoxCPMConfig.from_directory(directory)

    def test_the_variance_is_not_needed(self, directory: Path) -> None:
        path = directory / "audiovae.pth"
        state = torch.load(path, weights_only=True)["state_dict"]
        torch.save({k: v for k, v in state.items() if "fc_logvar" not in k}, path)
        Speaker(directory)
        torch.save({k: v for k, v in state.items() if "fc_mu.bias" not in k}, path)
        with pytest.raises(ValueError, match=r"^Missing parameters: \['encoder.fc_mu.bias'\]"):
            Speaker(directory)

    def test_a_pickle_runs_no_code(self, directory: Path, tmp_path: Path) -> None:
        trace = tmp_path / "trace"

        class Attack:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return (Path.touch, (trace,))

        (directory / "audiovae.pth").write_bytes(pickle.dumps({"state_dict": Attack()}, protocol=2))
        with pytest.raises(InvalidRequestError, match=r"audiovae.pth is not a readable file"):
            Speaker(directory)
        assert not trace.exists()

    @pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], {"a": 1}])
    def test_a_file_of_something_else(self, directory: Path, content: Any) -> None:
        path = directory / "audiovae.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(InvalidRequestError, match=r"audiovae.pth (is not|must hold)"):
            Speaker(directory)

    @pytest.mark.parametrize("kind", KINDS)
    def test_dummy_weights_need_the_config_alone(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(tiny_config(kind)))
        speaker = Speaker(tmp_path, dummy_weights=True)
        patch = first_patch(speaker)
        assert patch.isfinite().all()
        vae = speaker.model.vae
        state, slots = vae.new_decoder_state(1), torch.zeros(1, dtype=torch.int64)
        audio = vae.decode(patch, state, slots)
        assert audio.isfinite().all()
        assert 1e-4 < audio.abs().max() <= 1
        assert_same(speaker, Speaker(tmp_path, dummy_weights=True))


class TestConfig:
    def test_how_speech_is_told_from_text(self, directory: Path) -> None:
        assert is_speech(directory)
        path = directory / "config.json"
        raw = json.loads(path.read_text())
        del raw["architecture"]
        path.write_text(json.dumps(raw))
        assert is_speech(directory)
        assert VoxCPMConfig.from_directory(directory).architecture == "voxcpm"
        path.write_text('{"architectures": ["Qwen3ForCausalLM"]}')
        assert not is_speech(directory)
        path.unlink()
        assert not is_speech(directory)

    @pytest.mark.parametrize("kind", KINDS)
    def test_defaults_of_the_autoencoder(self, kind: str) -> None:
        raw = tiny_config(kind) | {"feat_dim": 64}
        del raw["audio_vae_config"]
        config = VoxCPMConfig.from_dict(raw)
        assert (config.vae.hop, config.vae.sample_rate) == (640, 16000)
        assert config.vae.decoder_hop == (1920 if kind == "v2" else 640)
        assert config.vae.out_sample_rate == (48000 if kind == "v2" else 16000)

    def test_scales_are_on_where_nothing_is_said(self) -> None:
        raw = tiny_config("v1")
        del raw["lm_config"]["use_mup"]
        config = VoxCPMConfig.from_dict(raw)
        assert config.base.embedding_scale == 12
        # Each model by its own number of layers.
        assert config.base.residual_scale == pytest.approx(1.4 / 3**0.5)
        assert config.encoder.residual_scale == pytest.approx(1.4 / 2**0.5)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architecture": "voxcpm3"}, "Unsupported model architecture: voxcpm3"),
            (
                {"architecture": None, "architectures": ["Qwen3ForCausalLM"]},
                "Unsupported model architecture: Qwen3ForCausalLM",
            ),
            ({"dtype": "float8"}, "dtype 'float8' is not supported"),
            ({"patch_size": 0}, "patch_size must be a positive integer, not 0"),
            ({"feat_dim": 8}, "feat_dim=8 is not the latent_dim=16"),
            ({"lm_config": {"num_key_value_heads": 3}}, "not a multiple"),
            ({"lm_config": {"hidden_size": "big"}}, "hidden_size must be a positive integer"),
            (
                {"lm_config": {"num_hidden_layers": 10**15}},
                "num_hidden_layers=1000000000000000 is not supported; supported: up to 4096",
            ),
            ({"residual_lm_num_layers": 4097}, "residual_lm_num_layers=4097 is not supported"),
            ({"encoder_config": {"num_layers": 10**15}}, "num_layers=10* is not supported"),
            ({"dit_config": {"num_layers": 10**15}}, "num_layers=10* is not supported"),
            ({"lm_config": {"rope_scaling": {"type": "yarn"}}}, "'yarn' is not supported"),
            ({"encoder_config": {"kv_channels": 32}}, "8 factors for heads of 32"),
            ({"audio_vae_config": {"use_noise_block": True}}, "use_noise_block"),
            ({"audio_vae_config": {"decoder_rates": []}}, "decoder_rates must be a list"),
            ({"audio_vae_config": 3}, "audio_vae_config must be an object, not 3"),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, Any], message: str) -> None:
        raw = tiny_config("v1")
        for name, value in changes.items():
            raw[name] = raw[name] | value if isinstance(value, dict) else value
        with pytest.raises(ValueError, match=message) as caught:
            VoxCPMConfig.from_dict(raw)
        assert isinstance(caught.value, InvalidRequestError | UnsupportedModelError)

    def test_a_missing_field_is_named(self) -> None:
        raw = tiny_config("v2")
        del raw["lm_config"]["rope_theta"]
        with pytest.raises(InvalidRequestError, match=r"config.json lacks 'rope_theta'"):
            VoxCPMConfig.from_dict(raw)
