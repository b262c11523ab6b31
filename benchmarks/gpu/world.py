"""What every section is given: the device, sizes, and where its figures go."""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers.checkpoint import SHAPES, Shape

from gpu.figures import Recorder
from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.select import select_kernels

TINY = Shape(64, 2, 4, 96, num_key_value_heads=2, head_dim=32, vocab_size=512)


class Model(NamedTuple):
    """A Qwen3 without weights.

    Args:
        shape: Its dimensions.
        tied: Whether the output layer is the embedding.
    """

    shape: Shape
    tied: bool = True

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights, in bf16: all linear layers and the output layer."""
        return 2 * (self.shape.num_layer_weights + self.shape.num_embedding_weights)


MODELS = {
    "0.6b": Model(SHAPES["0.6b"]),
    "8b": Model(Shape(4096, 36, 32, 12288), tied=False),
}


@dataclass(frozen=True, slots=True)
class World:
    """Where a section runs.

    Args:
        device: What is measured.
        tiny: Whether sizes are toys, to see that all runs.
        directory: For checkpoints, which are a `config.json` each.
        record: Takes the figures.
        limit: Seconds after which the section is stopped.
    """

    device: torch.device
    tiny: bool
    directory: Path
    record: Recorder
    limit: float

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def model(self, name: str) -> Model:
        return MODELS[name]._replace(shape=TINY) if self.tiny else MODELS[name]

    def options(self, name: str, **more: Any) -> dict[str, Any]:
        """Options of an engine with random weights of a model."""
        model = self.model(name)
        directory = self.directory / name
        directory.mkdir(parents=True, exist_ok=True)
        config = model.shape.config | {"tie_word_embeddings": model.tied}
        (directory / "config.json").write_text(json.dumps(config))
        given = {"model": str(directory), "dummy_weights": True, "device": self.device.type}
        if self.tiny:
            given |= {"num_kv_blocks": 256, "max_num_seqs": 64, "cpu_threads": 1}
        return given | {"dtype": "bfloat16"} | more

    @contextmanager
    def engine(self, name: str, **more: Any) -> Iterator[LLM]:
        """An engine, of which nothing stays on the device."""
        try:
            with LLM(**self.options(name, **more)) as llm:
                yield llm
            del llm
        finally:
            self.free()

    def free(self) -> None:
        """Give back what nobody uses any more."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def kernels(self) -> Kernels:
        """The kernels that an engine would run on here."""
        config = EngineConfig(device=self.device.type, cpu_threads=1 if self.tiny else None)
        resolved = config.resolved_for(self.device.type)
        return select_kernels(resolved, self.device, torch.bfloat16)

    def missing_option(self, **options: Any) -> str | None:
        """Why an engine cannot be told these options here; None if it can."""
        known = {option.name for option in fields(EngineConfig)}
        if unknown := options.keys() - known:
            return f"there is no option {', '.join(sorted(unknown))}"
        if not self.on_cuda and options.keys() & {"enforce_eager", "compile_model"}:
            return f"no graphs are captured and nothing is compiled on {self.device.type}"
        return None


def random_ids(num_ids: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids of a prompt that no cache knows."""
    generator = torch.Generator().manual_seed(seed)
    high = min(10_000, vocab_size)
    ids: list[int] = torch.randint(1, high, (num_ids,), generator=generator).tolist()
    return ids


def percentile(values: list[float], share: float) -> float:
    """The least value that this share of the others does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
