"""The LoRA adapters of a model: where they sit, which there are, which are on the device."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.lora import NO_ADAPTER, IntArray, LoRABatch
from nanovllm.layers.experts import ExpertLinear
from nanovllm.layers.linear import Linear, PackedLinear
from nanovllm.layers.lora import LoRATable, PartWeights
from nanovllm.lora_config import LoRAConfig
from nanovllm.models.adapter_files import AdapterFiles, read_adapter_files
from nanovllm.models.sharding import Sharding

LM_ROOTS = ("base_lm.layers.", "residual_lm.layers.", "model.layers.")
"""The two of a model that speaks, and the one of a model that writes."""
DIT_ROOT = "feat_decoder.estimator."

Adapter = dict[str, PartWeights]
"""What an adapter is to each projection that it changes, on the host."""


def reserve_adapters(model: nn.Module, config: LoRAConfig, kernels: Kernels) -> None:
    """Take the memory for a model's adapters; called before its weights are packed.

    Args:
        model: The network; linear layers that may have adapters get their tables.
        config: Which these are, and how much room there is.
        kernels: What it runs on.

    Raises:
        InvalidRequestError: No layer may have any.
    """
    num_tables = 0
    for path, module in model.named_modules():
        if not isinstance(module, Linear) or isinstance(module, ExpertLinear):
            continue
        first, parts = 0, {}
        for part, width in module.parts(path).items():
            if _allows(config, part):
                parts[part] = slice(first, first + width)
            first += width
        if parts:
            if isinstance(module, PackedLinear):
                module.unfuse()
            num_tables += 1
            module.lora = LoRATable(
                module.spec, parts, config.max_loras, config.max_lora_rank, kernels
            )
    if not num_tables:
        raise InvalidRequestError(
            "by the engine's options no layer of this model may have an adapter, and experts take "
            "none: see lora_enable_lm, lora_target_modules_lm and the like, or leave out "
            "enable_lora",
            "enable_lora",
        )


def _allows(config: LoRAConfig, part: str) -> bool:
    """Whether a projection, by its path in the checkpoint, may have adapters."""
    name = part.rpartition(".")[2]
    if part.startswith(LM_ROOTS):
        return config.enable_lm and name in config.target_modules_lm
    if part.startswith(DIT_ROOT):
        return config.enable_dit and name in config.target_modules_dit
    return config.enable_proj and part in config.target_proj_modules


class AdapterTable:
    """The adapters that can be used, on the host, and those in use, in slots on the device.

    There are at most `max_loras` different ones in use at a time; that is the scheduler's to see
    to. A slot whose adapter is not in use keeps it until another one needs the room; what has not
    been used for the longest time goes first.

    Args:
        modules: The network's layers by path, after `reserve_adapters`.
        config: What that was told.
        num_seq_slots: Slots of running sequences.
        kernels: What it runs on.
        sharding: The part of the model that is here; None is all.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        config: LoRAConfig,
        num_seq_slots: int,
        kernels: Kernels,
        sharding: Sharding | None = None,
    ) -> None:
        self._config, self._kernels = config, kernels
        self._sharding = sharding
        linears = [(p, m) for p, m in modules if isinstance(m, Linear)]
        self._projections = {part for path, linear in linears for part in linear.parts(path)}
        self._tables = [linear.lora for _, linear in linears if linear.lora is not None]
        self._table_of = {part: table for table in self._tables for part in table.parts}
        self._adapters: dict[int, Adapter] = {}
        self._known_ids: set[int] = set()
        # What each slot holds, the least recently used first.
        self._held: dict[int, int | None] = dict.fromkeys(range(config.max_loras))
        self._slots: IntArray = np.full(num_seq_slots, NO_ADAPTER, dtype=np.int64)

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._adapters

    def load(self, adapter_id: int, directory: Path) -> list[str]:
        """Read an adapter from a directory.

        Args:
            adapter_id: Its id, which no adapter had before.
            directory: Holds it as PEFT or VoxCPM's training writes it; see `adapter_files`.

        Returns:
            The names of its tensors.

        Raises:
            InvalidRequestError: There is no adapter in the directory, or it does not fit the model
                or the options; the message says why.
        """
        if adapter_id in self._known_ids:
            raise InvalidRequestError(f"the adapter id {adapter_id} has been used before")
        files = read_adapter_files(directory)
        self._adapters[adapter_id] = self._fit(files)
        self._known_ids.add(adapter_id)
        return sorted(files.tensors)

    def unload(self, adapter_id: int) -> None:
        """Forget an adapter that no open sequence uses; one that is not known does not matter."""
        self._adapters.pop(adapter_id, None)
        for slot, held in list(self._held.items()):
            if held == adapter_id:
                del self._held[slot]
                self._held = {slot: None, **self._held}
                # Slots of sequences that have ended may still say so, until the next step.
                self._slots[self._slots == slot] = NO_ADAPTER

    def start(self, seq_slot: int, adapter_id: int | None) -> None:
        """Note which adapter the sequence in a slot uses, and bring it onto the device.

        Raises:
            InvalidRequestError: The adapter is not loaded.
        """
        self._slots[seq_slot] = NO_ADAPTER  # whatever was there gives its room up
        if adapter_id is not None:
            self._slots[seq_slot] = self.slot_of(adapter_id)

    def release(self, seq_slot: int) -> None:
        """Note that the sequence in a slot uses none any more."""
        self._slots[seq_slot] = NO_ADAPTER

    def slots_of(self, seq_slots: IntArray) -> IntArray | None:
        """Adapter slots of rows, by their sequences' slots `[num_rows]`; None if no row has one."""
        slots = self._slots[seq_slots]
        return slots if (slots != NO_ADAPTER).any() else None

    def batch(self, seq_slots: IntArray) -> LoRABatch | None:
        """Which rows go through which adapter, by their sequences' slots `[num_rows]`."""
        slots = self.slots_of(seq_slots)
        return None if slots is None else self._kernels.lora_batch(slots)

    def slot_of(self, adapter_id: int) -> int:
        """The slot that holds an adapter, after bringing it there if none did.

        Raises:
            InvalidRequestError: The adapter is not loaded.
            RuntimeError: All slots are in use.
        """
        if adapter_id not in self._adapters:
            raise InvalidRequestError(f"the adapter with id {adapter_id} is not loaded")
        slot = next((slot for slot, held in self._held.items() if held == adapter_id), None)
        if slot is None:
            slot = self._unused_slot()
            self._held[slot] = None  # while it holds a part of each
            with torch.inference_mode():
                self._put(slot, self._adapters[adapter_id])
        del self._held[slot]
        self._held[slot] = adapter_id
        return slot

    def _unused_slot(self) -> int:
        in_use = set(self._slots.tolist())
        for slot in self._held:
            if slot not in in_use:
                return slot
        raise RuntimeError(f"all {len(self._held)} adapter slots are in use")

    def _put(self, slot: int, adapter: Adapter) -> None:
        for table in self._tables:
            table.put(slot, {part: adapter[part] for part in table.parts if part in adapter})

    def _fit(self, files: AdapterFiles) -> Adapter:
        """Hold an adapter to the model, and bring it into the form of the tables."""
        settings, adapter = files.settings, {}
        for part, (down, up) in self._pairs(files.tensors).items():
            rank = settings.rank_of(part)
            rank = down.shape[0] if rank is None and down.ndim == 2 else rank or 0
            if not 1 <= rank <= self._config.max_lora_rank:
                raise InvalidRequestError(
                    f"the LoRA's matrices of {part} are of rank {rank}: it must be 1 to "
                    f"max_lora_rank={self._config.max_lora_rank}, with which the engine was "
                    "started",
                    "path",
                )
            adapter[part] = self._weights(part, down, up, rank, settings.scale_of(part, rank))
        return adapter

    def _pairs(self, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each projection, all of which may have adapters."""
        for name in tensors:
            part, _, matrix = name.rpartition(".")
            if matrix not in ("lora_A", "lora_B") or part not in self._projections:
                raise InvalidRequestError(
                    f"the LoRA has a tensor {name}, which belongs to no linear layer of the "
                    "model: <module>.lora_A and <module>.lora_B are expected",
                    "path",
                )
            if ".experts." in part:
                raise InvalidRequestError(
                    f"the LoRA changes {part}: adapters of experts are not supported; train one "
                    "of the attention's projections instead",
                    "path",
                )
            if part not in self._table_of:
                allowed = sorted({known.rpartition(".")[2] for known in self._table_of})
                raise InvalidRequestError(
                    f"the LoRA changes {part}, which the engine's options do not allow: what may "
                    f"be changed is {', '.join(allowed)}; see lora_enable_lm, "
                    "lora_target_modules_lm and the like",
                    "path",
                )
        parts = sorted({name.rpartition(".")[0] for name in tensors})
        missing = [
            f"{p}.{m}" for p in parts for m in ("lora_A", "lora_B") if f"{p}.{m}" not in tensors
        ]
        if missing:
            raise InvalidRequestError(f"the LoRA has no tensor {missing[0]}", "path")
        return {part: (tensors[f"{part}.lora_A"], tensors[f"{part}.lora_B"]) for part in parts}

    def _weights(self, part: str, down: Tensor, up: Tensor, rank: int, scale: float) -> PartWeights:
        table = self._table_of[part]
        columns = table.parts[part]
        width, depth = columns.stop - columns.start, table.depth
        if self._sharding is not None:
            width, depth = self._sharding.whole(part, width, depth)
        for name, matrix, shape in (
            ("lora_A", down, (rank, depth)),
            ("lora_B", up, (width, rank)),
        ):
            if tuple(matrix.shape) != shape or not matrix.is_floating_point():
                raise InvalidRequestError(
                    f"{part}.{name} is {matrix.dtype} of shape {list(matrix.shape)}, and the model "
                    f"needs floats of shape {list(shape)}",
                    "path",
                )
        if self._sharding is not None:
            down, up = self._sharding.adapter(part, down, up)
        dtype = self._kernels.dtype
        weights = PartWeights(down.to(dtype, copy=True), (up.float() * scale).to(dtype))
        if not all(bool(matrix.isfinite().all()) for matrix in weights):
            raise InvalidRequestError(f"the LoRA's matrices of {part} are not finite", "path")
        return weights
