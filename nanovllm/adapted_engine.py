"""What `AsyncLLM` and `AsyncSpeech` share besides: LoRA adapters that requests name."""

from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager

from nanovllm.adapter_registry import AdapterRegistry
from nanovllm.async_engine import AsyncEngine, Observer
from nanovllm.cluster.worker import Worker
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.request_stream import OutputT
from nanovllm.worker.messages import LoadAdapter, UnloadAdapter


class AdaptedEngine(AsyncEngine[OutputT]):
    """An `AsyncEngine` with adapters, which all its engine processes have under the same ids."""

    def _init(
        self,
        engine: EngineConfig,
        pool: PoolConfig,
        observer: Observer[OutputT] | None,
    ) -> None:
        super()._init(engine, pool, observer)
        self._adapters = AdapterRegistry(self._load_adapter, self._unload_adapter)
        self._leases: dict[str, int] = {}

    def on_restarted(self, worker: Worker) -> None:
        """Load the adapters again, before the engine gets a request that needs one."""

        def load(adapter_id: int, path: str) -> Awaitable[list[str]]:
            answer = worker.client.call(lambda call_id: LoadAdapter(call_id, adapter_id, path))
            return _tensor_names(answer)

        self._adapters.reload(load)
        super().on_restarted(worker)

    async def close(self, force: bool = False) -> None:
        """End the engines and every open request; the object cannot be used afterwards.

        Args:
            force: Whether to kill the engines without asking them to end.
        """
        self._adapters.close()
        await super().close(force)

    async def register_lora(self, name: str, path: str) -> list[str]:
        """Load an adapter into all engines; returns the names of its tensors.

        Args:
            name: What requests call it.
            path: Its directory.

        Raises:
            InvalidRequestError: The name is taken, the directory holds no adapter that fits, or the
                engines were started without `enable_lora`.
            UnavailableError: No engine runs; try again later.
        """
        if not self.config.enable_lora:
            raise InvalidRequestError(
                "this engine was started without LoRA adapters: start it with enable_lora=True"
            )
        await self.start()
        return await self._adapters.register(name, path)

    async def unregister_lora(self, name: str) -> None:
        """Forget an adapter, once the last request that uses it has ended.

        Raises:
            InvalidRequestError: There is none of this name, or it is being forgotten already.
        """
        await self._adapters.unregister(name)

    def list_loras(self) -> list[str]:
        """Names of the adapters that requests may use."""
        return self._adapters.names

    @contextmanager
    def _leased(
        self, request_ids: Sequence[str], lora_name: str | None, held: bool = False
    ) -> Iterator[int | None]:
        """Lease an adapter to requests that are being made, until they have ended.

        Args:
            request_ids: The requests. Unless an exception leaves the block they are open from then
                on.
            lora_name: What it is called; None is none.
            held: See `AdapterRegistry.acquire`.

        Yields:
            The engines' id of it.

        Raises:
            InvalidRequestError: There is none of this name, or it is draining.
        """
        if lora_name is None:
            yield None
            return
        leases = {name: self._adapters.acquire(lora_name, held) for name in request_ids}
        try:
            yield next(iter(leases.values()), None)
        except BaseException:
            for adapter_id in leases.values():
                self._adapters.release(adapter_id)
            raise
        self._leases |= leases

    def _forget(self, output: OutputT) -> None:
        super()._forget(output)
        adapter_id = self._leases.pop(output.request_id, None)
        if adapter_id is not None:
            self._adapters.release(adapter_id)

    def _load_adapter(self, adapter_id: int, path: str) -> Awaitable[list[str]]:
        return _tensor_names(
            self._parts.pool.call_all(lambda call_id: LoadAdapter(call_id, adapter_id, path))
        )

    def _unload_adapter(self, adapter_id: int) -> Awaitable[object]:
        return self._parts.pool.call_all(lambda call_id: UnloadAdapter(call_id, adapter_id))


async def _tensor_names(answers: Awaitable[bytes | list[bytes]]) -> list[str]:
    """The names in the answer to `LoadAdapter`; several engines give the same."""
    data = await answers
    return (data if isinstance(data, bytes) else data[0]).decode().splitlines()
