"""Two processes that run one model: their outputs, and their ends."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from nanovllm import LLM, AsyncLLM, LoRARequest, SamplingParams
from nanovllm.config import DEMO_MODEL, EngineConfig, PoolConfig
from nanovllm.errors import EngineDeadError, InvalidRequestError, RankDiedError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.worker.loading import load_engine
from tests.peft_oracle import EVERY_LAYER, write_peft

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "cpu_threads": 1,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,  # prompts are computed in chunks
    "max_model_len": 192,
    "num_kv_blocks": 14,  # four sequences of the full length would need 48
    "enable_lora": True,
}
PROMPTS = [
    "Once upon a time",
    "The dog and the cat went to the park. " * 6 + "Then",
    "The dog and the cat went to the park. " * 6 + "Now",
    "Lily was sad because",
    "One day, a boy named Tom",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
PARAMS = {
    "greedy": GREEDY,
    "logprobs": replace(GREEDY, logprobs=3, prompt_logprobs=2),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95, seed=7, n=2, max_tokens=16),
    "penalties": replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5),
    "json": replace(
        GREEDY,
        ignore_eos=False,
        max_tokens=64,
        structured_outputs=StructuredOutputsParams(json=SCHEMA),
    ),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LLM, LLM]]:
    with LLM(**OPTIONS) as alone, LLM(tensor_parallel_size=2, **OPTIONS) as together:
        yield alone, together


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    path = write_peft(DEMO_MODEL, tmp_path_factory.mktemp("lora"), seed=1, modules=EVERY_LAYER)
    return LoRARequest("a", 1, str(path))


def others(llm: LLM) -> list[int]:
    """The pids of an LLM's ranks."""
    pids: list[int] = llm._runner._ranks.pids  # type: ignore[attr-defined]
    return pids


def ended(pids: list[int], timeout: float = 5) -> bool:
    deadline = time.monotonic() + timeout
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", PARAMS)
def test_outputs_are_those_of_one_process(
    pair: tuple[LLM, LLM], adapter: LoRARequest, kind: str, lora: bool
) -> None:
    prompts = PROMPTS[:2] if kind == "json" else PROMPTS
    request = adapter if lora else None
    alone, together = (llm.generate(prompts, PARAMS[kind], False, request) for llm in pair)
    for one, other in zip(alone, together, strict=True):
        for ours, theirs in zip(one.outputs, other.outputs, strict=True):
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
            if kind == "json":
                assert set(json.loads(theirs.text)) == {"name", "old"}
            for at, there in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                assert list(at) == list(there)
                assert [s.logprob for s in at.values()] == pytest.approx(
                    [s.logprob for s in there.values()], abs=1e-4
                )


def test_prefixes_are_found_and_sequences_preempted(pair: tuple[LLM, LLM]) -> None:
    _, together = pair
    before = together.engine.stats().num_preemptions
    outputs = [llm.generate(PROMPTS, replace(GREEDY, max_tokens=60), False) for llm in pair]
    texts = [[output.outputs[0].token_ids for output in each] for each in outputs]
    assert texts[0] == texts[1]
    assert together.engine.stats().num_preemptions > before
    (again,) = together.generate(PROMPTS[1], GREEDY, False)
    assert (again.num_cached_tokens or 0) > 32


