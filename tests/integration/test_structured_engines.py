"""Structured outputs through engine processes: many schemas at once, attacks beside them."""

import asyncio
import json
from itertools import pairwise
from random import Random
from typing import Any

import jsonschema
import pytest

from nanovllm import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import RequestOutput
from tests.random_schemas import random_schema
from tests.unit.test_grammars import ATTACKS

NUM_SCHEMAS = 200
MAX_TOKENS = 2000
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def params(schema: dict[str, Any] | str, seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        temperature=1.5,
        seed=seed,
        structured_outputs=StructuredOutputsParams(json=schema),
        **{"max_tokens": MAX_TOKENS} | options,
    )


async def stream(llm: AsyncLLM, given: SamplingParams) -> list[RequestOutput]:
    """All that a request says on its way; the last is whole."""
    return [output async for output in llm.generate("Here is some JSON: ", given)]


def check_met(schemas: list[dict[str, Any]], outputs: list[RequestOutput]) -> None:
    """What ends by itself is valid, and nearly everything does."""
    num_ended = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason in ("stop", "length")
        if output.finish_reason == "stop":
            num_ended += 1
            jsonschema.validate(json.loads(output.outputs[0].text), schema)
    assert num_ended >= 0.95 * len(schemas), f"{num_ended} ended"


@pytest.mark.slow
def test_200_random_schemas_are_met_whole() -> None:
    schemas = [random_schema(Random(seed)) for seed in range(NUM_SCHEMAS)]
    with LLM(max_num_seqs=32) as llm:
        prompts = ["Here is some JSON: "] * len(schemas)
        outputs = llm.generate(prompts, [params(s, seed) for seed, s in enumerate(schemas)])
    check_met(schemas, outputs)


@pytest.mark.slow
def test_200_random_schemas_are_met_streamed() -> None:
    async def run() -> None:
        async with AsyncLLM(max_num_seqs=32) as llm:
            schemas = [random_schema(Random(seed)) for seed in range(NUM_SCHEMAS)]
            turns = asyncio.Semaphore(64)  # as many as the queue takes

            async def ask(seed: int, schema: dict[str, Any]) -> list[RequestOutput]:
                async with turns:
                    return await stream(llm, params(schema, seed))

            news = await asyncio.gather(*(ask(*item) for item in enumerate(schemas)))
            num_forced = llm.stats().workers[0].engine.num_forced_tokens
        for outputs in news:
            texts = [output.outputs[0].text for output in outputs]
            assert all(b.startswith(a) for a, b in pairwise(texts))
        check_met(schemas, [outputs[-1] for outputs in news])
        assert num_forced > 0

    asyncio.run(run())


def test_attacks_are_refused_and_others_go_on_as_if_they_were_alone() -> None:
    async def run() -> None:
        async with AsyncLLM(max_num_seqs=8, max_model_len=512) as llm:
            quiet = await stream(llm, params(PERSON, 1))

            async def attack(name: str) -> None:
                form = StructuredOutputsParams(**ATTACKS[name][0])
                with pytest.raises(InvalidRequestError):
                    await stream(llm, SamplingParams(structured_outputs=form))

            longest = 0.0

            async def watch() -> None:
                """Measure how long the event loop stands still."""
                nonlocal longest
                loop = asyncio.get_running_loop()
                while True:
                    before = loop.time()
                    await asyncio.sleep(0.01)
                    longest = max(longest, loop.time() - before)

            watching = asyncio.ensure_future(watch())
            attacks = asyncio.gather(*(attack(name) for name in ATTACKS))
            beside = await stream(llm, params(PERSON, 1))
            await attacks
            watching.cancel()
            assert longest < 2
            assert beside[-1].outputs[0].text == quiet[-1].outputs[0].text
            stats = llm.stats().workers[0].engine
            assert (stats.num_errors, stats.num_running, stats.num_waiting) == (0, 0, 0)

    asyncio.run(run())


def test_a_request_may_leave_while_its_form_is_compiled() -> None:
    async def run() -> None:
        async with AsyncLLM(max_num_seqs=8, max_model_len=512) as llm:
            # A good deal of work, and as much again for each title.
            slow = {"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}

            async def leave(index: int) -> None:
                # Who is to leave would not end soon, either.
                max_tokens = 20 if index % 2 else 400
                given = params(slow | {"title": str(index)}, index, max_tokens=max_tokens)
                async for _ in llm.generate("x", given, request_id=f"r{index}"):
                    pass

            async def wait_until_held() -> None:
                while not llm.stats().workers[0].engine.num_paused:
                    await asyncio.sleep(0.005)

            tasks = [asyncio.ensure_future(leave(index)) for index in range(4)]
            await asyncio.wait_for(wait_until_held(), 60)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, False] * 2
            assert [r for r in results[1::2] if r is not None] == []
            jsonschema.validate(
                json.loads((await stream(llm, params(PERSON, 1)))[-1].outputs[0].text), PERSON
            )
            assert llm.stats().workers[0].engine.num_errors == 0

    asyncio.run(run())
