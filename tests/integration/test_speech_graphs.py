"""Speech by captured graphs: recorded and replayed on the CPU, they must change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.batch import Batch
from nanovllm.kernels.kernels import WeightSpec
from nanovllm.kernels.lora import IndexedBatch
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.models.voxcpm.cfm import combine
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.runners.graphs import capture_sizes
from nanovllm.runners.speech import SpeechRunner
from tests.lora_oracle import write_adapter
from tests.recorded_graphs import RecordedGraphs, no_waits
from tests.speech_engines import Ask, Spoken, error, keys_of, make_engine, speak

CLOSE = 1e-4
OPTIONS: dict[str, Any] = {"cpu_isa": "torch", "max_num_seqs": 4, "max_model_len": 128}

Directory = Callable[..., Path]


def asks(shape: VoxCPMConfig, timesteps: tuple[int, ...] = (10, 4, 10)) -> list[Ask]:
    """Requests of several lengths and settings, of which some go on from a recording."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate((3, 9, 1, 14, 6, 4)):
        ids = torch.randint(5, 400, (length,), generator=generator).tolist()
        prompt = None
        if index % 2:
            size = (1 + index, shape.patch_size, shape.feat_dim)
            prompt = torch.randn(size, generator=generator)
        options = {
            "inference_timesteps": timesteps[index % len(timesteps)],
            "cfg_value": (2.0, 1.0, 3.5, 0.0)[index % 4],
            "temperature": (1.0, 0.6)[index % 2],
        }
        made.append(Ask(*keys_of(ids, prompt), index, 2 + 3 * index % 5, options))
    return made


def spoken_by(directory: Path, **options: Any) -> tuple[list[Spoken], SpeechRunner]:
    engine, runner = make_engine(directory, **OPTIONS | options)
    return speak(engine, asks(runner.model.config), runner.model.config), runner


def assert_alike(ours: list[Spoken], theirs: list[Spoken]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.finish_reason == other.finish_reason
        assert error(one.patches, other.patches) < CLOSE
        assert error(one.audio, other.audio) < CLOSE


@pytest.mark.parametrize("kind", ["v1", "v1.5", "v2"])
def test_graphs_change_nothing(
    graphs: RecordedGraphs, speech_checkpoint: Directory, kind: str
) -> None:
    """Batches of changing rows and several numbers of timesteps."""
    directory = speech_checkpoint(kind, stop_bias=-1.0)
    expected, _ = spoken_by(directory, enforce_eager=True)
    assert not graphs.num_captured
    for overlap in (False, True):
        ours, _ = spoken_by(directory, async_scheduling=overlap)
        assert_alike(ours, expected)
    assert graphs.num_replayed > 30


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 14, "block_size": 2, "async_scheduling": True},
        {"max_cudagraph_capture_size": 2},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 5},
    ],
    ids=["preemption", "more-rows-than-captured", "small-chunks"],
)
def test_graphs_change_nothing_where_memory_or_sizes_run_out(
    graphs: RecordedGraphs, speech_checkpoint: Directory, options: dict[str, Any]
) -> None:
    directory = speech_checkpoint("v2", stop_bias=-1.0)
    ours, _ = spoken_by(directory, **options)
    assert graphs.num_replayed
    assert_alike(ours, spoken_by(directory, **options, enforce_eager=True)[0])


def test_capturing_leaves_no_trace_in_what_is_spoken(
    graphs: RecordedGraphs, speech_checkpoint: Directory
) -> None:
    """At the start, and while others speak."""
    engine, runner = make_engine(speech_checkpoint("v2", stop_bias=-1.0), **OPTIONS)
    assert graphs.num_captured == 2 * len(capture_sizes(None, OPTIONS["max_num_seqs"]))
    tail, captured = runner._speech_tail, runner._captured_tail
    assert captured is not None
    tables = [tail.last_patches, *tail._vae_state.histories]
    assert not any(table[:-1].any() for table in tables)
    for ask in asks(runner.model.config)[:3]:
        ask.add_to(engine)
    for _ in range(2):
        engine.step()
    before = [table[:-1].clone() for table in tables]
    assert all(table.any() for table in before if table.numel())
    captured._ladder.graph(4, (7, False))
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[:-1], old)


def test_rows_that_pad_leave_no_trace(graphs: RecordedGraphs, speech_checkpoint: Directory) -> None:
    """Three rows in graphs of four: the fourth slot is as it was."""
    engine, runner = make_engine(speech_checkpoint("v1", stop_bias=-1.0), **OPTIONS)
    speak(engine, asks(runner.model.config, (10,))[:3], runner.model.config)
    tables = [runner._speech_tail.last_patches, *runner._speech_tail._vae_state.histories]
    assert not any(table[3].any() for table in tables)
    assert all(table.isfinite().all() for table in tables)


