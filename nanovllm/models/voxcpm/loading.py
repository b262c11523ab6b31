"""From a directory to the networks of VoxCPM."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import Kernels
from nanovllm.models.adapters import reserve_adapters
from nanovllm.models.checkpoint import Checkpoint, WeightSource, weight_files
from nanovllm.models.pickled import PickledCheckpoint, pickled_files
from nanovllm.models.voxcpm import vae
from nanovllm.models.voxcpm.config import AudioVAEConfig, VoxCPMConfig
from nanovllm.models.voxcpm.model import VoxCPM
from nanovllm.models.voxcpm.vae import AudioVAE
from nanovllm.models.weights import RandomWeights, expected_tensors, fill, quantized_if_wanted

VAE_STEM = "audiovae"
UNUSED_VAE_PREFIX = "encoder.fc_logvar."
"""Prefix of what a file of the autoencoder may lack."""


def load_speech_model(
    config: EngineConfig,
    shape: VoxCPMConfig,
    directory: Path,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
) -> VoxCPM:
    """Build a model and fill it, one tensor in memory at a time beside the weights.

    Args:
        config: Whether weights are random or quantized, whether there may be LoRA adapters, and
            what is compiled.
        shape: The checkpoint's hyper-parameters.
        directory: The checkpoint. With random weights it need have no more than `config.json`.
        kernels: Take the matrices over in their own form.
        dtype: Dtype of the networks but for the autoencoder, which is float32.
        device: Where they live.

    Raises:
        FileNotFoundError: A shard or the autoencoder's file is missing.
        InvalidRequestError: There are no weights, a file is corrupt, or its tensors are not those
            of `config.json`.
    """
    with torch.device("meta"):
        model = VoxCPM(shape).eval()
    if config.lora is not None:
        reserve_adapters(model, config.lora, kernels)
    expected = expected_tensors(model)
    source = _source(config, directory, dtype, expected)
    source.check(expected)
    fill(model, source, kernels, dtype=dtype, device=device)
    if config.dummy_weights:
        tensors = random_vae(shape.vae, config.seed)
    else:
        tensors = _vae_tensors(shape.vae, directory)
    model.vae = AudioVAE(shape.vae, tensors, kernels, device)
    if config.compile_model and kernels.name in ("torch", "triton"):
        model.feat_decoder.compile_guidance()
    if config.compile_model and kernels.name == "torch":  # the others have fused it themselves
        model.vae.compile_decoder()
    return model


def _source(
    config: EngineConfig, directory: Path, dtype: torch.dtype, expected: Iterable[str]
) -> WeightSource:
    """Where the weights of all but the autoencoder come from."""
    if config.dummy_weights:
        return quantized_if_wanted(config, RandomWeights(config.seed, dtype), [])
    files = _safetensors_files(directory)
    if files:
        return quantized_if_wanted(config, Checkpoint(files), files)
    files = pickled_files(directory)
    if files:
        return quantized_if_wanted(config, PickledCheckpoint(files), files)
    raise InvalidRequestError(  # in the family's words, which its documents explain
        f"Missing parameters: {sorted(expected)}: there is no model.safetensors or "
        f"pytorch_model.bin in {directory}; for random weights say dummy_weights (--dummy-weights)"
    )


def _safetensors_files(directory: Path) -> list[Path]:
    """The model's own; the autoencoder and adapters may lie beside them."""
    others = (f"{VAE_STEM}.safetensors", "lora_weights.safetensors")
    names = {path.name for path in directory.glob("*.safetensors*") if path.is_file()}
    if names & {"model.safetensors", "model.safetensors.index.json"}:
        return weight_files(directory)
    return [directory / name for name in sorted(names) if name not in others]


def _vae_tensors(config: AudioVAEConfig, directory: Path) -> dict[str, Tensor]:
    """Read and check the autoencoder's file.

    Raises:
        FileNotFoundError: There is none.
        InvalidRequestError: It is corrupt, or its tensors are not those of `config.json`.
    """
    safetensors = directory / f"{VAE_STEM}.safetensors"
    if safetensors.is_file():
        checkpoint = Checkpoint([safetensors])
    elif files := pickled_files(directory, VAE_STEM):
        checkpoint = PickledCheckpoint(files)
    else:
        raise FileNotFoundError(f"no {VAE_STEM}.pth or {safetensors.name} in {directory}")
    expected = {
        name: shape
        for name, shape in vae.expected_tensors(config).items()
        if name in checkpoint.names or not name.startswith(UNUSED_VAE_PREFIX)
    }
    checkpoint.check(expected)
    return {name: checkpoint.tensor(name) for name in expected}


def random_vae(config: AudioVAEConfig, seed: int) -> dict[str, Tensor]:
    """Seeded tensors of an autoencoder that changes the size of a signal but little."""

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith((".weight_g", ".alpha", "scale_embed.weight")):
            return torch.ones(shape)
        if name.endswith(("bias", "bias_embed.weight")):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator)

    return {name: value(name, shape) for name, shape in vae.expected_tensors(config).items()}
