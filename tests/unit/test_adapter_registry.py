"""LoRA adapters by name: registered, leased, drained, and loaded again into a new engine."""

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.adapter_registry import AdapterRegistry
from nanovllm.errors import EngineDeadError, InvalidRequestError, NotReadyError

TENSORS = ["base_lm.layers.0.self_attn.q_proj.lora_A", "base_lm.layers.0.self_attn.q_proj.lora_B"]


class Engines:
    """All engines of a pool: what they were told, and what they shall say.

    Attributes:
        loaded: Directories by adapter id.
        error: What loading fails with.
        gate: Cleared, it holds every call back.
    """

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.ids: list[int] = []
        self.error: Exception | None = None
        self.unload_error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self, adapter_id: int, path: str) -> list[str]:
        self.ids.append(adapter_id)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.loaded[adapter_id] = path
        return TENSORS

    async def unload(self, adapter_id: int) -> None:
        await self.gate.wait()
        if self.unload_error is not None:
            raise self.unload_error
        self.loaded.pop(adapter_id, None)


Scenario = Callable[[AdapterRegistry, Engines], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def main() -> None:
        engines = Engines()
        registry = AdapterRegistry(engines.load, engines.unload)
        await asyncio.wait_for(scenario(registry, engines), 5)
        registry.close()

    asyncio.run(main())


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def fails(message: str) -> Any:
    return pytest.raises(InvalidRequestError, match=f"^{message}$")


def test_registering_loads_and_unregistering_unloads() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        assert await registry.register("a", "/adapters/a") == TENSORS
        await registry.register("b", "/adapters/b")
        assert registry.names == ["a", "b"]
        assert sorted(engines.loaded.values()) == ["/adapters/a", "/adapters/b"]
        await registry.unregister("a")
        assert registry.names == ["b"]
        assert list(engines.loaded.values()) == ["/adapters/b"]

    run(scenario)


def test_names_that_are_taken_unknown_or_empty_are_refused() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        await registry.register("a", "/a")
        with fails("LoRA 'a' is already registered"):
            await registry.register("a", "/b")
        with fails("LoRA 'b' is not registered"):
            await registry.unregister("b")
        with fails("LoRA 'b' is not registered"):
            registry.acquire("b")
        with fails("the name of a LoRA must not be empty"):
            await registry.register("", "/a")
        for name in (None, 5, ["a"]):
            bad: Any = name
            with fails(re.escape(f"name must be a string, got {bad!r}")):
                await registry.register(bad, "/a")
            with fails(re.escape(f"lora_name must be a string, got {bad!r}")):
                await registry.unregister(bad)
        assert list(engines.loaded.values()) == ["/a"]
        assert engines.ids == [1]

    run(scenario)


def test_a_path_is_a_string_or_a_path_that_an_engine_can_be_told() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        path: Any = Path("/adapters/a")
        await registry.register("a", path)
        for path, message in (
            (5, "path must be a string, got 5"),
            (None, "path must be a string, got None"),
            ("/tmp/\ud800", "path must be valid Unicode, got '/tmp/.ud800'"),
        ):
            with fails(message):
                await registry.register("b", path)
        assert engines.loaded == {1: "/adapters/a"}

    run(scenario)


def test_ids_are_never_used_again() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        ids = []
        for _ in range(3):
            await registry.register("a", "/a")
            ids.append(registry.acquire("a"))
            registry.release(ids[-1])
            await registry.unregister("a")
        engines.error = InvalidRequestError("no")
        with fails("no"):
            await registry.register("a", "/a")
        engines.error = None
        await registry.register("a", "/a")
        ids.append(registry.acquire("a"))
        assert len(set(ids)) == 4
        assert len(set(engines.ids)) == len(engines.ids)

    run(scenario)


def test_unregistering_waits_for_the_last_request() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        await registry.register("a", "/a")
        first, second = registry.acquire("a"), registry.acquire("a")
        assert first == second
        gone = asyncio.ensure_future(registry.unregister("a"))
        await settle()
        assert registry.names == []
        with fails("LoRA 'a' is draining and cannot accept new requests"):
            registry.acquire("a")
        with fails("LoRA 'a' is already draining"):
            await registry.unregister("a")
        with fails("LoRA 'a' is already registered"):
            await registry.register("a", "/b")
        registry.release(first)
        await settle()
        assert not gone.done()
        assert engines.loaded == {first: "/a"}
        registry.release(second)
        await gone
        assert engines.loaded == {}
        with fails("LoRA 'a' is not registered"):
            registry.acquire("a")
        await registry.register("a", "/b")

    run(scenario)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_requests_that_follow_one_another_get_an_adapter_that_drains(is_dropped: bool) -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        await registry.register("a", "/a")
        lease = registry.lease("a")
        gone = asyncio.ensure_future(registry.unregister("a"))
        await settle()
        for _ in range(2):
            registry.release(registry.acquire("a", held=True))
            await settle()
        assert not gone.done()
        with fails("LoRA 'a' is draining and cannot accept new requests"):
            registry.acquire("a")
        with fails("LoRA 'a' is draining and cannot accept new requests"):
            registry.lease("a")
        if not is_dropped:
            lease.close()
            lease.close()
            # It is idle, but not yet forgotten.
            with fails("LoRA 'a' is draining and cannot accept new requests"):
                registry.acquire("a", held=True)
        del lease
        gc.collect()
        await gone
        assert engines.loaded == {}

    run(scenario)


def test_a_lease_of_no_adapter_and_of_an_unknown_one() -> None:
    async def scenario(registry: AdapterRegistry, _: Engines) -> None:
        registry.lease(None).close()
        with fails("LoRA 'a' is not registered"):
            registry.lease("a")

    run(scenario)


def test_draining_goes_on_when_its_caller_is_gone() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        await registry.register("a", "/a")
        adapter_id = registry.acquire("a")
        gone = asyncio.ensure_future(registry.unregister("a"))
        await settle()
        gone.cancel()
        await settle()
        registry.release(adapter_id)
        await settle()
        assert engines.loaded == {}
        await registry.register("a", "/a")

    run(scenario)


@pytest.mark.parametrize(
    "error", [InvalidRequestError("rank 64"), FileNotFoundError("x"), NotReadyError("no engine")]
)
def test_a_failed_load_leaves_nothing(error: Exception) -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        engines.error = error
        with pytest.raises(type(error)):
            await registry.register("a", "/a")
        assert registry.names == []
        engines.error = None
        await registry.register("a", "/a")
        await settle()
        assert len(engines.loaded) == 1

    run(scenario)


def test_a_cancelled_load_leaves_nothing() -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        engines.gate.clear()
        loading = asyncio.ensure_future(registry.register("a", "/a"))
        await settle()
        with fails("LoRA 'a' is not registered"):
            registry.acquire("a")
        with fails("LoRA 'a' is already registered"):
            await registry.register("a", "/a")
        loading.cancel()
        engines.loaded[1] = "/a"  # an engine had done it before
        engines.gate.set()
        await settle()
        assert engines.loaded == {}
        assert registry.names == []

    run(scenario)


@pytest.mark.parametrize("error", [EngineDeadError("died"), RuntimeError("stuck")])
def test_a_failed_unload_does_not_keep_the_name(error: Exception) -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        await registry.register("a", "/a")
        engines.unload_error = error
        await registry.unregister("a")
        assert registry.names == []
        await registry.register("a", "/a")

    run(scenario)


def test_a_new_engine_gets_all_adapters_before_any_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        for name in ("a", "b", "c"):
            await registry.register(name, f"/{name}")
        leased = registry.acquire("b")
        draining = asyncio.ensure_future(registry.unregister("b"))  # its requests may be in line
        await settle()
        posted: dict[int, str] = {}

        def post(adapter_id: int, path: str) -> "asyncio.Future[list[str]]":
            posted[adapter_id] = path
            answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
            if path == "/c":
                answer.set_exception(FileNotFoundError("it is gone"))
            else:
                answer.set_result(TENSORS)
            return answer

        registry.reload(post)
        assert sorted(posted.values()) == ["/a", "/b", "/c"]
        await settle()
        assert "LoRA 'c' is lost to an engine that was started anew: it is gone" in caplog.text
        registry.release(leased)
        await draining

    run(scenario)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_closing_while_an_engine_loads_again_leaves_nothing_unawaited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(registry: AdapterRegistry, engines: Engines) -> None:
        await registry.register("a", "/a")

        async def lost(adapter_id: int, path: str) -> list[str]:
            raise NotReadyError("the engines are being shut down")

        registry.reload(lost)
        registry.close()
        await settle()
        gc.collect()

    run(scenario)
    assert not caplog.records


def test_closing_ends_what_waits() -> None:
    async def main() -> None:
        engines = Engines()
        registry = AdapterRegistry(engines.load, engines.unload)
        await registry.register("a", "/a")
        registry.acquire("a")
        gone = asyncio.ensure_future(registry.unregister("a"))
        await settle()
        registry.close()
        with pytest.raises(NotReadyError, match="shut down"):
            await gone

    asyncio.run(main())
