"""Steps by captured graphs: recorded and replayed on the CPU, they must change nothing."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.errors import NotEnoughMemoryError
from nanovllm.kernels.attention_backend import BlockTables, PlanBuffers
from nanovllm.runners.graphs import CudaGraphs, GraphLadder, capture_sizes
from nanovllm.runners.text import TextRunner
from nanovllm.runners.transfers import HostCopies, StepInputs
from nanovllm.worker import loading
from tests.recorded_graphs import RecordedGraphs, no_waits

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "cpu_isa": "torch",
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "num_kv_blocks": 40,
}


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of all kinds, more than run at a time, of which some share a prefix."""
    draw = random.Random(0)
    prompts = [[draw.randrange(320) for _ in range(draw.randrange(1, 50))] for _ in range(14)]
    prompts[9] = prompts[3] + prompts[9]
    prompts[10] = list(prompts[3])
    special: dict[int, dict[str, Any]] = {
        2: {"logprobs": 2},
        5: {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        6: {"min_tokens": 4, "logit_bias": {7: 3.0}},
        8: {"allowed_token_ids": [1, 2, 3, 200]},
        11: {"prompt_logprobs": 1},
        12: {"n": 3},
    }
    params = [
        SamplingParams(
            temperature=draw.choice((0.0, 0.7, 1.2)),
            top_k=draw.choice((-1, 5, 40)),
            top_p=draw.choice((1.0, 0.8)),
            min_p=draw.choice((0.0, 0.05)),
            max_tokens=draw.randrange(1, 20),
            seed=index,
            ignore_eos=True,
            **special.get(index, {}),
        )
        for index in range(14)
    ]
    return prompts, params


def ids(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(c.token_ids) for c in output.outputs] for output in outputs]


def generate(model: Path, **options: Any) -> list[RequestOutput]:
    prompts, params = requests()
    with LLM(str(model), **OPTIONS | options) as llm:
        return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("name", ["qwen3-tied", "llama-bias", "mistral", "gemma3"])
@pytest.mark.parametrize("overlap", [False, True])
def test_graphs_change_nothing(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path], name: str, overlap: bool
) -> None:
    model = checkpoint(name)
    expected = generate(model, enforce_eager=True)
    assert not graphs.num_captured
    outputs = generate(model, async_scheduling=overlap)
    assert graphs.num_replayed > 40
    assert ids(outputs) == ids(expected)
    ours, theirs = (o[2].outputs[0].logprobs for o in (outputs, expected))
    assert ours is not None
    assert theirs is not None
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for token_id, logprob in one.items():
            assert logprob.logprob == pytest.approx(other[token_id].logprob, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 12, "async_scheduling": True},
        {"max_cudagraph_capture_size": 3},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 7},
    ],
    ids=["preemption", "more-rows-than-captured", "small-chunks"],
)
def test_graphs_change_nothing_where_memory_or_sizes_run_out(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path], options: dict[str, Any]
) -> None:
    model = checkpoint("qwen3")
    outputs = generate(model, **options)
    assert graphs.num_replayed
    assert ids(outputs) == ids(generate(model, **options, enforce_eager=True))


def test_graphs_change_nothing_of_a_mixture(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path]
) -> None:
    """By our GPU kernels: torch's look at who goes where."""
    model, prompts = checkpoint("qwen3-moe"), [[1, 2, 3], [5] * 9, [7, 8]]
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answers = []
    for eager in (False, True):
        options = OPTIONS | {"attention_backend": "triton", "enforce_eager": eager}
        with LLM(str(model), **options) as llm:
            answers.append(ids(llm.generate(prompts, greedy, use_tqdm=False)))
    assert graphs.num_replayed
    assert answers[0] == answers[1]


def test_graphs_leave_room_for_embeddings(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path]
) -> None:
    """The last position of a prompt that was cut into chunks is a row like a decode's."""
    model, made = checkpoint("qwen3"), []
    for eager in (False, True):
        options = OPTIONS | {"max_num_batched_tokens": 8, "enforce_eager": eager}
        with LLM(str(model), **options) as llm:
            stream = llm.stream([1, 2], SamplingParams(max_tokens=30, ignore_eos=True))
            next(stream)
            # Seven positions a step, beside the stream's one, leave the last one over.
            outputs = [llm.embed(list(range(n)), use_tqdm=False)[0] for n in (8, 15)]
            made.append([output.outputs.embedding for output in outputs])
            stream.close()
    assert graphs.num_replayed
    np.testing.assert_allclose(made[0], made[1], atol=1e-5)


def test_the_sampler_is_captured_for_rows_that_only_draw(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path]
) -> None:
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        at_start = graphs.num_captured
        assert at_start == 2 * len(capture_sizes(None, OPTIONS["max_num_seqs"]))
        plain = SamplingParams(max_tokens=6, seed=1, top_k=9, ignore_eos=True)
        llm.generate([[1, 2, 3]], plain, use_tqdm=False)
        assert graphs.num_replayed == 5 + 6  # the prompt's own step is not captured, but sampled
        scored = SamplingParams(max_tokens=6, logprobs=0, ignore_eos=True)
        llm.generate([[1, 2, 3]], scored, use_tqdm=False)
        assert graphs.num_replayed == 5 + 6 + 5
        assert graphs.num_captured == at_start


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"max_cudagraph_capture_size": 0}])
def test_graphs_can_be_turned_off(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path], options: dict[str, Any]
) -> None:
    with LLM(str(checkpoint("qwen3")), **OPTIONS | options) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert not graphs.num_captured


