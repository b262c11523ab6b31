"""LoRA adapters of an engine in this process, by the ids that its program gives them."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import InvalidRequestError
from nanovllm.lora_config import LoRARequest
from nanovllm.models.adapters import AdapterTable
from nanovllm.runners.parallel import ParallelAdapters

LoRARequests = LoRARequest | Sequence[LoRARequest | None] | None


class LocalAdapters:
    """Adapters that are loaded when a request first names them.

    An id that was removed may be given to another adapter. The engine never sees it again: its own
    ids count up, so that nothing that was computed with an adapter is ever taken for another's.

    Args:
        engine: The engine.
        table: Its runner's adapters; None if it has no room for any.
    """

    def __init__(self, engine: LLMEngine, table: AdapterTable | ParallelAdapters | None) -> None:
        self._engine = engine
        self._table = table
        self._known: dict[int, tuple[LoRARequest, int]] = {}
        self._next_id = 1

    @property
    def ids(self) -> set[int]:
        return set(self._known)

    def id_of(self, request: LoRARequest | None) -> int | None:
        """The engine's id of an adapter, which is loaded unless it is there; None is none.

        Raises:
            InvalidRequestError: Another one has its id, it cannot be read or does not fit, or the
                engine takes none.
        """
        if request is None:
            return None
        if not isinstance(request, LoRARequest):
            raise InvalidRequestError(
                f"lora_request must be a LoRARequest, got {request!r:.80}", "lora_request"
            )
        if self._table is None:
            raise InvalidRequestError(
                "this LLM takes no LoRA adapters: build it with enable_lora=True", "lora_request"
            )
        known, adapter_id = self._known.get(request.lora_int_id, (request, self._next_id))
        if known != request:
            raise InvalidRequestError(
                f"lora_int_id {request.lora_int_id} is that of {known.lora_name!r} from "
                f"{known.lora_path}: give each adapter its own, or remove that one before",
                "lora_request",
            )
        if request.lora_int_id not in self._known:
            self._table.load(adapter_id, Path(request.lora_path))
            self._known[request.lora_int_id] = request, adapter_id
            self._next_id += 1
        return adapter_id

    def add(self, request: LoRARequest) -> bool:
        """Load an adapter; False if it is there already.

        Raises:
            InvalidRequestError: See `id_of`.
        """
        num_known = len(self._known)
        self.id_of(request)
        return len(self._known) > num_known

    def remove(self, lora_int_id: int) -> bool:
        """Forget an adapter; False if it is not known.

        Raises:
            InvalidRequestError: A request still uses it.
        """
        if self._table is None or lora_int_id not in self._known:
            return False
        request, adapter_id = self._known[lora_int_id]
        scheduler = self._engine.scheduler
        if any(seq.adapter_id == adapter_id for seq in chain(scheduler.running, scheduler.waiting)):
            raise InvalidRequestError(
                f"LoRA {request.lora_name!r} is in use: let its requests end or abort them",
                "lora_int_id",
            )
        del self._known[lora_int_id]
        self._table.unload(adapter_id)
        return True

    def for_each(self, requests: LoRARequests, num_prompts: int) -> list[LoRARequest | None]:
        """Load the adapters of some prompts, given one for all or one for each.

        Returns:
            One a prompt.

        Raises:
            InvalidRequestError: There are more or fewer than prompts, or see `id_of`.
        """
        if requests is None or isinstance(requests, LoRARequest):
            requests = [requests] * num_prompts
        if not isinstance(requests, Sequence) or len(requests) != num_prompts:
            raise InvalidRequestError(
                f"lora_request must be one LoRARequest or one for each of {num_prompts} prompts, "
                f"got {requests!r:.80}",
                "lora_request",
            )
        for request in requests:
            self.id_of(request)
        return list(requests)
