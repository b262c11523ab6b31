"""Checkpoint tensors into a model's parameters."""

import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import Kernels, QuantizedWeight
from nanovllm.layers.linear import Linear
from nanovllm.models.checkpoint import Checkpoint, WeightSource, weight_files
from nanovllm.models.decoder import CausalLM
from nanovllm.models.model_config import ModelConfig, read_json, stored_quantization
from nanovllm.models.quantization import SCHEMES, QuantizingSource
from nanovllm.models.quantized_cache import CachedSource
from nanovllm.models.quantized_checkpoint import open_quantized
from nanovllm.models.registry import CLASSES

__all__ = [
    "Checkpoint",
    "RandomWeights",
    "WeightSource",
    "expected_tensors",
    "load_model",
    "weight_files",
    "weight_source",
]


def load_model(
    config: ModelConfig,
    source: WeightSource,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> CausalLM:
    """Build the model of a config and fill it, one tensor in memory at a time beside the weights.

    Args:
        config: The checkpoint's hyper-parameters.
        source: Holds its tensors.
        kernels: Take the matrices over in their own form.
        dtype: Dtype of the other parameters.
        device: Where these live.

    Raises:
        InvalidRequestError: See `WeightSource.check`, or a file is corrupt.
    """
    with torch.device("meta"):
        model = CLASSES[config.architecture](config).eval()
    source.check(expected_tensors(model))
    with torch.inference_mode():
        for path, module in model.named_modules():
            if isinstance(module, Linear):
                parts = module.parts(path)
                biases = [source.tensor(f"{part}.bias") for part in parts if module.has_bias]
                module.weight = kernels.pack(
                    module.spec,
                    _alike((f"{part}.weight" for part in parts), source),
                    torch.cat(biases) if biases else None,
                )
                continue
            for name, _ in module.named_parameters(recurse=False):
                tensor = source.tensor(f"{path}.{name}").to(device, dtype, copy=True)
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return model


def weight_source(config: EngineConfig, directory: Path, dtype: torch.dtype) -> WeightSource:
    """Where an engine's weights come from, and whether they are quantized on the way.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        InvalidRequestError: A file is corrupt or of a format we do not read, or `quantization`
            does not fit the checkpoint.
    """
    wanted = config.quantization
    settings = stored_quantization(read_json(directory / "config.json"))
    stored = None if settings is None or config.dummy_weights else settings["quant_method"]
    if stored and wanted not in (None, stored):
        raise InvalidRequestError(
            f"the checkpoint is quantized with {stored!r} already: leave quantization={wanted!r} "
            "out, or take one that is not quantized",
            "quantization",
        )
    if settings and stored:
        return open_quantized(directory, settings)
    if wanted is None:
        return RandomWeights(config.seed, dtype) if config.dummy_weights else Checkpoint(directory)
    if wanted not in SCHEMES:
        raise InvalidRequestError(
            f"quantization={wanted!r} needs a checkpoint that is quantized so, and this one is "
            f"not; any can be quantized with {', '.join(SCHEMES)}",
            "quantization",
        )
    if config.dummy_weights:
        return QuantizingSource(RandomWeights(config.seed, dtype), wanted)
    return CachedSource(QuantizingSource(Checkpoint(directory), wanted), weight_files(directory))


def _alike(names: Iterable[str], source: WeightSource) -> Iterator[Tensor | QuantizedWeight]:
    """Read the parts of one packed matrix, which must all be stored in the same way.

    Raises:
        InvalidRequestError: They are not.
    """
    first = None
    for name in names:
        matrix = source.matrix(name)
        form = _form(matrix)
        if first is None:
            first = name, form
        elif form != first[1]:
            raise InvalidRequestError(
                f"{first[0]} is {first[1]}, and {name} is {form}: matrices that read the same "
                "input are packed into one, and must be quantized in the same way"
            )
        yield matrix


def _form(matrix: Tensor | QuantizedWeight) -> str:
    """How a matrix is stored, in words."""
    if not isinstance(matrix, QuantizedWeight):
        return "not quantized"
    if matrix.bits == 8:
        return "in 8 bits"
    zeros = "without" if matrix.zeros is None else "with"
    return f"in {matrix.bits} bits by groups of {matrix.group_size} {zeros} zero points"


def expected_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model's checkpoint has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            for part, rows in module.parts(path).items():
                shapes[f"{part}.weight"] = (rows, module.spec.depth)
                if module.has_bias:
                    shapes[f"{part}.bias"] = (rows,)
        for name, parameter in module.named_parameters(recurse=False):
            shapes[f"{path}.{name}"] = tuple(parameter.shape)
    return shapes


class RandomWeights:
    """Seeded values of the usual scales: norms 1, biases 0, matrices Xavier-uniform.

    Each tensor has a generator of its own, so that it does not depend on the others.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._seed, self._dtype = seed, dtype
        self._shapes: dict[str, tuple[int, ...]] = {}

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._shapes = expected

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        std = 0.02 if name.endswith("embed_tokens.weight") else shape[1] ** -0.5
        generator = torch.Generator().manual_seed(self._seed ^ zlib.crc32(name.encode()))
        # Uniform values of that standard deviation: three times as fast to draw as normal.
        limit = std * math.sqrt(3)
        return torch.empty(shape, dtype=self._dtype).uniform_(-limit, limit, generator=generator)

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        return self.tensor(name)
