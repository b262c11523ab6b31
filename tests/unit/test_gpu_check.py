"""The command that checks and measures a GPU, on a CPU with toys: all of it but what needs CUDA."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ABSENT = "fastapi pydantic zmq msgspec cyclopts llguidance starlette uvicorn soundfile soxr rich"
EXPECTED = {
    "environment": ["device", "versions", "attention packages"],
    "kernels": [
        "copy, GB/s",
        "matrix product, bf16, TFLOP/s",
        "add_rms_norm, 4 rows, us",
        "kv_write with norms and rotary, 4 tokens, us",
        "decode attention, batch 3, context 48, us",
        "prefill attention, 1 x 8 behind 16, us",
        "sampling of 512, top-k 50 and top-p 0.9, 3 rows, us",
    ],
    "decode": [
        "0.6b decode, 1 stream, ms a token",
        "0.6b decode, 1 stream, device busy, us a step",
        "8b decode, 1 stream, share of the HBM bound",
        "0.6b decode, 3 streams, ms a token",
    ],
    "offline": [
        "0.6b offline, output tokens/s",
        "0.6b offline, times transformers' continuous batching",
    ],
    "arrivals": ["0.6b, p99 between tokens, 8k prompts arriving over none"],
    "speech": ["speech, 1 stream, RTF", "speech, 1 stream, first audio, ms"],
    "startup": ["0.6b start to first token, s", "speech start to first audio, s"],
}
"""Figures that a section must have measured."""

Module = Callable[[str], Any]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Return a function from a name below `benchmarks` to that module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


def measured(module: Module, directory: Path, section: str) -> dict[str, Any]:
    """Run a section in this process; its figures by their names."""
    path = directory / "figures"
    module("gpu_check").run_section(section, "cpu", True, path, 200.0)
    figures = {figure.name: figure for figure in module("gpu.figures").read_figures(path)}
    wrong = [figure for figure in figures.values() if figure.value == "failed"]
    assert not wrong, wrong
    return figures


@pytest.mark.parametrize("section", EXPECTED)
def test_each_section_runs_on_a_cpu(module: Module, tmp_path: Path, section: str) -> None:
    figures = measured(module, tmp_path, section)
    for name in EXPECTED[section]:
        value = figures[name].value
        assert isinstance(value, str) if section == "environment" else value > 0, name
    for figure in figures.values():
        assert figure.value != "skipped" or figure.note, figure


def test_goals_are_those_of_figures_that_are_measured(module: Module, tmp_path: Path) -> None:
    """And the page of figures names each."""
    goals = module("gpu.figures").GOALS
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name, goal in goals.items():
        assert f"| {name} |" in page, name
        assert str(goal) in page
    # With toys only the numbers of streams are others.
    expected = {name for names in EXPECTED.values() for name in names}
    assert goals.keys() - expected == {"speech, 64 streams, RTF"}


def test_the_command_needs_neither_an_installation_nor_the_server_s_packages(
    tmp_path: Path,
) -> None:
    """GPU machines are often lent with torch and little else."""
    shadow = tmp_path / "sitecustomize.py"
    shadow.write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT.split()!r}))\n")
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--tiny"]
    command += ["--sections", "environment,speech", "--json", str(report)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert result["settings"]["sections"] == ["environment", "speech"]
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert not [figure for figure in figures.values() if figure["value"] == "failed"]
    speech = figures["speech, 1 stream, RTF"]
    assert speech["goal"] == "<= 0.03"
    assert speech["met"] is None  # goals are for a GPU
    assert "speech, 1 stream, RTF" in done.stdout


def test_a_section_that_fails_or_hangs_takes_no_other_along(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = module("gpu_check")
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, time\n"
        "section = sys.argv[2]\n"
        "sys.exit('broken') if section == 'kernels' else time.sleep(60 * (section == 'decode'))\n"
    )
    monkeypatch.setattr(check, "__file__", str(child))
    monkeypatch.setattr(check, "SECTIONS", {"kernels": 1, "decode": 1, "offline": 1})
    arguments = ["gpu_check", "--device", "cpu", "--sections", "kernels,decode,offline"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--budget", "6"])
    figures = check.run_all(check._parse_arguments())
    assert [(f.section, f.value) for f in figures] == [("kernels", "failed"), ("decode", "failed")]
    assert "ended with 1: broken" in figures[0].note
    assert "stopped after" in figures[1].note


def test_outcomes_of_tests_are_counted(module: Module, tmp_path: Path) -> None:
    correctness = module("gpu.correctness")
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest, time\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
        "@pytest.mark.gpu\ndef test_d(): pass\n"
    )
    counts, output = correctness.run_tests([tests], 60)
    assert counts == {"passed": 2, "failed": 1, "skipped": 1}
    assert "test_b" in output
    tests.write_text("import time\ndef test_a(): time.sleep(60)\n")
    assert correctness.run_tests([tests], 3)[0]["timeout"] == 1
    assert not correctness.run_tests([], 5)[0]


@pytest.mark.parametrize(
    ("values", "is_right"),
    [([], False), (["3 passed"], True), (["3 passed", "failed"], False), (["skipped"], True)],
)
def test_the_exit_status_is_that_of_correctness(
    module: Module, values: list[str], is_right: bool
) -> None:
    figures = [module("gpu.figures").Figure("correctness", "x", value) for value in values]
    check = module("gpu_check")
    assert check.is_correct(figures, ["correctness", "kernels"]) is is_right
    assert check.is_correct(figures, ["kernels"])


def test_a_figure_that_was_cut_short_is_left_out(module: Module, tmp_path: Path) -> None:
    figures = module("gpu.figures")
    path = tmp_path / "figures"
    recorder = figures.Recorder(path, "decode")
    recorder("0.6b decode, 1 stream, ms a token", 0.7, share=0.4)
    with recorder.guard("something"):
        int("no")
    with path.open("a") as file:
        file.write('{"section": "decode", "na')
    (good, bad) = figures.read_figures(path)
    assert good.to_dict(True)["met"] is True
    assert good.cells(True) == ["0.6b decode, 1 stream, ms a token", "0.7", "40%", "<= 0.8 met"]
    assert bad.note.startswith("ValueError: invalid literal")
    assert "| 0.6b decode, 1 stream, ms a token | 0.7 | 40% | <= 0.8 |" in figures.as_markdown(
        [good], False
    )


def test_the_roofline_of_the_offline_workload_is_the_one_that_is_published(module: Module) -> None:
    """By hand: on an H200 some 36,000 tokens/s, of which the goal is half."""
    roofline, world = module("gpu.roofline"), module("gpu.world")
    workload = module("nanovllm.bench.offline").make_workload(151936)
    ceilings = roofline.Ceilings(copy=4.3e12, read=4.2e12, flops=7.9e14)
    model = world.MODELS["0.6b"]
    assert model.weight_bytes == pytest.approx(1.19e9, rel=0.01)
    assert world.MODELS["8b"].weight_bytes == pytest.approx(15.1e9, rel=0.01)
    seconds = roofline.offline_seconds(model, workload, ceilings)
    assert workload.num_output_tokens / seconds == pytest.approx(36_200, rel=0.01)
    assert 1e3 * roofline.decode_seconds(model, [640], ceilings) == pytest.approx(0.29, rel=0.05)


def test_times_are_medians_of_calls(module: Module) -> None:
    timer = module("gpu.timer").Timer(torch.device("cpu"), repeats=5, warm_ups=2)
    calls: list[int] = []
    assert 0 < timer.seconds(lambda: calls.append(1)) < 0.1
    assert len(calls) == 7


def test_times_on_a_gpu_are_between_events_behind_a_flush(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the device and its events, which record when they were reached."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")
            self.time = len(happened)

        def elapsed_time(self, end: "Event") -> float:
            assert happened[-1] == "synchronized"
            return float(end.time - self.time)

    class Buffer:
        def zero_(self) -> None:
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: happened.append("synchronized"))
    monkeypatch.setattr(torch, "empty", lambda *_args, **_options: Buffer())
    timer = module("gpu.timer").Timer(torch.device("cuda"), repeats=3, warm_ups=1)
    assert timer.seconds(lambda: happened.append("call")) == pytest.approx(2e-3)
    assert happened == ["call", *["flush", "event", "call", "event"] * 3, "synchronized"]


def test_a_profile_on_a_gpu_is_of_its_kernels_alone(module: Module) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        torch.ones(3).sum()
    rows = module("gpu.profiling").kernel_rows(profiled, False, 1)
    assert "aten::sum" in {row["name"] for row in rows}
    assert module("gpu.profiling").kernel_rows(profiled, True, 1) == []
