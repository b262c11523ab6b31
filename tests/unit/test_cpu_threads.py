"""One pool of threads in the process: how many, where they run, and what they survive."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.threads import num_usable_cores, usable_cpus
from nanovllm.kernels.kernels import WeightSpec
from tests.cpu_kernels import random, threads

linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc/self/task")


def run_alone(script: str, timeout: float = 60, torch_threads: int = 1) -> Any:
    """Run a script in a process of its own and return what it prints, parsed."""
    prelude = f"import json, os, time\nNUM_TORCH_THREADS = {torch_threads}\n" + PRELUDE
    command = [sys.executable, "-c", prelude + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PRELUDE = """
import torch
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.kernels import WeightSpec

def tasks():
    return {int(name) for name in os.listdir("/proc/self/task")}

def affinities(tids):
    return sorted(sorted(os.sched_getaffinity(tid)) for tid in tids)

def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])

torch.manual_seed(0)
# A matter of the scripts: a child that forks must not wait for torch's threads, which it lacks.
torch.set_num_threads(NUM_TORCH_THREADS)
library = load_library()
kernels = CpuKernels(library, torch.float32)
matrix, x = torch.randn(256, 64), torch.randn(40, 64)
packed = kernels.pack(WeightSpec(256, 64), [matrix], None)

def is_right():
    return bool(torch.allclose(kernels.linear(x, packed), x @ matrix.T, atol=1e-4))
"""


@linux
@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_the_pool_has_one_thread_less_than_it_computes_with(num_threads: int) -> None:
    script = f"""
before, mine = tasks(), os.sched_getaffinity(0)
library.start_threads({num_threads})
ours = tasks() - before
print(json.dumps([
    len(ours), library.num_threads, affinities(ours), mine == os.sched_getaffinity(0), is_right()
]))
"""
    count, told, affinities, unchanged, right = run_alone(script)
    assert (count, told) == (num_threads - 1, num_threads)
    cpus = usable_cpus()
    pinned = num_threads == len(cpus)
    expected = [[cpu] for cpu in cpus[1:]] if pinned else [cpus] * count
    assert affinities == expected
    assert unchanged, "the caller is not pinned: threads it starts later would inherit that"
    assert right


@linux
def test_a_process_of_fewer_cores_pins_to_those_it_has() -> None:
    cpus = usable_cpus()
    if len(cpus) < 2:
        pytest.skip("there is one core")
    script = f"""
os.sched_setaffinity(0, {{{cpus[-1]}}})
before = tasks()
library.start_threads(2)
print(json.dumps([affinities(tasks() - before), is_right()]))
"""
    assert run_alone(script) == [[[cpus[-1]]], True]


@linux
def test_generation_starts_no_thread_and_torch_computes_with_one() -> None:
    """The pool's threads are the only ones at work: torch's would take their cores."""
    script = """
from nanovllm import LLM, SamplingParams
from nanovllm.runners.text import TextRunner
from tests.cpu_kernels import finish_prefault
before = tasks()
library.start_threads(2)
pool = tasks() - before
llm = LLM(cpu_threads=2)
finish_prefault()  # its thread ends by itself
in_use, launched = set(), TextRunner._launch
def launch(self, batch):
    result = launched(self, batch)
    in_use.add(torch.get_num_threads())
    return result
TextRunner._launch = launch
outside = torch.get_num_threads()
ready = tasks()
def switches(tid):
    # A thread that sleeps all along makes none.
    lines = open(f"/proc/self/task/{tid}/status").read().splitlines()
    return [line for line in lines if "ctxt_switches" in line]
# What torch used to build the model falls asleep in the first steps.
llm.generate(["Once"], SamplingParams(max_tokens=24), use_tqdm=False)
idle = {tid: switches(tid) for tid in ready - pool - {os.getpid()}}
params = SamplingParams(temperature=0, max_tokens=24)
for prompts in (["Once"], ["Once upon a time there was"] * 5):
    llm.generate(prompts, params, use_tqdm=False)