def test_a_request_that_is_refused_or_dropped_leaves_the_ranks_alike(
    pair: tuple[LLM, LLM], tmp_path: Path
) -> None:
    _, together = pair
    with pytest.raises(InvalidRequestError, match="not found"):
        together.add_lora(LoRARequest("none", 9, str(tmp_path / "none")))
    stream = together.stream(PROMPTS[0], GREEDY)
    next(stream)
    stream.close()
    (one,), (other,) = (llm.generate(PROMPTS[3], GREEDY, False) for llm in pair)
    assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_an_interrupt_waits_for_the_end_of_the_step(
    pair: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, together = pair
    runner = together._runner._runner  # type: ignore[attr-defined]
    launch, num_launched = runner.launch, 0

    def interrupted(batch: Any) -> Any:
        nonlocal num_launched
        num_launched += 1
        if num_launched == 3:
            os.kill(os.getpid(), 2)
        return launch(batch)

    monkeypatch.setattr(runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together.generate(PROMPTS, GREEDY, False)
    outputs = [llm.generate(PROMPTS, GREEDY, False) for llm in pair]
    tokens = [[output.outputs[0].token_ids for output in each] for each in outputs]
    assert tokens[0] == tokens[1]


def test_a_rank_that_dies_ends_the_engine_and_no_other(pair: tuple[LLM, LLM]) -> None:
    llm = LLM(tensor_parallel_size=2, **OPTIONS)
    (pid,) = others(llm)
    stream = llm.stream(PROMPTS[0], replace(GREEDY, max_tokens=150))
    next(stream)
    os.kill(pid, 9)
    begun = time.monotonic()
    message = rf"tensor-parallel rank 1 \(pid {pid}\) died: exit code -9"
    with pytest.raises(RankDiedError, match=message):
        list(stream)
    assert time.monotonic() - begun < 3
    with pytest.raises(RankDiedError, match=message):
        llm.generate(PROMPTS, GREEDY, False)
    llm.close()
    assert len(pair[1].generate(PROMPTS[0], GREEDY, False)) == 1


@pytest.mark.slow
def test_errors_at_start_are_those_of_one_process(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint("llama"), broken)
    before = psutil.Process().children()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InvalidRequestError, match=r"config\.json makes it") as caught:
        LLM(str(broken), tensor_parallel_size=2, **OPTIONS)
    assert "[100, 64]" in str(caught.value)
    assert psutil.Process().children() == before


def test_what_cannot_be_shared_out_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.worker.loading.RankProcesses", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    (tmp_path / "config.json").write_text('{"architecture": "voxcpm"}')
    for directory, device, message in (
        (DEMO_MODEL, "cpu", "does not divide the model's 4 query heads"),
        (tmp_path, "cpu", "speech models run on one device"),
        (DEMO_MODEL, "cuda", "it needs as many CUDA devices, and 1 can be seen"),
    ):
        config = EngineConfig(tensor_parallel_size=3, device=device)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match=message):
            load_engine(config, directory)


def test_engines_have_devices_of_their_own() -> None:
    assert PoolConfig(devices=[3, 1, 2, 0]).device_groups(2) == [[3, 1], [2, 0]]
    assert PoolConfig(replicas=2).device_groups(4) == [None, None]
    assert PoolConfig(devices=[0, 1, 2, 3], replicas=2).device_groups(2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"there are, 2: leave replicas=4 out"):
        PoolConfig(devices=[0, 1, 2, 3], replicas=4).device_groups(2)
    for options, message in (
        ({"devices": [0, 1, 2]}, "must be a multiple of tensor_parallel_size=2"),
        ({"replicas": 2}, "2 engines of tensor_parallel_size=2 need to know their CUDA devices"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            asyncio.run(AsyncLLM(tensor_parallel_size=2, **options).start())


SCRIPT = """
import os, time
from nanovllm import LLM
llm = LLM(tensor_parallel_size=2, device="cpu", cpu_threads=1, max_model_len=64)
print(*llm._runner._ranks.pids, flush=True)
os.kill(os.getpid(), 9) if {kill} else llm.generate("a", use_tqdm=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_no_rank_outlives_its_program(kill: bool) -> None:
    """Which guards no `__main__`, and comes from no file."""
    run = subprocess.run(
        [sys.executable, "-"],
        input=SCRIPT.format(kill=kill),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == (-9 if kill else 0), run.stderr
    assert ended([int(pid) for pid in run.stdout.split()])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_starts_an_engine_anew_whose_rank_died_or_hangs(number: int) -> None:
    async def run() -> None:
        options = OPTIONS | {"enable_lora": False, "step_timeout": 5.0}
        llm = AsyncLLM(tensor_parallel_size=2, **options)
        try:
            await llm.start()
            expected = await complete(llm)
            worker = psutil.Process(worker_pid(llm))
            (rank,) = worker.children()
            assert "nanovllm.worker.rank" in rank.cmdline()
            assert os.getpgid(rank.pid) == worker.pid
            rank.send_signal(number)
            with pytest.raises(EngineDeadError):
                await complete(llm)
            await until_ready(llm)
            assert not worker.is_running()
            assert await asyncio.to_thread(ended, [rank.pid])
            assert await complete(llm) == expected
            pids = [child.pid for child in psutil.Process(worker_pid(llm)).children()]
        finally:
            await llm.close()
        assert await asyncio.to_thread(ended, pids)

    asyncio.run(run())


async def complete(llm: AsyncLLM) -> list[int]:
    params = replace(GREEDY, structured_outputs=StructuredOutputsParams(regex="[a-z ]{40}"))
    token_ids: list[int] = []
    async for output in llm.generate(PROMPTS[0], params):
        token_ids = list(output.outputs[0].token_ids)
    return token_ids


def worker_pid(llm: AsyncLLM) -> int:
    (stats,) = llm.stats().workers
    return int(stats.pid or 0)


async def until_ready(llm: AsyncLLM) -> None:
    deadline = time.monotonic() + 60
    while not llm.is_ready:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
