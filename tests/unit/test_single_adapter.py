"""The adapter of requests that name none: loaded, replaced, switched off, forgotten."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.single_adapter import SingleAdapter


class Model:
    """Adapters by name.

    Attributes:
        gates: What loading a directory waits for; "bad" cannot be loaded.
    """

    def __init__(self) -> None:
        self.loras: dict[str, str] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def register_lora(self, name: str, path: str) -> list[str]:
        if path in self.gates:
            await self.gates[path].wait()
        if path == "bad":
            raise InvalidRequestError("no adapter", "path")
        self.loras[name] = path
        return [path]

    async def unregister_lora(self, name: str) -> None:
        del self.loras[name]
        await asyncio.sleep(0)

    def list_loras(self) -> list[str]:
        return list(self.loras)


def name_of(single: SingleAdapter) -> str | None:
    """Its name as of now, whatever it was when a type checker saw it last."""
    return single.name


def run(scenario: Callable[[SingleAdapter, Model], Awaitable[None]]) -> None:
    async def main() -> None:
        model = Model()
        await asyncio.wait_for(scenario(SingleAdapter(model), model), 5)

    asyncio.run(main())


def test_it_is_loaded_replaced_switched_off_and_forgotten() -> None:
    async def scenario(single: SingleAdapter, model: Model) -> None:
        assert name_of(single) is None
        single.enable(False)
        with pytest.raises(InvalidRequestError, match="load one first"):
            single.enable(True)
        assert await single.load("a") == ["a"]
        assert name_of(single) == "default/1"
        single.enable(False)
        assert name_of(single) is None
        single.enable(True)
        with pytest.raises(InvalidRequestError, match="no adapter"):
            await single.load("bad")
        assert name_of(single) == "default/1"
        await single.load("b")
        assert model.loras == {single.name: "b"}
        await single.reset()
        await single.reset()
        assert name_of(single) is None
        assert model.loras == {}

    run(scenario)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_that_are_loaded_at_once_the_last_to_be_there_stays(order: str) -> None:
    async def scenario(single: SingleAdapter, model: Model) -> None:
        model.gates = {path: asyncio.Event() for path in "ab"}
        loading = {path: asyncio.ensure_future(single.load(path)) for path in "ab"}
        for path in order:
            model.gates[path].set()
            assert await loading[path] == [path]
        assert model.loras == {single.name: order[1]}

    run(scenario)


def test_two_that_are_there_at_the_same_time_leave_one() -> None:
    async def scenario(single: SingleAdapter, model: Model) -> None:
        await asyncio.gather(single.reset(), *(single.load(path) for path in "abcd"))
        assert list(model.loras) == [single.name]
        await asyncio.gather(single.reset(), single.reset())
        assert model.loras == {}

    run(scenario)


def test_one_that_is_forgotten_by_its_name_is_gone() -> None:
    async def scenario(single: SingleAdapter, model: Model) -> None:
        await single.load("a")
        await model.unregister_lora("default/1")
        assert name_of(single) is None
        with pytest.raises(InvalidRequestError, match="load one first"):
            single.enable(True)
        await single.load("b")
        assert name_of(single) == "default/2"

    run(scenario)
