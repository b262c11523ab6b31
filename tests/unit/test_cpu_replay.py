"""Kernels that are written down once and then repeated: they must change nothing, to the bit."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.kernels.cpu import replay
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.packing import PackedWeight
from nanovllm.kernels.cpu.replay import MAX_ROWS, Replays
from nanovllm.kernels.kernels import WeightSpec
from nanovllm.worker import loading
from tests.cpu_kernels import kernels_for, random
from tests.peft_oracle import write_peft
from tests.speech_engines import Ask, keys_of, make_engine, speak
from tests.thread_ranks import RankThreads

DEPTH, WIDTH = 48, 40

Directory = Callable[[str], Path]
Part = tuple[Tensor, ...]


@dataclass
class Log:
    """What was asked of all `Replays` since the test began.

    Attributes:
        recorded: Of each recording whether it could be made.
        num_run: Times that one was repeated.
    """

    recorded: list[bool] = field(default_factory=list)
    num_run: int = 0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    record, run = Replays._record, replay._Recording.run

    def count_record(*arguments: Any) -> Any:
        recording = record(*arguments)
        log.recorded.append(recording is not None)
        return recording

    def count_run(*arguments: Any) -> Any:
        log.num_run += 1
        return run(*arguments)

    monkeypatch.setattr(Replays, "_record", count_record)
    monkeypatch.setattr(replay._Recording, "run", count_run)
    return log


class Network:
    """A few kernels on end, which need memory for what comes between them.

    Args:
        dtype: Of the kernels.
        seed: Of its weights.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.kernels = kernels_for("portable", dtype)
        self.up = self._pack(2 * WIDTH, DEPTH, seed, gated=True)
        self.down = self._pack(DEPTH, WIDTH, seed + 1)
        self.norm = random(DEPTH, seed=seed + 2).to(dtype)
        self.num_computed = 0
        self.dtype = dtype

    def _pack(self, rows: int, depth: int, seed: int, gated: bool = False) -> PackedWeight:
        weight = random(rows, depth, seed=seed) * depth**-0.5
        parts = weight.chunk(1 + gated)
        return self.kernels.pack(WeightSpec(rows, depth, gated), parts, random(rows, seed=seed))

    def compute(self, x: Tensor, residual: Tensor) -> Part:
        self.num_computed += 1
        for _ in range(3):
            x, residual = self.kernels.add_rms_norm(x, residual, self.norm, 1e-5)
            x = self.kernels.linear(self.kernels.linear(x, self.up), self.down)
        return x, residual

    def inputs(self, rows: int, seed: int = 0) -> Part:
        x, residual = random(2, rows, DEPTH, seed=seed, dtype=self.dtype).unbind()
        return x.clone(), residual.clone()

    def check(self, rows: int, seed: int = 0, key: str = "network") -> None:
        """Compare what is repeated with what is computed."""
        expected = self.compute(*self.inputs(rows, seed))
        found = self.kernels.replay(key, self.compute, self.inputs(rows, seed))
        assert_same(found, expected)


