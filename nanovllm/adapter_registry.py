"""LoRA adapters by name, on the client's side of the engines: registered, leased, drained."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from nanovllm.errors import InvalidRequestError, NotReadyError, UnavailableError
from nanovllm.validation import conformed

logger = logging.getLogger(__name__)

SendLoad = Callable[[int, str], Awaitable[list[str]]]
SendUnload = Callable[[int], Awaitable[Any]]


class _Adapter:
    """A registered adapter and the requests that use it."""

    def __init__(self, name: str, adapter_id: int, path: str) -> None:
        self.name, self.adapter_id, self.path = name, adapter_id, path
        self.state = "loading"
        self.num_leases = 0
        self.idle = asyncio.Event()
        self.idle.set()


class AdapterLease:
    """One adapter for requests that follow one another, such as the sentences of a long text.

    Until it is closed or dropped they get the adapter, even if that is to be unregistered.

    Args:
        release: Gives the adapter back.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """No more requests follow."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        # The garbage collector runs in any thread; the registry belongs to the loop's.
        if self._release is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._release)


class AdapterRegistry:
    """Which adapters there are, and who uses them. Belongs to one event loop.

    An adapter is *loading* until every engine has it, then *registered* until it is unregistered,
    and *draining* until the last request that uses it has ended. Ids count up and are never used
    again, so that nothing that was computed under an id is ever taken for another adapter's.

    Args:
        send_load: Has all running engines load the adapter of an id from a directory; returns the
            names of its tensors, or raises what an engine said. One that dies meanwhile does not
            count: `reload` sees to the next.
        send_unload: Has them forget one; those that do not know it do not mind.
    """

    def __init__(self, send_load: SendLoad, send_unload: SendUnload) -> None:
        self._send_load = send_load
        self._send_unload = send_unload
        self._adapters: dict[str, _Adapter] = {}
        self._leased: dict[int, _Adapter] = {}
        self._next_id = 1
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> list[str]:
        """Names that a request may use, in order of registration."""
        return [a.name for a in self._adapters.values() if a.state == "registered"]

    async def register(self, name: str, path: str) -> list[str]:
        """Load an adapter into all engines under a name.

        Args:
            name: What requests call it.
            path: Directory that holds it, as the engines see it.

        Returns:
            The names of its tensors.

        Raises:
            InvalidRequestError: The name is taken or empty, or the directory holds no adapter that
                fits; the message says why.
            UnavailableError: No engine runs.
        """
        name, path = _valid_text("name", name), _valid_text("path", path)
        if not name:
            raise InvalidRequestError("the name of a LoRA must not be empty", "name")
        if name in self._adapters:
            raise InvalidRequestError(f"LoRA '{name}' is already registered", "name")
        adapter = _Adapter(name, self._next_id, path)
        self._next_id += 1
        self._adapters[name] = adapter
        try:
            tensors = await self._send_load(adapter.adapter_id, path)
        except BaseException:  # a cancelled caller too: some engine may have it by now
            del self._adapters[name]
            self._in_background(self._unload(adapter))
            raise
        adapter.state = "registered"
        return tensors

    async def unregister(self, name: str) -> None:
        """Take an adapter out of service, and return once the last request that uses it has ended.

        It goes on if the caller is cancelled.

        Raises:
            InvalidRequestError: There is none of this name, or it is draining already.
            NotReadyError: The engines are shut down meanwhile.
        """
        adapter = self._find(name)
        if adapter.state == "draining":
            raise InvalidRequestError(f"LoRA '{name}' is already draining", "name")
        adapter.state = "draining"
        await asyncio.shield(self._in_background(self._drain(adapter)))

    def lease(self, name: str | None) -> AdapterLease:
        """Lease an adapter to requests that follow one another; None is no adapter.

        Raises:
            InvalidRequestError: There is none of this name, or it is draining.
        """
        if name is None:
            return AdapterLease(lambda: None)
        adapter_id = self.acquire(name)
        return AdapterLease(lambda: self.release(adapter_id))

    def acquire(self, name: str, held: bool = False) -> int:
        """Lease an adapter to a request; returns its id, which is to be released.

        Args:
            name: What it is called.
            held: Whether the request belongs to what has a lease, so that it gets the adapter even
                while that is draining.

        Raises:
            InvalidRequestError: There is none of this name, or it is draining.
        """
        adapter = self._find(name)
        if adapter.state == "draining" and not (held and adapter.num_leases):
            raise InvalidRequestError(
                f"LoRA '{name}' is draining and cannot accept new requests", "lora_name"
            )
        adapter.num_leases += 1
        adapter.idle.clear()
        self._leased[adapter.adapter_id] = adapter
        return adapter.adapter_id

    def release(self, adapter_id: int) -> None:
        """Give a lease back, once the engines have been told that its request has ended."""
        adapter = self._leased[adapter_id]
        adapter.num_leases -= 1
        if not adapter.num_leases:
            del self._leased[adapter_id]
            adapter.idle.set()

    def reload(self, send_load: SendLoad) -> None:
        """Load all adapters into an engine that has been started anew.

        Args:
            send_load: Posts the message to that engine before it returns, so that no request
                overtakes it, and returns what will be its answer.
        """
        for adapter in self._adapters.values():
            answer = send_load(adapter.adapter_id, adapter.path)
            self._in_background(self._loaded_again(adapter, answer))

    def close(self) -> None:
        """Wait for no more requests to end; the engines are being shut down."""
        self._closed = True
        for adapter in self._adapters.values():
            adapter.idle.set()

    def _find(self, name: str) -> _Adapter:
        adapter = self._adapters.get(conformed("lora_name", name, str))
        if adapter is None or adapter.state == "loading":
            raise InvalidRequestError(f"LoRA '{name}' is not registered", "lora_name")
        return adapter

    async def _drain(self, adapter: _Adapter) -> None:
        await adapter.idle.wait()
        if self._closed:
            raise NotReadyError("the engines are being shut down")
        # From here on the name is free; what an engine failed to forget costs it memory only.
        del self._adapters[adapter.name]
        await self._unload(adapter)

    async def _unload(self, adapter: _Adapter) -> None:
        try:
            with suppress(UnavailableError):  # an engine that is gone has forgotten it
                await self._send_unload(adapter.adapter_id)
        except Exception:
            logger.exception("an engine could not forget LoRA %r", adapter.name)

    async def _loaded_again(self, adapter: _Adapter, answer: Awaitable[list[str]]) -> None:
        try:
            with suppress(UnavailableError):  # the engine is gone again, or was shut down
                await answer
        except Exception as e:  # noqa: BLE001  # the engine runs on and refuses requests for it
            logger.error("LoRA %r is lost to an engine that was started anew: %s", adapter.name, e)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run on whatever becomes of the caller; the loop itself keeps no reference."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _valid_text(param: str, value: object) -> str:
    """An argument as a string that can be sent to an engine.

    Raises:
        InvalidRequestError: It is none, or has half a surrogate pair.
    """
    text: str = conformed(param, value, str)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequestError(f"{param} must be valid Unicode, got {text!r:.80}", param) from e
    return text
