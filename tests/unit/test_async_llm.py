"""`AsyncLLM` on the bundled model: what a request gets, whatever happens to it or its engine."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch

from nanovllm import AsyncLLM, SamplingParams, async_llm
from nanovllm.async_llm import FORM_THREADS
from nanovllm.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
)
from nanovllm.outputs import RequestOutput

T = TypeVar("T")

PROMPT = "Once upon a time"
SMALL: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4, "cpu_threads": 1}
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True, temperature=1.0, seed=0)


Scenario = Callable[[AsyncLLM], Awaitable[T]]


async def checked(scenario: Scenario[T], llm: AsyncLLM) -> T:
    """Run a scenario, after which nothing may be left of its requests."""
    result = await asyncio.wait_for(scenario(llm), 30)
    assert await settled(llm)
    return result


def run_alone(scenario: Scenario[T], **options: Any) -> T:
    """Run a scenario with engines of its own."""

    async def main() -> T:
        async with AsyncLLM(**(SMALL | options)) as llm:
            return await checked(scenario, llm)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Scenario[Any]], Any]]:
    """Run scenarios one after the other with the same engine."""
    loop = asyncio.new_event_loop()
    llm = AsyncLLM(**SMALL)
    yield lambda scenario: loop.run_until_complete(checked(scenario, llm))
    loop.run_until_complete(llm.close())
    loop.close()


Run = Callable[[Scenario[Any]], Any]


async def settled(llm: AsyncLLM) -> bool:
    """Whether nothing is left of any request, as soon as the engines have said so."""
    for _ in range(200):
        stats = llm.stats()
        engines = [worker.engine for worker in stats.workers]
        left = [(e.num_running, e.num_waiting, e.num_used_blocks) for e in engines]
        loads = [(worker.num_inflight, worker.outstanding_tokens) for worker in stats.workers]
        if not stats.num_inflight and not any(map(any, left)) and not any(map(any, loads)):
            return not llm._streams and not len(llm._parts.outputs)
        await asyncio.sleep(0.02)
    return False


async def finish(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:
        last = output
    return last


async def first(
    llm: AsyncLLM, **options: Any
) -> tuple[AsyncIterator[RequestOutput], RequestOutput]:
    stream = llm.generate(PROMPT, ENDLESS, **options)
    return stream, await anext(stream)


def test_outputs_grow_and_equal_those_of_the_engine_in_this_process(run: Run) -> None:
    from nanovllm import LLM

    params = SamplingParams(max_tokens=24, seed=5, logprobs=2, n=2)

    async def scenario(llm: AsyncLLM) -> list[RequestOutput]:
        return [output async for output in llm.generate(PROMPT, params)]

    outputs = run(scenario)
    with LLM(**SMALL) as llm:
        expected = llm.generate(PROMPT, params, use_tqdm=False)[0]
    for index, completion in enumerate(expected.outputs):
        final = outputs[-1].outputs[index]
        assert final.token_ids == completion.token_ids
        assert final.text == completion.text
        assert final.finish_reason == completion.finish_reason
        assert final.logprobs == completion.logprobs
        texts = [output.outputs[index].text for output in outputs]
        assert all(b.startswith(a) for a, b in pairwise(texts))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.parametrize(
    ("message", "options", "elsewhere"),
    [
        ({}, {"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"content": "x" * 5000}, {}, True),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {}, True),
        ({}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
        ({}, {"chat_template_kwargs": {"enable_thinking": [[]]}}, True),
    ],
)
def test_what_may_take_long_to_render_is_rendered_in_a_thread(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    message: dict[str, Any],
    options: dict[str, Any],
    elsewhere: bool,
) -> None:
    told: list[bool] = []

    async def in_thread_if(long: bool, work: Callable[[], T]) -> T:
        told.append(long)
        return work()

    async def scenario(llm: AsyncLLM) -> str:
        await llm.start()
        monkeypatch.setattr("nanovllm.async_llm.in_thread_if", in_thread_if)
        return await llm.render([{"role": "assistant", "content": "Hi"} | message], **options)

    assert "assistant" in run(scenario)
    assert told == [elsewhere]


def test_what_is_no_message_is_refused(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        await llm.start()
        with pytest.raises(InvalidRequestError, match="a message must be an object"):
            await llm.render(["Hi"])  # type: ignore[list-item]
        with pytest.raises(InvalidRequestError, match="messages must be a list"):
            await llm.render(None)  # type: ignore[arg-type]

    run(scenario)


def test_a_prompt_may_bring_its_cache_salt(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> list[bool]:
        params, ids = SamplingParams(max_tokens=1), list(range(200, 260))
        prompts = [{"prompt_token_ids": ids, "cache_salt": salt} for salt in ("x", "x", "y")]
        outputs = [await finish(llm.generate(prompt, params)) for prompt in prompts]
        return [bool(output.num_cached_tokens) for output in outputs]

    assert run(scenario) == [False, True, False]


def test_stop_strings_end_a_request_and_its_sequence_in_the_engine(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> tuple[RequestOutput, int]:
        await llm.start()
        before = llm.stats().workers[0].engine.num_output_tokens
        params = SamplingParams(max_tokens=400, ignore_eos=True, seed=1, stop=["."])
        output = await finish(llm.generate(PROMPT, params))
        assert await settled(llm)
        return output, llm.stats().workers[0].engine.num_output_tokens - before

    output, num_generated = run(scenario)
    assert (output.finish_reason, output.stop_reason) == ("stop", ".")
    assert num_generated < len(output.outputs[0].token_ids) + 50


def test_many_requests_share_the_engine(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> list[RequestOutput]:
        params = [SamplingParams(max_tokens=8, seed=i, ignore_eos=True) for i in range(20)]
        return await asyncio.gather(*(finish(llm.generate(PROMPT, p)) for p in params))

    assert all(len(output.outputs[0].token_ids) == 8 for output in run(scenario))


def test_leaving_the_iteration_or_dropping_it_aborts(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        left, _ = await first(llm)
        await left.aclose()  # type: ignore[attr-defined]
        assert await settled(llm)
        inputs = await llm.prepare(PROMPT, ENDLESS)
        streams = await llm.submit([inputs, inputs])
        await anext(streams[0])
        del streams

    run(scenario)


def test_abort_by_name_ends_the_stream_with_its_reason(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> RequestOutput:
        stream, _ = await first(llm, request_id="mine")
        with pytest.raises(InvalidRequestError, match="still running"):
            await first(llm, request_id="mine")
        assert await llm.abort("mine")
        assert not await llm.abort("mine")
        return await finish(stream)

    assert run(scenario).finish_reason == "abort"


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", {}, InvalidRequestError),
        ([], {}, InvalidRequestError),
        ([-1], {}, InvalidRequestError),
        ([4096], {}, InvalidRequestError),
        (list(range(512)), {}, ContextLengthError),
        ("tale " * 200_000, {}, ContextLengthError),
        (PROMPT, {"stop_token_ids": [99999]}, InvalidRequestError),
    ],
)
def test_bad_requests_are_refused_and_cost_nothing(
    run: Run, prompt: Any, params: dict[str, Any], error: type[Exception]
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        await llm.start()
        num_steps = llm.stats().workers[0].engine.num_steps
        with pytest.raises(error):
            await finish(llm.generate(prompt, SamplingParams(**params)))
        assert llm.stats().workers[0].engine.num_steps == num_steps

    run(scenario)


@pytest.mark.parametrize("params", [{"max_tokens": 1}, {}, "x", [SamplingParams()]])
def test_parameters_of_another_type_are_refused(run: Run, params: Any) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        with pytest.raises(InvalidRequestError, match="must be SamplingParams") as caught:
            await finish(llm.generate(PROMPT, params))
        assert caught.value.param == "sampling_params"

    run(scenario)


def test_a_full_queue_refuses_and_recovers() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        inputs = await llm.prepare(PROMPT, ENDLESS)
        streams = await llm.submit([inputs] * 6)
        with pytest.raises(OverloadedError, match="queue is full"):
            await llm.submit([inputs])
        with pytest.raises(InvalidRequestError, match="at most 6 at a time"):
            await llm.submit([inputs] * 7)
        await streams[0].aclose()
        await llm.submit([inputs])

    run_alone(scenario, max_num_queued_reqs=2)


def test_too_many_waiting_tokens_are_refused() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        long = await llm.prepare(list(range(100, 300)), ENDLESS)
        streams = await llm.submit([long])  # the first one always fits
        with pytest.raises(OverloadedError, match="prompt tokens are waiting"):
            await llm.submit([long])
        await anext(streams[0])
        await llm.submit([long])

    run_alone(scenario, max_num_queued_tokens=100)


def test_caps_hold_requests_in_line() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        inputs = await llm.prepare(PROMPT, params)
        streams = await llm.submit([inputs] * 4)
        assert llm.stats().workers[0].num_inflight == 1
        assert llm.stats().num_inflight == 4
        assert llm.stats().num_waiting >= 3
        assert await llm.warm(PROMPT) > 0  # does not wait in line
        await streams[3].aclose()
        for stream in streams[:3]:
            assert (await finish(stream)).finish_reason == "length"

    run_alone(scenario, max_inflight_per_engine=1)


def test_who_waits_in_line_for_too_long_is_told_to_come_back() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        inputs = await llm.prepare(PROMPT, ENDLESS)
        running, waiting = await llm.submit([inputs] * 2)
        with pytest.raises(OverloadedError, match=r"within 0\.01 s"):
            await anext(waiting)
        await running.aclose()

    run_alone(scenario, max_inflight_total=1, queue_timeout=0.01)


def test_outputs_shrink_under_load_if_asked_to() -> None:
    async def scenario(llm: AsyncLLM) -> list[int]:
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        inputs = await llm.prepare(PROMPT, params)
        wanting = await llm.prepare(PROMPT, replace(params, min_tokens=8))
        streams = await llm.submit([inputs] * 2)
        streams += await llm.submit([inputs, wanting])
        outputs = [await finish(stream) for stream in streams]
        return [len(output.outputs[0].token_ids) for output in outputs]

    options = {"adaptive_max_new_tokens": True, "adaptive_max_new_tokens_factor": 0.5}
    assert run_alone(scenario, **options) == [10, 10, 5, 8]


def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        await anext(stream)
        draining = asyncio.ensure_future(llm.drain())
        await asyncio.sleep(0)
        assert not llm.is_ready
        with pytest.raises(NotReadyError):
            await first(llm)
        assert (await finish(stream)).finish_reason == "length"
        assert await draining

    run_alone(scenario)


def test_a_drain_that_takes_too_long_says_so() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream, _ = await first(llm)
        assert not await llm.drain(0.01)
        await stream.aclose()  # type: ignore[attr-defined]

    run_alone(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_ends_its_requests_and_comes_back(number: int) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        streams = [(await first(llm))[0] for _ in range(3)]
        pid = llm.stats().workers[0].pid
        assert pid is not None
        os.kill(pid, number)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="try again"):
                await finish(stream)
        with pytest.raises(NotReadyError):
            await first(llm)
        while not llm.is_ready:
            await asyncio.sleep(0.05)
        output = await finish(llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)))
        assert output.finish_reason == "length"
        worker = llm.stats().workers[0]
        assert worker.num_restarts == 1
        assert worker.pid != pid

    run_alone(scenario, step_timeout=1.0)


def test_an_engine_that_hangs_is_found_even_if_nobody_waits_for_it() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream, _ = await first(llm)
        pid = llm.stats().workers[0].pid or 0
        os.kill(pid, signal.SIGSTOP)
        await stream.aclose()  # type: ignore[attr-defined]
        while llm.stats().workers[0].pid == pid or not llm.is_ready:
            await asyncio.sleep(0.05)

    run_alone(scenario, step_timeout=0.5)


def test_news_that_cannot_be_taken_end_the_requests_they_were_for() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream, _ = await first(llm)
        outputs = llm._parts.outputs
        process = outputs.process

        def broken(news: Any) -> Any:
            outputs.process = process  # type: ignore[method-assign]
            raise KeyError("a bug")

        outputs.process = broken  # type: ignore[method-assign]
        with pytest.raises(EngineDeadError):
            await finish(stream)
        while not llm.is_ready:
            await asyncio.sleep(0.05)
        output = await finish(llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)))
        assert output.finish_reason == "length"

    run_alone(scenario)


def test_warm_prefixes_are_warm_again_after_a_restart() -> None:
    prefix = "Once upon a time there was a king who had three sons, and the youngest of them was"

    async def num_cached(llm: AsyncLLM) -> int:
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        return (await finish(llm.generate(prefix + " called Hans.", params))).num_cached_tokens

    async def scenario(llm: AsyncLLM) -> None:
        warm = await num_cached(llm)
        assert warm >= 16
        os.kill(llm.stats().workers[0].pid or 0, signal.SIGKILL)
        while not llm.stats().workers[0].num_restarts:
            await asyncio.sleep(0.01)
        while not llm.stats().workers[0].engine.num_steps or llm.stats().num_inflight:
            await asyncio.sleep(0.01)
        assert await num_cached(llm) == warm

    run_alone(scenario, warm_prefixes=f"||{prefix}||")


def test_a_prefix_that_cannot_be_warmed_leaves_no_engine_behind() -> None:
    async def main() -> None:
        llm = AsyncLLM(**SMALL, warm_prefixes="tale " * 1000)
        with pytest.raises(ContextLengthError):
            await llm.start()
        assert [worker.state for worker in llm.stats().workers] == ["dead"]

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize(
    "params",
    [{"max_tokens": 2**70}, {"stop": ["\ud800"]}, {"logit_bias": {3: 1.0}, "top_k": 2**70}],
)
def test_what_no_message_can_hold_is_refused(run: Run, params: dict[str, Any]) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        with pytest.raises(InvalidRequestError):
            await finish(llm.generate(PROMPT, SamplingParams(**params)))

    run(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "x"}, "priority must be an integer, got 'x'"),
        ({"cache_salt": 5}, "cache_salt must be a string, got 5"),
        ({"cache_salt": "\ud800"}, "not valid Unicode"),
        ({"request_id": 5}, "request_id must be a string, got int"),
        ({"lora_name": ["x"]}, "lora_name must be a string"),
    ],
)
def test_arguments_of_another_type_do_no_harm(
    run: Run, options: dict[str, Any], message: str
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        await llm.start()
        pid = llm.stats().workers[0].pid
        with pytest.raises(InvalidRequestError, match=message):
            await finish(llm.generate(PROMPT, SamplingParams(max_tokens=2), **options))
        await finish(llm.generate(PROMPT, SamplingParams(max_tokens=2)))
        assert llm.stats().workers[0].pid == pid

    run(scenario)


def test_a_form_that_takes_long_keeps_its_thread_and_nobody_pays_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one was told to give a simpler form while its own had not been looked at."""
    monkeypatch.setattr(async_llm, "FORM_TIMEOUT", 0.2)
    released = threading.Event()

    def endless() -> Any:
        released.wait(30)

    async def main() -> None:
        llm = AsyncLLM(**SMALL)
        busy = [asyncio.ensure_future(llm._in_form_thread(endless)) for _ in range(FORM_THREADS)]
        await asyncio.sleep(0.05)
        busy[0].cancel()
        for ended in await asyncio.gather(*busy[1:], return_exceptions=True):
            assert isinstance(ended, InvalidRequestError)
        with pytest.raises(OverloadedError, match="try again"):
            await llm._in_form_thread(lambda: pytest.fail("there is no thread for it"))
        released.set()
        for _ in range(2 * FORM_THREADS):
            assert await llm._in_form_thread(lambda: "done") == "done"  # type: ignore[arg-type, return-value, comparison-overlap]

    asyncio.run(main())