def assert_same(found: Part, expected: Part) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def memory_of(kernels: CpuKernels) -> int:
    """Bytes that are kept for recordings, once the tensors of all are gone."""
    free = kernels._replays._memory._free
    return sum(size * len(pieces) for size, pieces in free.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_repeated_is_what_is_computed(dtype: torch.dtype, log: Log) -> None:
    network = Network(dtype)
    sizes = (1, 3, 256, 2, 17)
    for seed in range(4):
        for rows in sizes:
            network.check(rows, seed)
    assert log.recorded == [True] * len(sizes)
    assert log.num_run == 4 * len(sizes)


def test_it_is_written_down_once_for_a_shape(log: Log) -> None:
    network = Network()
    for seed in range(5):
        network.kernels.replay("network", network.compute, network.inputs(4, seed))
    assert network.num_computed == 1
    assert log.recorded == [True]


def test_shapes_and_keys_are_told_apart(log: Log) -> None:
    network = Network()

    def swapped(residual: Tensor, x: Tensor) -> Part:
        return network.compute(x, residual)

    inputs = network.inputs(5)
    for _ in range(2):
        network.check(5)
        found = network.kernels.replay("swapped", swapped, (inputs[1].clone(), inputs[0]))
        assert_same(found, network.compute(*network.inputs(5)))

    def project(x: Tensor) -> Part:
        return (network.kernels.silu_mul(x),)

    for width in (2, 8, 4) * 2:  # as many rows, and elements of which some other shape has as many
        for rows in (2, 4, 8):
            x = random(rows, width, seed=rows)
            assert_same(network.kernels.replay("project", project, (x,)), project(x))
    assert log.recorded == [True] * (2 + 9)


def test_results_are_nobody_else_s() -> None:
    network = Network()
    kept = []
    for seed in range(6):
        for rows in (4, 1 + seed):
            inputs = network.inputs(rows, seed)
            found = network.kernels.replay("network", network.compute, inputs)
            kept.append((found, network.compute(*network.inputs(rows, seed))))
    other = Network(seed=7)
    other.kernels = network.kernels
    other.check(4, key="other")
    for found, expected in kept:
        assert_same(found, expected)
    found = network.kernels.replay("network", network.compute, network.inputs(4))
    for tensor in found:
        tensor.fill_(torch.nan)
    network.check(4)


def test_the_inputs_of_a_repetition_are_read_alone() -> None:
    network = Network()
    for _ in range(3):
        inputs = network.inputs(4)
        network.kernels.replay("network", network.compute, inputs)
        assert_same(inputs, network.inputs(4))


def test_an_input_may_come_out_as_it_went_in() -> None:
    network = Network()

    def compute(x: Tensor, other: Tensor) -> Part:
        return other, network.kernels.linear(x, network.up), x

    for seed in range(3):
        inputs = network.inputs(3, seed)
        assert_same(network.kernels.replay("through", compute, inputs), compute(*inputs))


def test_views_of_what_a_kernel_made_are_repeated(log: Log) -> None:
    network = Network()

    def compute(x: Tensor) -> Part:
        out = network.kernels.linear(x[1:], network.up)
        first, second = out.split([1, 2])  # type: ignore[no-untyped-call]
        return first.view(-1, WIDTH // 2), network.kernels.silu_mul(second), out[:, 3:7]

    for seed in range(3):
        x = network.inputs(4, seed)[0]
        assert_same(network.kernels.replay("views", compute, (x,)), compute(x))
    assert log.recorded == [True]


def test_memory_that_is_still_used_is_not_handed_out() -> None:
    network = Network()
    kernels = network.kernels

    def compute(x: Tensor) -> Part:
        first = kernels.linear(x, network.up)
        second = kernels.linear(first, network.down)  # [num_rows, DEPTH]
        parts = [kernels.rms_norm(second, network.norm, 10.0**-i) for i in range(8)]
        del second
        view = parts[0][:2]
        again = kernels.linear(parts.pop(0), network.up)
        return view, again, *parts

    for rows in (4, 3, 4, 9):
        x = network.inputs(rows, rows)[0]
        assert_same(kernels.replay("fan", compute, (x,)), compute(x))


def test_memory_is_bounded() -> None:
    most = Network()
    most.check(MAX_ROWS)
    needed = memory_of(most.kernels)
    network = Network()
    for rows in (*range(1, MAX_ROWS + 1), *range(MAX_ROWS, 0, -7)):
        network.kernels.replay("network", network.compute, network.inputs(rows))
    pages = 16 * 4096  # what the smallest pieces take, too
    assert 0 < memory_of(network.kernels) <= 3 * needed + pages
    network.check(200)


def test_few_intermediate_results_are_kept_at_a_time() -> None:
    """However many kernels there are: what is gone makes room for what comes."""
    taken = []
    for repeats in (2, 40):
        network = Network()

        def compute(x: Tensor, network: Network = network, repeats: int = repeats) -> Part:
            for _ in range(repeats):
                x = network.kernels.rms_norm(x, network.norm, 1e-5)
                x = network.kernels.linear(network.kernels.linear(x, network.up), network.down)
            return (x,)

        x = network.inputs(64)[0]
        assert_same(network.kernels.replay("deep", compute, (x,)), compute(x))
        taken.append(memory_of(network.kernels))
    assert taken[0] == taken[1]


def test_what_is_no_kernel_is_computed_every_time(log: Log) -> None:
    network = Network()
    changing = [1.0]

    def compute(x: Tensor, residual: Tensor) -> Part:
        x, residual = network.compute(x, residual)
        return x * changing[0], residual

    for seed in range(4):
        changing[0] = seed + 0.5
        found = network.kernels.replay("scaled", compute, network.inputs(3, seed))
        x, residual = network.compute(*network.inputs(3, seed))
        assert_same(found, (x * changing[0], residual))
        network.check(3, seed)
    assert log.recorded == [False, True]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.add_(1.0),
        lambda x: x.t().contiguous().t().contiguous(),
        lambda x: x[torch.arange(len(x))],
        lambda x: torch.cat([x, x])[: len(x)],
        lambda x: x if x[0, 0].item() > 0 else -x,
        lambda x: torch.zeros_like(x) + x,
    ],
    ids=["in-place", "transposed", "gathered", "joined", "branch", "made"],
)
def test_nothing_of_torch_is_lost(spoil: Callable[[Tensor], Tensor], log: Log) -> None:
    network = Network()

    def compute(x: Tensor, residual: Tensor) -> Part:
        return network.compute(spoil(x), residual)

    for seed in range(3):
        found = network.kernels.replay("spoilt", compute, network.inputs(3, seed))
        assert_same(found, compute(*network.inputs(3, seed)))
    assert log.recorded == [False]


