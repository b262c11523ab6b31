"""What every runner does: KV memory, block tables, and one forward pass a step."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nanovllm.batch import Batch, Key, SlotStart, StepResult
from nanovllm.config import ResolvedConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import AttentionBatch, BlockTables, IntArray, to_device
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.lora import IndexedBatch, LoRABatch
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.adapters import AdapterTable
from nanovllm.models.sharding import Sharding
from nanovllm.runners.decode_graphs import PADDING, DecodeGraphs, RowOutputs
from nanovllm.runners.graphs import Capture, capture_sizes
from nanovllm.runners.memory import (
    PREFAULTED_BYTES,
    ModelShape,
    allocate_kv_cache,
    attention_config,
    fit_kv_cache,
    kv_cache_bytes,
)
from nanovllm.runners.voice_encoding import VoiceEncoding

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of a batch laid out for the device.

    Args:
        slots: Slot of each row, `[num_rows]`.
        starts: First position of each row, `[num_rows]`.
        lengths: Positions of each row, `[num_rows]`.
        ends: Position after each row's last, `[num_rows]`.
        last_tokens: Index of each row's last token, `[num_rows]`.
        emits: Whether a row yields a result, `[num_rows]`.
        token_slots: Slot of each token, on the device, `[num_tokens]`.
        positions: Position of each token, on the device, `[num_tokens]`.
        wanted: Index of the last token of each row that yields a result, on the device; None if
            there is no other token.
    """

    slots: IntArray
    starts: IntArray
    lengths: IntArray
    ends: IntArray
    last_tokens: IntArray
    emits: npt.NDArray[np.bool_]
    token_slots: Tensor
    positions: Tensor
    wanted: Tensor | None


