"""LoRA adapters of text in engine processes: named, mixed, drained, and there after a crash."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.errors import EngineDeadError, InvalidRequestError, NotReadyError
from nanovllm.request_stream import RequestStream
from tests.peft_oracle import EVERY_LAYER, greedy, merged, write_peft
from tests.small_engine import SMALL

NUM_TOKENS = 12
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPT = list(range(100, 140))
NAMES = ("a", "b", "c", "d")

Scenario = Callable[[AsyncLLM], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(scope="module")
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        str(write_peft(base, root / name, seed=seed, modules=EVERY_LAYER))
        for seed, name in enumerate(NAMES)
    ]


@pytest.fixture(scope="module")
def expected(base: Path, adapters: list[str]) -> dict[str, list[int]]:
    """What transformers makes of each adapter, by its name."""
    models = [merged(base, Path(path)) for path in adapters]
    return dict(zip(NAMES, [greedy(model, PROMPT, NUM_TOKENS) for model in models], strict=True))


async def checked(scenario: Scenario, llm: AsyncLLM) -> None:
    """Run a scenario, and leave no adapter behind."""
    await asyncio.wait_for(scenario(llm), 60)
    for name in llm.list_loras():
        await asyncio.wait_for(llm.unregister_lora(name), 10)


@pytest.fixture(scope="module")
def run(base: Path) -> Iterator[Run]:
    """Run scenarios one after the other with the same engine, which holds two adapters."""
    loop = asyncio.new_event_loop()
    llm = AsyncLLM(str(base), **SMALL | {"max_loras": 2})
    yield lambda scenario: loop.run_until_complete(checked(scenario, llm))
    loop.run_until_complete(llm.close())
    loop.close()


async def start(llm: AsyncLLM, lora_name: str | None) -> RequestStream:
    (stream,) = await llm.submit([await llm.prepare(PROMPT, PARAMS)], lora_name=lora_name)
    return stream


async def tokens_of(stream: RequestStream) -> list[int]:
    async for _ in stream:
        pass
    return stream.output.outputs[0].token_ids


async def tokens(llm: AsyncLLM, lora_name: str | None) -> list[int]:
    return await tokens_of(await start(llm, lora_name))


async def tokens_when_ready(llm: AsyncLLM, lora_name: str) -> list[int]:
    """The same, through the restart of an engine."""
    while True:
        try:
            return await tokens(llm, lora_name)
        except (EngineDeadError, NotReadyError):
            await asyncio.sleep(0.05)


async def all_together(llm: AsyncLLM, adapters: list[str], expected: dict[str, list[int]]) -> None:
    for name, path in zip(NAMES, adapters, strict=True):
        names = await llm.register_lora(name, path)
        assert "model.layers.0.mlp.gate_proj.lora_A" in names
    assert llm.list_loras() == list(NAMES)
    plain = await tokens(llm, None)
    order = [None, *NAMES, *reversed(NAMES), None]
    found = await asyncio.gather(*(tokens(llm, name) for name in order))
    assert found == [plain if name is None else expected[name] for name in order]
    assert plain not in expected.values()


def test_each_request_has_the_adapter_it_names(
    run: Run, adapters: list[str], expected: dict[str, list[int]]
) -> None:
    run(lambda llm: all_together(llm, adapters, expected))


@pytest.mark.slow
def test_all_engines_get_the_adapters(
    base: Path, adapters: list[str], expected: dict[str, list[int]]
) -> None:
    async def main() -> None:
        async with AsyncLLM(str(base), **SMALL | {"replicas": 2, "max_loras": 4}) as llm:
            await checked(lambda llm: all_together(llm, adapters, expected), llm)

    asyncio.run(main())


def test_a_name_that_is_used_again_finds_nothing_of_the_old_one_cached(
    run: Run, adapters: list[str], expected: dict[str, list[int]]
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        for name, path in [("a", adapters[0]), ("b", adapters[1]), ("a", adapters[0])]:
            await llm.register_lora("same", path)
            for num_cached in (0, 32):
                stream = await start(llm, "same")
                assert await tokens_of(stream) == expected[name]
                assert stream.output.num_cached_tokens == num_cached
            await llm.unregister_lora("same")

    run(scenario)


def test_what_is_wrong_is_told_and_harms_nobody(
    run: Run, base: Path, adapters: list[str], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        with pytest.raises(InvalidRequestError, match="LoRA config not found"):
            await llm.register_lora("a", str(tmp_path))
        write_peft(base, tmp_path / "dora", use_dora=True)
        with pytest.raises(InvalidRequestError, match="use_dora=True, which cannot be served"):
            await llm.register_lora("a", str(tmp_path / "dora"))
        with pytest.raises(InvalidRequestError, match="LoRA 'a' is not registered"):
            await tokens(llm, "a")
        await llm.register_lora("a", adapters[0])
        with pytest.raises(InvalidRequestError, match="LoRA 'a' is already registered"):
            await llm.register_lora("a", adapters[1])
        assert await tokens(llm, "a") == expected["a"]

    run(scenario)


def test_unregistering_lets_running_requests_end(
    run: Run, adapters: list[str], expected: dict[str, list[int]]
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        await llm.register_lora("a", adapters[0])
        stream = await start(llm, "a")
        draining = asyncio.ensure_future(llm.unregister_lora("a"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="is draining"):
            await tokens(llm, "a")
        assert await tokens_of(stream) == expected["a"]
        await draining
        assert llm.list_loras() == []
        await llm.register_lora("a", adapters[1])
        stream = await start(llm, "a")
        await stream.aclose()
        await llm.unregister_lora("a")
        await tokens(llm, None)

    run(scenario)


def test_several_prompts_of_one_request_share_a_lease(
    run: Run, adapters: list[str], expected: dict[str, list[int]]
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        await llm.register_lora("a", adapters[0])
        inputs = [await llm.prepare(PROMPT, PARAMS) for _ in range(3)]
        streams = await llm.submit(inputs, lora_name="a")
        await streams[0].aclose()
        found = await asyncio.gather(*(tokens_of(stream) for stream in streams[1:]))
        assert found == [expected["a"]] * 2
        with pytest.raises(InvalidRequestError, match="is still running"):
            await llm.submit(inputs[:2], request_ids=["x", "x"], lora_name="a")
        await llm.unregister_lora("a")

    run(scenario)


def test_adapters_outlive_an_engine(
    run: Run, adapters: list[str], expected: dict[str, list[int]]
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        for name, path in zip("abc", adapters, strict=False):
            await llm.register_lora(name, path)
        await llm.unregister_lora("b")
        assert await tokens(llm, "c") == expected["c"]
        pid = llm.stats().workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await tokens_when_ready(llm, "c") == expected["c"]
        assert llm.list_loras() == ["a", "c"]

    run(scenario)


def test_engines_without_adapters_say_so(base: Path, adapters: list[str]) -> None:
    async def main() -> None:
        async with AsyncLLM(str(base), **SMALL | {"enable_lora": False}) as llm:
            with pytest.raises(InvalidRequestError, match="started without LoRA adapters"):
                await llm.register_lora("a", adapters[0])
            await tokens(llm, None)

    asyncio.run(main())
