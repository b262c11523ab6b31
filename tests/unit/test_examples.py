"""Examples, and the benchmarks under the family's names, run as their first lines say."""

import io
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.bench import offline
from nanovllm.bench.offline import Workload, draw_workload
from tests.serving import Server

ROOT = Path(__file__).parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"
WHERE = r"Hardware: .+ cores; model: bundled demo model, bfloat16 on cpu\n"


class Terminal:
    """Runs scripts in this process, as `python SCRIPT ARGUMENTS` would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("NO_COLOR", "1")

    def run(self, script: Path, *arguments: str, stdin: str = "") -> str:
        """What the script writes to its standard output."""
        self._monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._monkeypatch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")
        return self._capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_example_answers_every_prompt(terminal: Terminal) -> None:
    shown = terminal.run(EXAMPLES / "example.py")
    assert re.findall("Prompt: '(.*)'", shown) == [
        "introduce yourself",
        "list all prime numbers within 100",
    ]
    assert len(re.findall("Completion: .", shown)) == 2


def test_smoke_test_says_what_was_cached(terminal: Terminal) -> None:
    shown = terminal.run(EXAMPLES / "smoke_test.py", "--max-new-tokens", "5")
    assert "18 prompt tokens, 16 of them cached; 5 generated; finish reason length" in shown
    shown = terminal.run(EXAMPLES / "smoke_test.py", "--max-new-tokens", "4", "Hello mini-sglang")
    assert shown.startswith("Hello mini-sglang")
    assert " 4 generated" in shown


@pytest.mark.parametrize(("flags", "num_remembered"), [([], 0), (["--multi-turn"], 2)])
def test_cli_demo_remembers_turns_if_told_to(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, flags: list[str], num_remembered: int
) -> None:
    from nanovllm import LLM

    asked: list[int] = []
    stream_chat = LLM.stream_chat

    def counting(llm: LLM, messages: list[dict[str, str]], params: object) -> object:
        asked.append(len(messages))
        return stream_chat(llm, messages, params)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "stream_chat", counting)
    lines = "Tell me of a wolf\nAnd then?\n\nnot read\n"
    shown = terminal.run(EXAMPLES / "cli_demo.py", *flags, "--max-new-tokens", "8", stdin=lines)
    assert asked == [1, 1 + num_remembered]
    assert len(shown.splitlines()) >= 2


def test_async_example_runs_all_at_once() -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "async_example.py")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert run.stdout.count("Once upon a time") >= 2
    assert "Traceback" not in run.stderr


def test_openai_client_streams_an_answer(terminal: Terminal, server: Server) -> None:
    pytest.importorskip("openai")
    shown = terminal.run(EXAMPLES / "openai_client.py", f"{server.url}/v1")
    assert re.search(r"\(\d+ tokens of demo_model\)\n$", shown)


def test_structured_output(terminal: Terminal) -> None:
    shown = terminal.run(EXAMPLES / "structured_output.py")
    assert re.search(r"forest\. \{\"kind\": \"\w+\", \"legs\": \d, \"speaks\": \w+\}\n", shown)
    assert re.search(r"good day\? (yes|no)\n", shown)
    assert re.search(r"meet\? [01]\d:[0-5]\d\n", shown)
    assert re.search(r"The \w+ has \d legs\.\n$", shown)


def test_tools(terminal: Terminal, server: Server) -> None:
    pytest.importorskip("openai")
    shown = terminal.run(EXAMPLES / "tools.py", f"{server.url}/v1")
    call, answer = shown.split("\n", 1)
    assert re.fullmatch(r"get_weather\(\{\"city\": .*\}\): [\d.]+ degrees", call)
    assert answer.strip()


def test_mini_bench(terminal: Terminal) -> None:
    shown = terminal.run(BENCHMARKS / "mini_bench.py")
    total = r"Total: (\d+)tok, Time: \d+\.\d\ds, Throughput: \d+\.\d\dtok/s\n"
    match = re.fullmatch(total + WHERE, shown)
    assert match is not None
    assert 10 <= int(match[1]) <= 20


def test_bench_prints_the_family_s_line(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def smaller(vocab_size: int) -> Workload:
        return draw_workload(vocab_size, 4, (5, 9), (5, 5))

    monkeypatch.setattr(offline, "make_workload", smaller)
    assert terminal.run(BENCHMARKS / "bench.py").startswith("Total: 20tok, Time: ")


def test_serving_bench(terminal: Terminal) -> None:
    script = BENCHMARKS / "serving_bench.py"
    shown = terminal.run(script, "--num-requests", "3", "--request-rate", "100")
    figures = (
        r"--- Benchmark Results ---\nTotal time: [\d.]+s\nRequests sent: 3\n"
        r"Throughput: [\d.]+ tokens/s\nAverage TTFT: [\d.]+ ms\n"
        r"Average TPOT: [\d.]+ ms/token\nAverage latency: [\d.]+ s\n-+\n"
    )
    assert re.fullmatch(figures + WHERE, shown)


def test_local_bench(terminal: Terminal) -> None:
    script = BENCHMARKS / "local_bench.py"
    shown = terminal.run(
        script, "Once upon a time", "--max-new-tokens", "8", "--log-level", "error"
    )
    assert "Benchmarking prompt='Once upon a time' | max_new_tokens=8\n" in shown
    assert len(re.findall(r"tokens=8 duration=[\d.]+s throughput=[\d.]+ tok/s", shown)) == 2


def test_server_bench_leaves_out_what_does_not_answer(terminal: Terminal, server: Server) -> None:
    script = BENCHMARKS / "server_bench.py"
    urls = ["--sglang-url", "http://127.0.0.1:9", "--url", server.url]
    shown = terminal.run(script, *urls, "--max-new-tokens", "8", "Once upon a time")
    assert "other      left out: http://127.0.0.1:9 does not answer" in shown
    assert re.search(r"nanovllm   TTFB=[\d.]+s duration=[\d.]+s tokens=8 throughput=", shown)


@pytest.mark.slow
def test_server_bench_starts_a_server(terminal: Terminal) -> None:
    shown = terminal.run(BENCHMARKS / "server_bench.py", "--max-new-tokens", "8", "Once")
    assert "tokens=8" in shown