class ModelRunner(ABC, Generic[ModelT]):
    """Owns a model, its KV cache and the tables indexed by slot; the only one to touch the device.

    Subclasses say what a slot holds, what is fed at a position and what becomes of the last one.
    A step is computed by rows: its decodes in a captured graph, if there are graphs, and the others
    one by one as they come; then the tail makes results of the last position of each.

    Args:
        model: The network, on its device.
        kernels: What it runs on.
        config: Options, resolved for the device.
        capture: Captures the decodes of steps; None runs them like the others.
        parallel: The ranks that have a part of the model each, and the same slots and blocks; None
            if all of it is here.
        sharding: The part of the model that is here.

    Attributes:
        num_kv_blocks: Blocks of the KV cache.
        max_model_len: Longest sequence, as wanted or as the blocks allow.
        adapters: The LoRA adapters, if there is room for them.
    """

    def __init__(
        self,
        model: ModelT,
        kernels: Kernels,
        config: ResolvedConfig,
        capture: Capture | None = None,
        parallel: TensorParallel | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.model, self.kernels = model, kernels
        self.device = next(model.parameters()).device
        self.block_size = config.block_size
        self._parallel = parallel
        shape = model.config
        self._backend = kernels.attention(attention_config(config, shape, kernels.dtype))
        block_bytes = self._backend.cache_spec(1).num_bytes * shape.num_layers
        if parallel is not None:
            parallel.wait_for_all()  # a rank that still loads may not have taken its memory yet
        self.num_kv_blocks, self.max_model_len = fit_kv_cache(
            config, shape, block_bytes, kv_cache_bytes(config, shape, self.device)
        )
        if parallel is not None:
            self.num_kv_blocks, self.max_model_len = parallel.minimum(
                self.num_kv_blocks, self.max_model_len
            )
        spec = self._backend.cache_spec(self.num_kv_blocks)
        self._kv_caches = [allocate_kv_cache(spec, self.device) for _ in range(shape.num_layers)]
        kernels.prefault(self._kv_caches, config.kv_cache_memory_bytes or PREFAULTED_BYTES)
        self._num_slots = config.max_num_seqs
        max_blocks = -(-self.max_model_len // self.block_size)
        # One more than there are slots, in this table and others: rows that only pad have it.
        self._block_tables = BlockTables.zeros(self._num_slots + 1, max_blocks, self.device)
        self.adapters: AdapterTable | None = None
        if config.lora is not None:
            self.adapters = AdapterTable(
                model.named_modules(),
                config.lora,
                self._num_slots,
                kernels,
                sharding,
            )
        self._graphs = None if capture is None else self._decode_graphs(capture, config)

    def capture(self) -> None:
        """Capture the graphs, before the first request."""
        with torch.inference_mode(), self.kernels.running():
            self._capture()

    def _capture(self) -> None:
        if self._graphs is not None:
            self._graphs.capture()

    def _decode_graphs(self, capture: Capture, config: ResolvedConfig) -> DecodeGraphs | None:
        sizes = capture_sizes(config.max_cudagraph_capture_size, self._num_slots)
        if not self._backend.capturable:
            logger.warning("decodes run without graphs: their attention backend cannot be captured")
        if not sizes or not self._backend.capturable:
            return None
        return DecodeGraphs(
            capture,
            sizes,
            self._backend,
            self._block_tables,
            self._new_outputs(sizes[-1]),
            self._captured_decodes,
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
        self._block_tables.append(batch.new_blocks)
        slots, starts, lengths = (
            np.array(column, dtype=np.int64)
            for column in (batch.slots, batch.starts, batch.lengths)
        )
        emits = np.array(batch.emits, dtype=np.bool_)
        num_captured = self._num_captured(batch)
        outputs = None
        if self._graphs is not None and num_captured:
            # First: they read nothing that the others write, who may read what they do.
            captured = slots[:num_captured]
            adapters = None if self.adapters is None else self.adapters.slots_of(captured)
            outputs = self._graphs.replay(captured, starts[:num_captured], adapters)
        if num_captured < len(slots):
            of = slice(num_captured, None)
            rest = self._lay_out(slots[of], starts[of], lengths[of], emits[of])
            others = self._compute(rest, self._rows_context(rest))
            if others is not None:
                outputs = self._graphs.extend(num_captured, others) if self._graphs else others
        return self._tail(outputs, slots[emits], (starts + lengths)[emits])

    def _num_captured(self, batch: Batch) -> int:
        """How many rows, from the first on, a graph computes."""
        if self._graphs is None or batch.num_decodes > self._graphs.max_rows:
            return 0
        return batch.num_decodes

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

    def close(self) -> None:
        """End what does not end by itself."""

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
    def _new_outputs(self, num_rows: int) -> RowOutputs:
        """Room for what `_compute` yields of so many rows."""

    @abstractmethod
    def _compute(self, rows: StepRows, ctx: ForwardContext) -> RowOutputs | None:
        """Run the model; returns what the tail needs of the rows that emit, None if none does."""

    @abstractmethod
    def _compute_decodes(self, slots: Tensor, positions: Tensor, ctx: ForwardContext) -> RowOutputs:
        """The same for rows of one position each, so that it can be captured.

        Args:
            slots: Slot of each row, on the device, `[num_rows]`.
            positions: Its position, `PADDING` for rows that are to write nothing.
            ctx: The step.
        """

    @abstractmethod
    def _tail(self, outputs: RowOutputs | None, slots: IntArray, ends: IntArray) -> Any:
        """Turn the outputs of the rows that emit into results; returns a handle.

        Args:
            outputs: What `_compute` returned, in the buffers of `_graphs` if there are graphs and
                no more rows than those hold; None if no row emits.
            slots: Slots of the rows, `[num_rows]`.
            ends: Position after each row's last, `[num_rows]`.
        """

    def _lay_out(
        self, slots: IntArray, starts: IntArray, lengths: IntArray, emits: npt.NDArray[np.bool_]
    ) -> StepRows:
        token_ends = lengths.cumsum()
        shifts = np.repeat(starts - (token_ends - lengths), lengths)
        last_tokens = token_ends - 1
        wanted = last_tokens[emits]
        return StepRows(
            slots=slots,
            starts=starts,
            lengths=lengths,
            ends=starts + lengths,
            last_tokens=last_tokens,
            emits=emits,
            token_slots=self._to_device(np.repeat(slots, lengths)),
            positions=self._to_device(np.arange(len(shifts)) + shifts),
            wanted=self._to_device(wanted) if len(wanted) < len(shifts) else None,
        )

    def _rows_context(self, rows: StepRows) -> ForwardContext:
        batch = AttentionBatch.of(rows.starts, rows.lengths, rows.slots, self._block_tables)
        size = self.block_size
        blocks = self._block_tables.device[rows.token_slots, rows.positions // size]
        return self._context(
            blocks * size + rows.positions % size,
            self._backend.plan(batch),
            self._adapters_of(np.repeat(rows.slots, rows.lengths)),
        )

    def _captured_decodes(
        self, slots: Tensor, positions: Tensor, plan: Any, adapters: Tensor | None
    ) -> RowOutputs:
        """What `DecodeGraphs` captures."""
        size = self.block_size
        blocks = self._block_tables.device[slots, positions.clamp(min=0) // size]
        cache_slots = torch.where(positions < 0, PADDING, blocks * size + positions % size)
        lora = None if adapters is None else IndexedBatch(adapters)
        ctx = self._context(cache_slots, plan, lora)
        return self._compute_decodes(slots, positions, ctx)

    def _context(self, cache_slots: Tensor, plan: Any, lora: LoRABatch | None) -> ForwardContext:
        return ForwardContext(
            kernels=self.kernels,
            backend=self._backend,
            kv_caches=self._kv_caches,
            cache_slots=cache_slots,
            attention=plan,
            lora=lora,
            parallel=self._parallel,
        )

    def _adapters_of(self, slots: IntArray) -> LoRABatch | None:
        """Which adapters rows go through that belong to these slots."""
        return None if self.adapters is None else self.adapters.batch(slots)

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return to_device(array, self.device)