@pytest.mark.parametrize("eager", [False, True])
def test_no_step_is_waited_for_while_it_is_launched(
    graphs: RecordedGraphs,
    speech_checkpoint: Directory,
    monkeypatch: pytest.MonkeyPatch,
    eager: bool,
) -> None:
    """Once what is made the first time has been made; not even those that start a sequence."""
    engine, runner = make_engine(
        speech_checkpoint("v2", stop_bias=-1.0),
        **OPTIONS,
        async_scheduling=True,
        enforce_eager=eager,
    )
    requests = asks(runner.model.config)
    speak(engine, requests, runner.model.config)
    launch, num_watched = runner._launch, 0

    def watched(batch: Batch) -> Any:
        nonlocal num_watched
        num_watched += 1
        with no_waits():
            return launch(batch)

    monkeypatch.setattr(runner, "_launch", watched)
    speak(engine, requests, runner.model.config)
    assert num_watched > 5
    assert bool(graphs.num_replayed) != eager


def test_numbers_of_timesteps_are_captured_until_there_are_too_many(
    graphs: RecordedGraphs, speech_checkpoint: Directory
) -> None:
    directory = speech_checkpoint("v1", stop_bias=-1.0)
    engine, runner = make_engine(directory, **OPTIONS)
    plain, _ = make_engine(directory, **OPTIONS, enforce_eager=True)
    shape, keys = runner.model.config, keys_of([5, 6])[0]
    for num_timesteps, is_captured in ((50, True), (5, False), (10, True), (50, True), (4, True)):
        before = graphs.num_captured, graphs.num_replayed
        ask = Ask(keys, max_patches=1, options={"inference_timesteps": num_timesteps})
        assert_alike(speak(engine, [ask], shape), speak(plain, [ask], shape))
        # The prompt is not captured.
        assert graphs.num_replayed - before[1] == is_captured, num_timesteps
        assert (graphs.num_captured > before[0]) <= is_captured


class StackedAdapters:
    """Adapters that the device picks, as those of our GPU kernels, in plain torch."""

    def __init__(self, spec: WeightSpec, rank: int, num_slots: int) -> None:
        # The last one, of index -1, is that of rows without one.
        self._down = torch.zeros(num_slots + 1, rank, spec.depth)
        self._up = torch.zeros(num_slots + 1, spec.rows, rank)

    def put(self, slot: int, down: Tensor, up: Tensor) -> None:
        self._down[slot], self._up[slot] = down, up

    def clear(self, slot: int) -> None:
        self._up[slot] = 0.0

    def add(self, y: Tensor, x: Tensor, batch: IndexedBatch) -> Tensor:
        narrow = torch.einsum("nrd,nd->nr", self._down[batch.slots], x)
        return y + torch.einsum("nor,nr->no", self._up[batch.slots], narrow)


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of torch's kernels have such adapters."""
    monkeypatch.setattr(TorchKernels, "lora_weights", lambda self, *shape: StackedAdapters(*shape))
    monkeypatch.setattr(
        TorchKernels, "lora_batch", lambda self, slots: IndexedBatch.of(slots, torch.device("cpu"))
    )


@pytest.mark.usefixtures("stacked")
def test_rows_with_adapters_have_graphs_of_their_own(
    graphs: RecordedGraphs, speech_checkpoint: Directory, tmp_path: Path
) -> None:
    directory = speech_checkpoint("v1", stop_bias=-1.0)
    adapters = [write_adapter(directory, tmp_path / str(seed), seed=seed) for seed in range(2)]
    lora = OPTIONS | {"enable_lora": True, "max_loras": 2}
    keys = keys_of([5, 6, 7])[0]
    kinds = ((None, 10, 5), (0, 10, 4), (1, 3, 3), (None, 3, 2))
    requests = [
        Ask(keys, None, 1, num_patches, {"inference_timesteps": timesteps}, adapter_id)
        for adapter_id, timesteps, num_patches in kinds
    ]
    said = []
    for options in ({}, {"enforce_eager": True}, {"enforce_eager": True, "cpu_isa": "auto"}):
        engine, runner = make_engine(directory, **lora | options)
        assert runner.adapters is not None
        for adapter_id, path in enumerate(adapters):
            runner.adapters.load(adapter_id, path)
        said.append(speak(engine, requests, runner.model.config))
    assert graphs.num_replayed
    for other in said[1:]:
        assert_alike(said[0], other)
    assert error(said[0][1].patches[:4], said[0][0].patches[:4]) > 0.01


@pytest.mark.slow
def test_what_is_compiled_says_the_same(speech_checkpoint: Directory) -> None:
    directory = speech_checkpoint("v2", stop_bias=-1.0)
    ours, runner = spoken_by(directory, compile_model=True)
    assert runner.model.feat_decoder._combine is not combine
    assert_alike(ours, spoken_by(directory)[0])