def test_an_error_leaves_the_kernels_as_they_were(log: Log) -> None:
    network = Network()

    def compute(x: Tensor, residual: Tensor) -> Part:
        network.compute(x, residual)
        raise ZeroDivisionError

    before = {name: getattr(network.kernels._library, name) for name in replay.REPLAYABLE}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            network.kernels.replay("network", compute, network.inputs(3))
        for name, kernel in before.items():
            assert getattr(network.kernels._library, name) is kernel
    assert log.recorded == []
    assert not network.kernels._replays._recordings
    network.check(3)
    network.check(3, seed=1)
    assert log.recorded == [True]


@pytest.mark.parametrize("rows", [0, MAX_ROWS + 1, 2 * MAX_ROWS])
def test_no_rows_and_many_are_computed(rows: int, log: Log) -> None:
    network = Network()
    for seed in range(2):
        network.check(rows, seed)
    assert log == Log()


def test_while_one_is_recorded_others_are_computed(log: Log) -> None:
    """Those of other engines, whose kernels are of the same library."""
    recorded, beside = Network(), Network(seed=9)
    expected = beside.compute(*beside.inputs(5))
    first, second = beside.inputs(5), beside.inputs(5)
    found = []

    def compute(x: Tensor, residual: Tensor) -> Part:
        with ThreadPoolExecutor(1) as pool:
            plain = pool.submit(beside.compute, *first)
            replayed = pool.submit(beside.kernels.replay, "beside", beside.compute, second)
            found.extend([plain.result(60), replayed.result(60)])
        return recorded.compute(x, residual)

    for seed in range(2):
        out = recorded.kernels.replay("network", compute, recorded.inputs(4, seed))
        assert_same(out, recorded.compute(*recorded.inputs(4, seed)))
    assert len(found) == 2
    for result in found:
        assert_same(result, expected)
    assert log.recorded == [True, True]


