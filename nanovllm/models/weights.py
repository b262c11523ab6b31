"""Checkpoint tensors into a model's parameters."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import Kernels, QuantizedWeight
from nanovllm.layers.experts import ExpertLinear
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.parallel import TensorParallel
from nanovllm.lora_config import LoRAConfig
from nanovllm.models.adapters import reserve_adapters
from nanovllm.models.checkpoint import Checkpoint, WeightSource, weight_files
from nanovllm.models.decoder import CausalLM
from nanovllm.models.model_config import ModelConfig, read_json, stored_quantization
from nanovllm.models.quantization import SCHEMES, QuantizingSource
from nanovllm.models.quantized_cache import CachedSource
from nanovllm.models.quantized_checkpoint import open_quantized
from nanovllm.models.registry import CLASSES
from nanovllm.models.sharding import ShardedSource, Sharding


def load_model(
    config: ModelConfig,
    source: WeightSource,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    device: torch.device,
    lora: LoRAConfig | None = None,
    parallel: TensorParallel | None = None,
) -> CausalLM:
    """Build the model of a config and fill it, one tensor in memory at a time beside the weights.

    Args:
        config: The checkpoint's hyper-parameters.
        source: Holds its tensors.
        kernels: Take the matrices over in their own form.
        dtype: Dtype of the other parameters but norms, which are float32.
        device: Where these live.
        lora: Which adapters there is to be room for; None is none.
        parallel: The ranks that have a part of it each, all of which call this; None is no others.

    Raises:
        InvalidRequestError: See `WeightSource.check`, or a file is corrupt, or the model cannot be
            shared out to so many ranks.
    """

    def build(sharding: Sharding | None = None) -> CausalLM:
        with torch.device("meta"):
            return CLASSES[config.architecture](config, sharding).eval()

    model = build()
    if parallel is not None and parallel.rank > 0:
        parallel.wait_for_all()  # what the first one keeps for later starts is for all
    source.check(expected_tensors(model))
    if parallel is not None:
        if parallel.rank == 0:
            parallel.wait_for_all()
        sharding = Sharding(config, parallel.rank, parallel.size)
        model, source = build(sharding), ShardedSource(source, sharding)
    if lora is not None:
        reserve_adapters(model, lora, kernels)
    fill(model, source, kernels, dtype=dtype, device=device)
    return model


def fill(
    model: nn.Module,
    source: WeightSource,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a model its weights; see `load_model`. It may have been built without any memory."""
    with torch.inference_mode():
        for path, module in model.named_modules():
            if isinstance(module, Linear):
                parts = module.parts(path)
                biases = [source.tensor(f"{part}.bias") for part in parts if module.has_bias]
                read = source.tensor if module.exact else source.matrix
                matrices = _alike((f"{part}.weight" for part in parts), read)
                if isinstance(module, ExpertLinear):
                    module.weight = kernels.pack_experts(module.spec, module.num_experts, matrices)
                else:
                    bias = torch.cat(biases) if biases else None
                    module.weight = kernels.pack(module.spec, matrices, bias)
            elif isinstance(module, RMSNorm):
                module.load(source.tensor(f"{path}.weight"), device)
            else:
                for name, _ in module.named_parameters(recurse=False):
                    tensor = source.tensor(f"{path}.{name}").to(device, dtype, copy=True)
                    setattr(module, name, nn.Parameter(tensor, requires_grad=False))


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
    if config.dummy_weights:
        return quantized_if_wanted(config, RandomWeights(config.seed, dtype), [])
    files = weight_files(directory)
    return quantized_if_wanted(config, Checkpoint(files), files)


def quantized_if_wanted(
    config: EngineConfig, source: WeightSource, files: Sequence[Path]
) -> WeightSource:
    """A source, or one that quantizes its matrices.

    Args:
        config: Says whether and how.
        source: Holds the weights unquantized.
        files: Where they come from, to find what is kept of an earlier start; none, nothing is.

    Raises:
        InvalidRequestError: `quantization` is no way to do that.
    """
    wanted = config.quantization
    if wanted is None:
        return source
    if wanted not in SCHEMES:
        raise InvalidRequestError(
            f"quantization={wanted!r} needs a checkpoint that is quantized so, and this one is "
            f"not; any can be quantized with {', '.join(SCHEMES)}",
            "quantization",
        )
    quantizing = QuantizingSource(source, wanted)
    return CachedSource(quantizing, files) if files else quantizing


def _alike(
    names: Iterable[str], read: Callable[[str], Tensor | QuantizedWeight]
) -> Iterator[Tensor | QuantizedWeight]:
    """Read the parts of one packed matrix, which must all be stored in the same way.

    Raises:
        InvalidRequestError: They are not.
    """
    first = None
    for name in names:
        matrix = read(name)
        form = _form(matrix)
        if first is None:
            first = name, form
        elif form != first[1]:
            raise InvalidRequestError(
                f"{first[0]} is {first[1]}, and {name} is {form}: they are packed into one matrix, "
                "or are experts of one layer, and must be quantized in the same way"
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


RANDOM_BLOCK = (1 << 20) + 7
"""Values drawn of a tensor, 2 MiB or four: a prime, so that no two rows of a matrix are the same
before as many rows as that."""


class RandomWeights:
    """Seeded values of the usual scales: norms 1, biases 0, matrices and embeddings uniform.

    Their standard deviation is 0.02 for the embedding of tokens and LeCun's `1 / sqrt(fan_in)`
    (LeCun et al. 1998, section 4.6) for matrices, so that these keep the scale of what they read.

    Each tensor has a generator of its own, so that it does not depend on the others. Of a large one
    only a block is drawn, and repeated: drawing is what would take the time.
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
        size = math.prod(shape)
        block = torch.empty(min(size, RANDOM_BLOCK), dtype=self._dtype)
        block.uniform_(-limit, limit, generator=generator)
        return block.repeat(-(-size // RANDOM_BLOCK))[:size].view(shape)

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        return self.tensor(name)
