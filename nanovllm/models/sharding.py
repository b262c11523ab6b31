"""Which part of a model's weights each rank of a tensor-parallel group has.

Shoeybi et al. 2019, section 3: heads and the MLP's width are shared out, so that a layer needs two
sums over the ranks, behind `o_proj` and behind `down_proj`; so is the vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.layers.parallel import part_of
from nanovllm.models.checkpoint import WeightSource
from nanovllm.models.model_config import ModelConfig

LEAST_GROUP = 32
"""Columns of a group of quantized weights; the kernels have no smaller ones."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank takes of something, in order.

    Args:
        total: How much there is of it.
        pieces: The pieces it takes; one may be there twice.
    """

    total: int
    pieces: tuple[range, ...]

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Take that of a tensor's dimension; a view of it where that is possible."""
        parts = [tensor.narrow(dim, piece.start, len(piece)) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Part(NamedTuple):
    """What becomes of the matrix `[rows, depth]` of a linear layer; None is left whole.

    Args:
        rows: Of its outputs.
        depth: Of its inputs: then its outputs have to be summed over the ranks.
    """

    rows: Cut | None = None
    depth: Cut | None = None


class Sharding:
    """One rank's part of a model.

    Each rank has the same number of query heads. A key head is on every rank that has queries of
    its group: so it is there several times if there are more ranks than key heads, or if they
    cannot be shared out evenly.

    Args:
        config: The whole model.
        rank: Number of this rank, from 0.
        size: How many there are.

    Attributes:
        local: The model as this rank has it, but for its vocabulary.
        vocab: The ids whose embeddings it has.

    Raises:
        InvalidRequestError: The heads cannot be shared out evenly, or there is too little else.
    """

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        if config.num_heads % size:
            raise InvalidRequestError(
                f"tensor_parallel_size={size} does not divide the model's {config.num_heads} "
                "query heads: each device needs the same number of them",
                "tensor_parallel_size",
            )
        mixture = config.mixture
        mlp_size = config.intermediate_size
        narrowest = mlp_size if mixture is None else min(mlp_size, mixture.expert_size)
        if min(narrowest, config.vocab_size) < size:
            raise InvalidRequestError(
                f"tensor_parallel_size={size} is more than the width of the model's MLP, "
                f"{narrowest}, or its vocabulary, {config.vocab_size}",
                "tensor_parallel_size",
            )
        self._rank = rank
        num_heads = config.num_heads // size
        heads = range(rank * num_heads, (rank + 1) * num_heads)
        mlp = part_of(mlp_size, rank, size)
        self.vocab = part_of(config.vocab_size, rank, size)
        kv_heads = local_kv_heads(heads, config.num_heads // config.num_kv_heads)
        self.local = replace(
            config, num_heads=num_heads, num_kv_heads=len(kv_heads), intermediate_size=len(mlp)
        )
        self._expert_parts: Mapping[str, Part] = {}
        if mixture is not None:
            expert = part_of(mixture.expert_size, rank, size)
            self.local = replace(self.local, mixture=replace(mixture, expert_size=len(expert)))
            self._expert_parts = _mlp_parts(Cut(mixture.expert_size, (expert,)))
        queries = _cut_heads(list(heads), config.num_heads, config.head_dim)
        keys = _cut_heads(kv_heads, config.num_kv_heads, config.head_dim)
        vocab = Cut(config.vocab_size, (self.vocab,))
        self._parts: Mapping[str, Part] = {
            "q_proj": Part(rows=queries),
            "k_proj": Part(rows=keys),
            "v_proj": Part(rows=keys),
            "o_proj": Part(depth=queries),
            "embed_tokens": Part(rows=vocab),
            "lm_head": Part(rows=vocab),
            **_mlp_parts(Cut(mlp_size, (mlp,))),
        }

    def part(self, path: str) -> Part:
        """This rank's part of a linear layer, by its path in the checkpoint."""
        parts = self._expert_parts if ".experts." in path else self._parts
        return parts.get(path.rpartition(".")[2], Part())

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor of the checkpoint, by its name."""
        module, _, kind = name.rpartition(".")
        part = self.part(module)
        if part.depth is not None and kind == "bias":
            return tensor if self._rank == 0 else torch.zeros_like(tensor)  # summed up it is there
        if part.rows is not None:
            tensor = part.rows.of(tensor, 0)
        return tensor if part.depth is None else part.depth.of(tensor, 1)

    def matrix(self, name: str, matrix: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
        """The same of a matrix that may be quantized.

        Raises:
            InvalidRequestError: It would have to be cut within groups that are too small for that.
        """
        if not isinstance(matrix, QuantizedWeight):
            return self.tensor(name, matrix)
        part = self.part(name.rpartition(".")[0])
        if part.rows is not None:
            matrix = _rows_of(matrix, part.rows)
        return matrix if part.depth is None else _columns_of(name, matrix, part.depth)

    def whole(self, path: str, width: int, depth: int) -> tuple[int, int]:
        """Outputs and inputs of a layer in the whole model, which has so many of them here."""
        part = self.part(path)
        return (
            width if part.rows is None else part.rows.total,
            depth if part.depth is None else part.depth.total,
        )

    def adapter(self, path: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The same of an adapter's A `[rank, depth]` and B `[width, rank]`."""
        rows, depth = self.part(path)
        return (
            down if depth is None else depth.of(down, 1),
            up if rows is None else rows.of(up, 0),
        )


class ShardedSource:
    """One rank's part of another source; the other one has been checked.

    Args:
        source: Holds the whole model.
        sharding: Says which part.
    """

    def __init__(self, source: WeightSource, sharding: Sharding) -> None:
        self._source, self._sharding = source, sharding

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._source.check(expected)

    def tensor(self, name: str) -> Tensor:
        return self._sharding.tensor(name, self._source.tensor(name))

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        return self._sharding.matrix(name, self._source.matrix(name))


def local_kv_heads(heads: range, group_size: int) -> list[int]:
    """The key heads for some query heads, each of them for equally many.

    Args:
        heads: Query heads that follow one another; the first is a multiple of their number.
        group_size: Query heads for each key head of the model.
    """
    shared = math.gcd(group_size, len(heads))
    return [head // group_size for head in heads[::shared]]


def _mlp_parts(width: Cut) -> dict[str, Part]:
    """The parts of an MLP's layers, which share out its width."""
    rows = Part(rows=width)
    return {"gate_proj": rows, "up_proj": rows, "down_proj": Part(depth=width)}


def _cut_heads(heads: list[int], num_heads: int, head_dim: int) -> Cut:
    """The rows of some heads, in one piece if they follow one another."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        pieces = [range(heads[0], heads[-1] + 1)]
    else:
        pieces = [range(head, head + 1) for head in heads]
    rows = tuple(range(piece.start * head_dim, piece.stop * head_dim) for piece in pieces)
    return Cut(num_heads * head_dim, rows)


def _rows_of(weight: QuantizedWeight, cut: Cut) -> QuantizedWeight:
    zeros = None if weight.zeros is None else cut.of(weight.zeros, 0)
    codes, scales = cut.of(weight.codes, 0), cut.of(weight.scales, 0)
    return replace(weight, codes=codes, scales=scales, zeros=zeros)


def _columns_of(name: str, weight: QuantizedWeight, cut: Cut) -> QuantizedWeight:
    """Some columns; groups that are cut become several with the same scale."""
    (columns,) = cut.pieces
    depth = weight.codes.shape[1]
    codes = cut.of(weight.codes, 1)
    if weight.group_size >= depth:
        return replace(weight, codes=codes, group_size=len(columns))
    ends = [end for end in (columns.start, columns.stop) if end < depth]
    size = math.gcd(weight.group_size, *ends)
    if size < LEAST_GROUP:
        odd = next(end for end in ends if end % LEAST_GROUP)
        raise InvalidRequestError(
            f"{name} is quantized in groups of {weight.group_size} columns, and this "
            f"tensor_parallel_size cuts it at {odd}: take fewer devices, or 8 bits",
            "tensor_parallel_size",
        )
    groups = slice(columns.start // size, -(-columns.stop // size))

    def of_groups(values: Tensor) -> Tensor:
        return values.repeat_interleave(weight.group_size // size, 1)[:, groups]

    zeros = None if weight.zeros is None else of_groups(weight.zeros)
    return replace(
        weight, codes=codes, scales=of_groups(weight.scales), zeros=zeros, group_size=size
    )