moved = [tid for tid, count in idle.items() if switches(tid) != count]
print(json.dumps([
    len(pool), len(tasks() - ready), sorted(in_use), outside == torch.get_num_threads(), moved
]))
"""
    count, started, in_use, restored, moved = run_alone(script, torch_threads=2)
    assert count == 1
    assert started == 0
    assert in_use == [1]
    assert restored
    assert moved == []


def test_running_leaves_one_thread_to_torch_and_gives_the_rest_back() -> None:
    kernels = CpuKernels(load_library(), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with kernels.running():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_kernels_of_several_python_threads_take_turns() -> None:
    library = load_library()
    kernels = CpuKernels(library, torch.float32)
    matrices = [random(200, 96, seed=seed) for seed in range(4)]
    packed = [kernels.pack(WeightSpec(200, 96), [matrix], None) for matrix in matrices]
    inputs = [random(rows, 96, seed=rows) for rows in (1, 7, 30, 200)]
    expected = [x @ matrix.T for x, matrix in zip(inputs, matrices, strict=True)]
    wrong = []

    def work(index: int) -> None:
        for _ in range(60):
            y = kernels.linear(inputs[index], packed[index])
            if not torch.allclose(y, expected[index], atol=1e-3):
                wrong.append(index)

    with threads(library, 3):
        callers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for caller in callers:
            caller.start()
        # Meanwhile the pool changes its size.
        for num_threads in (2, 3) * 5:
            library.start_threads(num_threads)
        for caller in callers:
            caller.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_goes_on_alone_and_may_start_threads_of_its_own() -> None:
    script = """
library.start_threads(3)
assert is_right()
for _ in range(5):
    child = os.fork()
    if child == 0:
        alone = library.num_threads == 1 and is_right()
        library.start_threads(2)
        os._exit(0 if alone and library.num_threads == 2 and is_right() else 1)
    assert os.waitpid(child, 0)[1] == 0
print(json.dumps([library.num_threads, is_right()]))
"""
    assert run_alone(script) == [3, True]


@linux
def test_the_pool_is_restarted_200_times_without_a_leak() -> None:
    script = """
before = tasks()
def restart():
    for i in range(200):
        library.start_threads(1 + (i * 5 + 1) % 7)
        if i % 3 == 0:
            assert is_right()
    library.start_threads(1)
restart()
pages = resident_pages()
restart()
deadline = time.monotonic() + 5
while tasks() - before and time.monotonic() < deadline:
    time.sleep(0.01)  # who has been joined may be in /proc for a moment longer
print(json.dumps([len(tasks() - before), resident_pages() - pages]))
"""
    left, grown = run_alone(script)
    assert left == 0
    # A worker's workspace is megabytes: were they kept, this would be gigabytes.
    assert grown * 4096 < 32 * 2**20


@linux
def test_exit_with_idle_and_with_busy_threads() -> None:
    script = """
import threading, time
from nanovllm.kernels.attention_backend import AttentionConfig
from tests.unit.test_cpu_attention import World
library.start_threads(4)
out = torch.empty(40, 256)
world = World(library.isa, AttentionConfig(16, 8, 4, 64, torch.float32))
rows = world.add_rows([(3000, 1), (0, 2000)])
q, plan = world.queries(rows), world.backend.plan(world.batch(rows))
attended = torch.empty_like(q)
pointers = q.data_ptr(), world.cache.data_ptr(), 0, attended.data_ptr()
calls = 0
def forever():
    global calls
    while True:  # not through torch, which ends the process badly by itself
        library.linear(packed.reference, x.data_ptr(), 40, out.data_ptr(), False, False, False)
        world.library.attend(world.backend._reference, plan, *pointers)
        calls += 1
threading.Thread(target=forever, daemon=True).start()
while calls < 3:
    time.sleep(0.01)
print(json.dumps(is_right()), flush=True)
"""
    assert run_alone(script)


def test_the_quota_of_a_container_limits_the_cores(tmp_path: Path) -> None:
    cores = num_usable_cores(tmp_path)
    assert cores == len(usable_cpus()) or not usable_cpus()
    for text, expected in (
        ("max 100000", cores),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("150000 100000", min(cores, 2)),
        ("99900000 100000", cores),
    ):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert num_usable_cores(tmp_path) == expected, text