def test_one_part_s_recordings_do_not_disturb_another_thread() -> None:
    """Each has kernels of its own, as two engines of a process have."""
    together = threading.Barrier(2)

    def work(seed: int) -> None:
        network = Network(seed=seed)
        expected = {
            rows: network.compute(*network.inputs(rows, rows)) for rows in range(1, MAX_ROWS, 3)
        }
        together.wait(60)
        for _ in range(2):
            for rows, given in expected.items():
                found = network.kernels.replay(
                    "network", network.compute, network.inputs(rows, rows)
                )
                assert_same(found, given)
                if rows % 4 == seed:  # and what is just computed, while the other records
                    assert_same(network.compute(*network.inputs(rows, rows)), given)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, seed) for seed in range(2)]:
            done.result(120)


# Engines.

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "cpu_threads": 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 40,
    "max_model_len": 128,
    "num_kv_blocks": 60,
}
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
LENGTHS = (1, 30, 3, 17, 64, 2, 45, 9, 16, 33, 1, 5)

Scores = list[list[dict[int, float]]]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scores]:
    """Generates as without replays."""

    def run(model: Path, **options: Any) -> Scores:
        with monkeypatch.context() as patched:
            patched.setattr(replay, "MAX_ROWS", 0)
            return generate(model, **options)

    return run


def prompts(vocab_size: int = 320) -> list[list[int]]:
    """Of many lengths, two with the same beginning."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    return [*drawn, drawn[6][:40] + drawn[3]]


def scores(llm: LLM, **more: Any) -> Scores:
    """What each token was found to be worth, and those that it was preferred to."""
    return [
        [
            {token_id: entry.logprob for token_id, entry in entries.items()}
            for entries in output.outputs[0].logprobs or []
        ]
        for output in llm.generate(prompts(), GREEDY, use_tqdm=False, **more)
    ]


def generate(model: Path, **options: Any) -> Scores:
    with LLM(str(model), **OPTIONS | options) as llm:
        found = [*scores(llm), *scores(llm)]
        assert all(len(row) == GREEDY.max_tokens for row in found)
        if options.get("num_kv_blocks"):
            assert llm.engine.stats().num_preemptions
        return found


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2", "llama-bias", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_s_scores_are_the_same_bits(
    checkpoint: Directory, plain: Callable[..., Scores], log: Log, name: str, dtype: str
) -> None:
    model = checkpoint(name)
    expected = plain(model, dtype=dtype)
    assert log == Log()
    assert generate(model, dtype=dtype) == expected
    assert all(log.recorded)
    assert log.num_run > 2 * len(log.recorded)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "int8", "dtype": "bfloat16"},
        {"num_kv_blocks": 17, "block_size": 8},
        {"deterministic": True},
        {"disable_cascade_attn": True},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 512},
        {"quantization": "int8"},
        {"quantization": "int4", "dtype": "bfloat16"},
        {"attention_backend": "cpu"},
        {"cpu_threads": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_of_an_engine_change_nothing_in_that(
    checkpoint: Directory, plain: Callable[..., Scores], log: Log, options: dict[str, Any]
) -> None:
    model = checkpoint("qwen3")
    expected = plain(model, **options)
    assert generate(model, **options) == expected
    assert all(log.recorded)
    assert log.num_run


def test_attention_of_torch_is_computed(
    checkpoint: Directory, plain: Callable[..., Scores], log: Log
) -> None:
    """What follows the last layer's is repeated all the same where only some rows are wanted."""
    model = checkpoint("qwen3")
    expected = plain(model, attention_backend="sdpa")
    assert generate(model, attention_backend="sdpa") == expected
    assert not all(log.recorded)
    assert log.num_run
    log.recorded.clear()
    with LLM(str(model), **OPTIONS, attention_backend="sdpa") as llm:
        llm.generate([[1]] * 3, GREEDY, use_tqdm=False)  # all rows are wanted
    assert not any(log.recorded)


def test_what_follows_the_last_attention_is_written_down_by_its_rows_alone(
    checkpoint: Directory, log: Log
) -> None:
    """Not by the tokens of the step, too: there were as many recordings as pairs of both."""
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        for length in range(5, 35):
            llm.generate([[length] * length], GREEDY, use_tqdm=False)
    # Of each length what comes before, of one row what follows and the whole.
    assert len(log.recorded) == 30 + 2