def test_a_backend_that_cannot_be_captured_runs_without(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorded = RecordedGraphs()
    monkeypatch.setattr(loading, "graph_capture", lambda config, device: recorded)
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert not recorded.num_captured
    assert "cannot be captured" in caplog.text


def test_no_step_is_waited_for_while_it_is_launched(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = TextRunner._launch

    def watched(self: TextRunner, batch: Any) -> Any:
        with no_waits():
            return launch(self, batch)

    monkeypatch.setattr(TextRunner, "_launch", watched)
    waits, wait = [], HostCopies.wait

    def counted(self: HostCopies) -> Any:
        waits.append(self)
        return wait(self)

    monkeypatch.setattr(HostCopies, "wait", counted)
    with LLM(str(checkpoint("qwen3")), **OPTIONS, async_scheduling=True) as llm:
        llm.generate(*requests(), use_tqdm=False)
        num_steps = llm.engine.stats().num_steps
    assert len(waits) <= num_steps  # one a step, and none where no row emits


def test_rows_that_pad_write_nowhere(
    graphs: RecordedGraphs, checkpoint: Callable[[str], Path]
) -> None:
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        runner = llm._runner
        assert runner._graphs is not None
        assert not any(cache.any() for cache in runner._kv_caches)  # captured, yet nothing written
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        for index in range(3):  # three rows in graphs of four
            llm.add_request([index + 1] * 5, params)
        before = runner._token_ids.clone()
        while llm.has_unfinished():
            llm.step()
        written = (runner._token_ids != before).nonzero()
        assert {int(slot) for slot, _ in written} <= {0, 1, 2, runner._num_slots}
        used = runner._kv_caches[0][0].flatten(0, 1).flatten(1).any(1).sum()
        assert used == 3 * (5 + 3)


def test_a_smaller_ladder_holds_what_a_larger_one_does() -> None:
    assert capture_sizes(None, 256) == [1, 2, 4, 8, *range(16, 257, 16)]
    assert capture_sizes(None, 2048)[-1] == 512
    assert capture_sizes(100, 256) == [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100]
    assert capture_sizes(None, 3) == [1, 2, 3]
    assert capture_sizes(None, 1) == [1]
    assert capture_sizes(0, 64) == []


def test_what_a_plan_puts_keeps_its_place() -> None:
    buffers = PlanBuffers()
    place = buffers.put("numbers", np.array([1, 2]), torch.device("cpu"))
    for numbers in ([1, 2], [3, 4], [3, 4], [1, 2]):
        assert buffers.put("numbers", np.array(numbers), place.device) is place
        assert place.tolist() == numbers


def test_no_memory_for_a_graph_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(self: CudaGraphs, run: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaGraphs, "_captured", captured)
    with pytest.raises(NotEnoughMemoryError, match="gpu_memory_utilization"):
        object.__new__(CudaGraphs)(lambda: None)


def test_a_ladder_captures_each_size_once_on_blank_inputs() -> None:
    log: list[Any] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: log.append("replayed")

    ladder = GraphLadder(
        capture,
        [1, 4],
        lambda size, variant: log.append(("blank", size, variant)),
        lambda size, variant: log.append(("run", size, variant)),
    )
    ladder.capture()
    assert log == [("blank", 4, None), ("run", 4, None), ("blank", 1, None), ("run", 1, None)]
    log.clear()
    assert [ladder.size_for(n) for n in (1, 2, 3, 4)] == [1, 4, 4, 4]
    ladder.graph(4)()
    ladder.graph(4, "lora")()
    assert log == ["replayed", ("blank", 4, "lora"), ("run", 4, "lora"), "replayed"]


def test_a_block_that_is_entered_twice_is_the_last_one() -> None:
    tables = BlockTables.zeros(2, 4, torch.device("cpu"))
    tables.append([(0, 0, [5, 6]), (1, 2, [7]), (0, 1, [8, 9])])  # the slot is another's by now
    assert tables.host.tolist() == [[5, 8, 9, 0], [0, 0, 7, 0]]
    tables.append([])
    assert tables.device.tolist() == tables.host.tolist()


def test_inputs_keep_their_addresses() -> None:
    inputs = StepInputs(
        {"slots": (np.int64, 9), "temperature": (np.float32, 0.5), "flags": (np.bool_, 1)},
        5,
        torch.device("cpu"),
    )
    addresses = {name: column.data_ptr() for name, column in inputs.columns.items()}
    assert all(address % 16 == 0 for address in addresses.values())
    inputs.fill({"slots": np.array([3, 4]), "temperature": np.array([1.5])})
    assert inputs.columns["slots"].tolist() == [3, 4, 9, 9, 9]
    assert inputs.columns["temperature"].tolist() == [1.5, 0.5, 0.5, 0.5, 0.5]
    inputs.fill({})
    assert inputs.columns["slots"].tolist() == [9] * 5
    assert inputs.columns["flags"].tolist() == [True] * 5
    assert {name: column.data_ptr() for name, column in inputs.columns.items()} == addresses
