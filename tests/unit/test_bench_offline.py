"""The offline benchmark: the family's workload to the token, and figures that add up."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from nanovllm.bench.machine import inspect_machine, total_memory
from nanovllm.bench.offline import Workload, make_workload, run_offline
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.cpu.threads import num_usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanovllm.llm import LLM


def test_workload_is_nano_vllm_s() -> None:
    workload = make_workload(vocab_size=151936)
    assert len(workload.prompts) == 256
    assert workload.num_prompt_tokens == 142_827
    assert workload.num_output_tokens == 133_966
    assert workload.longest == 2_011
    randint = Random(0).randint
    prompts = [[randint(0, 10000) for _ in range(randint(100, 1024))] for _ in range(256)]
    assert workload.prompts == prompts
    assert workload.output_lens == [randint(100, 1024) for _ in range(256)]


def test_small_vocabulary_bounds_the_ids() -> None:
    workload = make_workload(vocab_size=320)
    assert {token_id for prompt in workload.prompts for token_id in prompt} == set(range(320))


def test_small_workload() -> None:
    workload = make_workload(vocab_size=4096, small=True)
    assert len(workload.prompts) == len(workload.output_lens) == 16
    assert all(50 <= len(prompt) <= 256 for prompt in workload.prompts)
    assert all(32 <= output_len <= 64 for output_len in workload.output_lens)
    assert workload == make_workload(vocab_size=4096, small=True)


@pytest.fixture
def llm(checkpoint: "Callable[[str], Path]") -> "Iterator[LLM]":
    from nanovllm.llm import LLM

    with LLM(str(checkpoint("qwen3")), max_num_seqs=4, max_num_batched_tokens=64) as llm:
        yield llm


def test_figures_add_up(llm: "LLM") -> None:
    workload = Workload([[i] * 40 for i in range(6)], [10, 20, 3, 4, 5, 6])
    seen: list[int] = []
    result = run_offline(llm, workload, seen.append)
    assert (result.num_seqs, result.num_prompt_tokens, result.num_output_tokens) == (6, 240, 48)
    assert seen[-1] == 48
    assert seen == sorted(seen)
    # The last token of each sequence is never fed back.
    assert result.prefill_tokens + result.decode_tokens == 240 + 48 - 6
    assert result.prefill_tokens >= 240
    assert result.prefill_time + result.decode_time <= result.wall_time
    assert result.output_rate == pytest.approx(48 / result.wall_time)
    assert result.total_rate == pytest.approx(288 / result.wall_time)
    assert result.settings["max_num_seqs"] == 4
    assert asdict(result)["machine"]["versions"]["torch"]


def test_second_run_counts_only_itself(llm: "LLM") -> None:
    workload = Workload([[i] * 20 for i in range(3)], [4, 4, 4])
    run_offline(llm, workload)
    again = run_offline(llm, workload)
    assert again.num_output_tokens == 12
    assert again.num_cached_tokens == 3 * 16


def test_context_too_short_is_said(llm: "LLM") -> None:
    workload = Workload([[1] * 600], [10])
    with pytest.raises(InvalidRequestError, match="needs a context of 610 tokens, and max_model"):
        run_offline(llm, workload)


def write(directory: Path, **files: Any) -> Path:
    """Write the files of a cgroup; `_` in their names stands for a dot."""
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(f"{text}\n")
    return directory


def test_limits_of_the_cgroup_count(tmp_path: Path) -> None:
    assert num_usable_cores(write(tmp_path, cpu_max="50000 100000")) == 1
    assert num_usable_cores(write(tmp_path, cpu_max="max 100000")) == num_usable_cores(Path("/no"))
    assert total_memory(write(tmp_path, memory_max=1 << 20)) == 1 << 20
    assert total_memory(write(tmp_path, memory_max="max")) == total_memory(Path("/no"))


def test_machine_names_what_figures_need() -> None:
    machine = inspect_machine()
    assert machine.cpu_model
    assert machine.num_cores >= 1
    assert 0 < machine.memory_available <= machine.memory_total
    assert {"nanovllm", "python", "torch"} <= set(machine.versions)