def test_any_seed_will_do(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> list[str]:
        params = SamplingParams(max_tokens=8, ignore_eos=True, seed=-(2**63) - 1)
        return [(await finish(llm.generate(PROMPT, params))).outputs[0].text for _ in range(2)]

    first_text, second_text = run(scenario)
    assert first_text == second_text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices")
def test_devices_are_refused_where_there_are_none() -> None:
    with pytest.raises(InvalidRequestError, match="'cuda' is not available"):
        asyncio.run(AsyncLLM(devices=[0, 1]).start())


def test_closing_ends_open_requests_and_the_processes() -> None:
    async def main() -> tuple[str, int]:
        llm = AsyncLLM(**SMALL)
        stream, _ = await first(llm)
        pid = llm.stats().workers[0].pid
        await llm.close()
        with pytest.raises(NotReadyError):
            await finish(stream)
        with pytest.raises(RuntimeError, match="closed"):
            await llm.start()
        return llm.stats().workers[0].state, pid or 0

    state, pid = asyncio.run(asyncio.wait_for(main(), 60))
    assert state == "dead"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_is_wrong_with_the_options_is_told_as_it_is_in_process() -> None:
    async def main(**options: Any) -> None:
        async with AsyncLLM(**options):
            pass

    with pytest.raises(FileNotFoundError, match="does not exist"):
        asyncio.run(main(model="/no/such/model"))
    with pytest.raises(InvalidRequestError, match="exceeds the model's context"):
        asyncio.run(main(max_model_len=10**9))
    with pytest.raises(InvalidRequestError, match="did you mean 'dispatch_policy'"):
        AsyncLLM(dispatch_polcy="rr")


def test_replicas_share_the_work_and_the_cores() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        inputs = await llm.prepare(PROMPT, params)
        for stream in await llm.submit([inputs] * 4):
            await finish(stream)
        workers = llm.stats().workers
        assert [worker.engine.num_output_tokens for worker in workers] == [8, 8]
        unseeded = await llm.prepare(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
        texts = [(await finish(s))["text"] for s in await llm.submit([unseeded] * 2)]
        assert texts[0] != texts[1]
        cores = [os.sched_getaffinity(worker.pid or 0) for worker in workers]
        if len(os.sched_getaffinity(0)) >= 2:
            assert not cores[0] & cores[1]
        assert await llm.warm("The wolf said to the child and to all the others in the wood") > 8
        assert all(worker.engine.num_output_tokens == 17 for worker in llm.stats().workers)

    run_alone(scenario, replicas=2, dispatch_policy="rr", cpu_threads=None)


def test_the_api_process_does_without_torch() -> None:
    script = "import sys, nanovllm.async_llm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_it_works_in_a_loop_that_is_running_already_without_a_context() -> None:
    async def notebook() -> str | None:
        llm = AsyncLLM(**SMALL)
        output = await finish(llm.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)))
        await llm.close()
        return output.finish_reason

    assert asyncio.run(notebook()) == "length"


def test_another_event_loop_is_told_that_it_is_one() -> None:
    llm = AsyncLLM(**SMALL)
    asyncio.run(llm.start())

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            await finish(llm.generate(PROMPT))

    asyncio.run(elsewhere())


def test_engines_that_nobody_closes_are_collected_without_waiting_for_them() -> None:
    script = (
        "import asyncio, gc\n"
        "from nanovllm import AsyncLLM\n"
        "async def main():\n"
        "    await AsyncLLM(max_model_len=512).start()\n"
        "asyncio.run(main())\n"
        "gc.collect()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


def test_a_process_that_is_killed_leaves_no_engine_behind() -> None:
    script = (
        "import asyncio, sys\n"
        "from nanovllm import AsyncLLM\n"
        "async def main():\n"
        "    llm = AsyncLLM(max_model_len=512)\n"
        "    await llm.start()\n"
        "    sys.stdout.write(f'{llm.stats().workers[0].pid}\\n')\n"
        "    sys.stdout.flush()\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        pid = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"engine process {pid} is still there")
