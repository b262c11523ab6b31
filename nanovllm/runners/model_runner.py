"""What every runner does: KV memory, block tables, and one forward pass a step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nanovllm.batch import Batch, Key, SlotStart, StepResult
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import AttentionBatch, IntArray
from nanovllm.kernels.kernels import Kernels
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.lora import LoRABatch
from nanovllm.models.adapters import AdapterTable
from nanovllm.runners.memory import (
    ModelShape,
    allocate_kv_cache,
    attention_config,
    fit_kv_cache,
    kv_cache_bytes,
)
from nanovllm.runners.voice_encoding import VoiceEncoding


class PagedModel(Protocol):
    """A network with a KV cache, as far as runners of all kinds look at it."""

    @property
    def config(self) -> ModelShape:
        """Its hyper-parameters."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters; the first says where it is, and in which dtype."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Its layers, by their paths in the checkpoint."""


ModelT = TypeVar("ModelT", bound=PagedModel)
HiddenT = TypeVar("HiddenT")
"""What a forward pass leaves for the tail."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """A batch laid out for the device.

    Args:
        slots: Slot of each row, `[num_rows]`.
        starts: First position of each row, `[num_rows]`.
        lengths: Positions of each row, `[num_rows]`.
        ends: Position after each row's last, `[num_rows]`.
        last_tokens: Index of each row's last token in the step, `[num_rows]`.
        emits: Whether a row yields a result, `[num_rows]`.
        token_slots: Slot of each token, on the device, `[num_tokens]`.
        positions: Position of each token, on the device, `[num_tokens]`.
    """

    slots: IntArray
    starts: IntArray
    lengths: IntArray
    ends: IntArray
    last_tokens: IntArray
    emits: npt.NDArray[np.bool_]
    token_slots: Tensor
    positions: Tensor


class ModelRunner(ABC, Generic[ModelT, HiddenT]):
    """Owns a model, its KV cache and the tables indexed by slot; the only one to touch the device.

    Subclasses say what a slot holds, what is fed at a position and what becomes of the last one.

    Args:
        model: The network, on its device.
        kernels: What it runs on.
        config: Options, resolved for the device.

    Attributes:
        num_kv_blocks: Blocks of the KV cache.
        max_model_len: Longest sequence, as wanted or as the blocks allow.
        adapters: The LoRA adapters, if there is room for them.
    """

    def __init__(self, model: ModelT, kernels: Kernels, config: EngineConfig) -> None:
        weight = next(model.parameters())
        self.model, self.kernels, self.device = model, kernels, weight.device
        self.block_size = config.block_size or 1
        shape = model.config
        self._backend = kernels.attention(attention_config(config, shape, weight.dtype))
        block_bytes = self._backend.cache_spec(1).num_bytes * shape.num_layers
        self.num_kv_blocks, self.max_model_len = fit_kv_cache(
            config, shape, block_bytes, kv_cache_bytes(config, shape, self.device)
        )
        spec = self._backend.cache_spec(self.num_kv_blocks)
        self._kv_caches = [allocate_kv_cache(spec, self.device) for _ in range(shape.num_layers)]
        num_slots = config.max_num_seqs or 1
        max_blocks = -(-self.max_model_len // self.block_size)
        self._block_tables = torch.zeros(
            num_slots, max_blocks, dtype=torch.int64, device=self.device
        )
        self.adapters: AdapterTable | None = None
        if config.lora is not None:
            self.adapters = AdapterTable(
                model.named_modules(), config.lora, num_slots, weight.dtype, self.device
            )

    def launch(self, batch: Batch) -> Any:
        """Start a step: apply the slots' changes, run the model, then the tail of the rows.

        Returns:
            A handle for `collect`.
        """
        with torch.inference_mode(), self.kernels.running():
            return self._launch(batch)

    def _launch(self, batch: Batch) -> Any:
        for slot in batch.released:
            self._release_slot(slot)
            if self.adapters is not None:
                self.adapters.release(slot)
        for start in batch.started:
            if self.adapters is not None:
                self.adapters.start(start.slot, start.adapter_id)
            self._start_slot(start)
        for slot, index, block_ids in batch.new_blocks:
            self._block_tables[slot, index : index + len(block_ids)] = torch.tensor(
                block_ids, device=self.device
            )
        rows = self._lay_out(batch)
        ctx = self._context(rows)
        return self._tail(self._forward(rows, ctx), rows, ctx)

    def check(self, keys: Sequence[Key], payload: object) -> None:
        """See that a sequence can start: in a step it would take others along.

        Args:
            keys: The prompt's keys.
            payload: What goes to the runner with them.

        Raises:
            InvalidRequestError: It cannot; the message says why.
        """

    def encode(self, audio: bytes) -> VoiceEncoding:  # noqa: ARG002
        """Begin to encode a recording.

        Raises:
            InvalidRequestError: This model encodes none, or the recording cannot be used.
        """
        raise InvalidRequestError("this model encodes no audio")

    @abstractmethod
    def collect(self, handle: Any) -> list[StepResult]:
        """Wait for a step and return one result for each row that emits, in row order."""

    @abstractmethod
    def _start_slot(self, start: SlotStart) -> None:
        """Set up everything a sequence owns here, whatever the slot held before."""

    @abstractmethod
    def _release_slot(self, slot: int) -> None:
        """Drop what a slot holds; the slot may never have started if its step failed."""

    @abstractmethod
    def _forward(self, rows: StepRows, ctx: ForwardContext) -> HiddenT:
        """Run the model; returns hidden states, each `[num_tokens, hidden_size]`."""

    @abstractmethod
    def _tail(self, hidden: HiddenT, rows: StepRows, ctx: ForwardContext) -> Any:
        """Turn the last hidden states of the rows that emit into results; returns a handle."""

    def _lay_out(self, batch: Batch) -> StepRows:
        slots, starts, lengths = (
            np.array(column, dtype=np.int64)
            for column in (batch.slots, batch.starts, batch.lengths)
        )
        token_ends = lengths.cumsum()
        shifts = np.repeat(starts - (token_ends - lengths), lengths)
        return StepRows(
            slots=slots,
            starts=starts,
            lengths=lengths,
            ends=starts + lengths,
            last_tokens=token_ends - 1,
            emits=np.array(batch.emits, dtype=np.bool_),
            token_slots=self._to_device(np.repeat(slots, lengths)),
            positions=self._to_device(np.arange(len(shifts)) + shifts),
        )

    def _context(self, rows: StepRows) -> ForwardContext:
        size = self.block_size
        blocks = self._block_tables[rows.token_slots, rows.positions // size]
        num_blocks = -(-int(rows.ends.max()) // size)
        tables = self._block_tables[self._to_device(rows.slots), :num_blocks]
        plan = self._backend.plan(AttentionBatch(rows.starts, rows.lengths, tables))
        return ForwardContext(
            kernels=self.kernels,
            backend=self._backend,
            kv_caches=self._kv_caches,
            cache_slots=blocks * size + rows.positions % size,
            attention=plan,
            lora=self._adapters_of(np.repeat(rows.slots, rows.lengths)),
        )

    def _adapters_of(self, slots: IntArray) -> LoRABatch | None:
        """Which adapters rows go through that belong to these slots."""
        return None if self.adapters is None else self.adapters.batch(slots)

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return to_device(array, self.device)


class HostCopies:
    """Results on their way to the host, copied while later steps already run.

    Args:
        tensors: The results.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Into pinned memory, which torch allocates for copies that do not block.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[npt.NDArray[Any]]:
        """The results, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [copy.numpy() for copy in self._copies]


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy a host array to the device, without waiting for it where the device allows."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