def test_the_kernels_of_torch_compute_as_ever(checkpoint: Directory, log: Log) -> None:
    generate(checkpoint("qwen3"), cpu_isa="torch")
    assert log == Log()


def test_a_second_engine_starts_anew_and_both_go_on(checkpoint: Directory, log: Log) -> None:
    """Also when one of them is gone, and its memory with it."""
    model = checkpoint("qwen3")
    first, second = (LLM(str(model), **OPTIONS) for _ in range(2))
    with first:
        expected = scores(first)
        with second:
            assert scores(second) == expected
            assert scores(first) == scores(second)
        del second
        assert scores(first) == scores(first)
        assert all(log.recorded)


def test_engines_in_two_threads_do_not_disturb_each_other(
    checkpoint: Directory, plain: Callable[..., Scores]
) -> None:
    names = ("qwen3", "llama-bias")
    models = [checkpoint(name) for name in names]
    expected = [plain(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert list(pool.map(generate, models)) == expected


def test_steps_with_adapters_are_computed(
    checkpoint: Directory,
    tmp_path: Path,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = checkpoint("qwen3")
    adapters = [
        LoRARequest(str(n), n, str(write_peft(model, tmp_path / str(n), seed=n))) for n in (1, 2)
    ]
    given = [adapters[row % 2] for row in range(len(LENGTHS) + 1)]
    options = OPTIONS | {"enable_lora": True, "max_loras": 2}

    def run() -> list[Scores]:
        with LLM(str(model), **options) as llm:
            alone = scores(llm)
            before = log.num_run
            adapted = scores(llm, lora_request=given)
            assert log.num_run == before
            return [alone, adapted, scores(llm)]

    found = run()
    assert log.num_run
    assert found[0] == found[2] != found[1]
    with monkeypatch.context() as patched:
        patched.setattr(replay, "MAX_ROWS", 0)
        assert run() == found


def test_what_was_written_down_keeps_no_model_alive(checkpoint: Directory) -> None:
    with LLM(str(checkpoint("qwen3")), **OPTIONS) as llm:
        scores(llm)
        kernels = llm._runner.kernels
        assert isinstance(kernels, CpuKernels)
        recordings: Any = kernels._replays._recordings
        held = [item for key in recordings for item in key[0]]
    assert held
    assert not any(isinstance(item, nn.Module) for item in held)


def test_steps_of_several_ranks_are_computed(
    checkpoint: Directory, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "RankProcesses", RankThreads)
    model = checkpoint("qwen3")
    with LLM(str(model), **OPTIONS | {"tensor_parallel_size": 2}) as llm:
        found = [list(row[-1]) for row in scores(llm)]
    assert log == Log()
    with LLM(str(model), **OPTIONS) as llm:
        assert [list(row[-1]) for row in scores(llm)] == found


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_speech_is_the_same_bits(
    speech_checkpoint: Callable[..., Path], log: Log, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def run() -> list[Any]:
        engine, runner = make_engine(speech_checkpoint(kind), max_num_seqs=4, max_model_len=128)
        shape = runner.model.config
        generator = torch.Generator().manual_seed(0)
        asks = []
        for index, length in enumerate((3, 9, 1, 14, 6)):
            ids = torch.randint(5, 400, (length,), generator=generator).tolist()
            size = (1 + index, shape.patch_size, shape.feat_dim)
            prompt = torch.randn(size, generator=generator) if index % 2 else None
            options = {"cfg_value": (2.0, 1.0)[index % 2]}
            asks.append(Ask(*keys_of(ids, prompt), index, 2 + index, options))
        return speak(engine, asks, shape)

    found = run()
    assert log.num_run
    monkeypatch.setattr(replay, "MAX_ROWS", 0)
    for one, other in zip(found, run(), strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.patches.tobytes() == other.patches.tobytes()
        assert one.audio.tobytes() == other.audio.tobytes()
