"""The command line: flags, files and the environment; what it prints; how it fails."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nanovllm.bench.machine import Machine
from nanovllm.bench.offline import OfflineResult, Workload, make_workload
from nanovllm.cli import main
from nanovllm.cli.options import SamplingFlags
from nanovllm.config import ALIASES, EngineConfig
from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams

STORY = ["Once", " upon", " a time", "."]


class FakeLLM:
    """Stands in for `LLM`; writes the same story and remembers what it was asked."""

    made: "FakeLLM"

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.closed = False
        FakeLLM.made = self

    @classmethod
    def from_config(cls, config: EngineConfig) -> "FakeLLM":
        return cls(config)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7, top_p=0.95)

    def generate(
        self, prompt: str, params: SamplingParams, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        self.asked.append((prompt, params))
        return [output(STORY, params.n, "stop")]

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        self.asked.append((prompt, params))
        for count in range(len(STORY)):
            yield output(STORY[: count + 1])

    def stream_chat(
        self, messages: list[dict[str, str]], params: SamplingParams
    ) -> Iterator[RequestOutput]:
        return self.stream([dict(message) for message in messages], params)


def output(words: list[str], n: int = 1, finish_reason: str | None = None) -> RequestOutput:
    """A request of three prompt tokens that came at 10 s and has these words so far."""
    ids = list(range(len(words)))
    return RequestOutput(
        request_id="0",
        prompt="",
        prompt_token_ids=[1, 2, 3],
        outputs=[
            CompletionOutput(index, "".join(words), ids, finish_reason=finish_reason)
            for index in range(n)
        ],
        metrics=RequestMetrics(10.0, 10.25, 10.5, 12.0),
        num_cached_tokens=2,
    )


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in os.environ:
        if variable.startswith(("NANOVLLM_", "NANO_VLLM_", "MODEL_")):
            monkeypatch.delenv(variable)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nanovllm.llm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nanovllm.llm", module)


def pipe(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Make this text the standard input."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with status 2 and one line; return what follows the prefix."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("nanovllm: error: ")
    return shown.err.removeprefix("nanovllm: error: ").strip()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["generate", "--help"], ["bench", "offline", "--help"]],
)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from nanovllm.cli import main; main(sys.argv[1:]);"
        "sys.stderr.write(str([m for m in ('torch', 'numpy') if m in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert run.stderr == "[]"
    assert run.stdout


def test_help_lists_commands_and_says_what_every_option_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["--help"])
    listed = capsys.readouterr().out
    assert all(command in listed for command in ("generate", "chat", "doctor", "bench"))
    main(["generate", "--help"])
    flags = capsys.readouterr().out
    for option in (*fields(EngineConfig), *fields(SamplingFlags)):
        flag = f"--{option.name.replace('_', '-')}"
        line = next(line for line in flags.splitlines() if f" {flag} " in line)
        assert len(line.split()) > 6, f"{flag} has no help"


def test_sampling_flags_are_sampling_parameters() -> None:
    ours, params = (
        {f.name: str(f.type) for f in fields(cls)} for cls in (SamplingFlags, SamplingParams)
    )
    assert set(ours) <= set(params)


@pytest.mark.usefixtures("fake_llm")
class TestGenerate:
    def test_streams_the_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["generate", "Hello"])
        assert capsys.readouterr().out == "Once upon a time.\n"
        assert FakeLLM.made.closed
        prompt, params = FakeLLM.made.asked[0]
        assert prompt == "Hello"
        assert (params.max_tokens, params.temperature, params.top_p) == (200, 0.7, 0.95)

    def test_writes_each_piece_as_it_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[str] = []
        stdout = io.StringIO()
        monkeypatch.setattr(stdout, "flush", lambda: written.append(stdout.getvalue()))
        monkeypatch.setattr(sys, "stdout", stdout)
        main(["generate", "Hello"])
        assert written[:4] == ["Once", "Once upon", "Once upon a time", "Once upon a time."]

    def test_flags_reach_the_sampler(self) -> None:
        flags = "--temperature 1 --top-k -1 --presence-penalty -1.5 --max-tokens 5 --ignore-eos"
        main(["generate", "Hello", *flags.split(), "--stop", "a", "--stop", "b c"])
        params = FakeLLM.made.asked[0][1]
        # A flag at the field's own default still wins over the checkpoint's setting.
        assert (params.temperature, params.top_p, params.top_k) == (1.0, 0.95, -1)
        assert (params.presence_penalty, params.max_tokens, params.ignore_eos) == (-1.5, 5, True)
        assert params.stop_strings == ["a", "b c"]

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["generate", "Hello", "--json"])
        assert json.loads(capsys.readouterr().out) == {
            "text": "Once upon a time.",
            "token_ids": [0, 1, 2, 3],
            "finish_reason": "stop",
            "stop_reason": None,
            "num_prompt_tokens": 3,
            "num_output_tokens": 4,
            "num_cached_tokens": 2,
            "timings": {"scheduled": 0.25, "first_token": 0.5, "finished": 2.0},
        }

    def test_json_of_several_completions(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["generate", "Hello", "--json", "-n", "3"])
        shown = json.loads(capsys.readouterr().out)
        assert [completion["text"] for completion in shown["outputs"]] == ["Once upon a time."] * 3
        assert shown["num_output_tokens"] == 12

    def test_several_completions_need_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "needs --json" in fails(capsys, "generate", "Hello", "-n", "2")

    def test_prompt_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "prompt.txt"
        path.write_text("Two\nlines é\n", encoding="utf-8")
        main(["generate", "--file", str(path)])
        assert FakeLLM.made.asked[0][0] == "Two\nlines é"

    def test_prompt_from_a_pipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "From a pipe\n")
        main(["generate"])
        assert FakeLLM.made.asked[0][0] == "From a pipe"

    def test_prompt_that_looks_like_a_flag(self) -> None:
        main(["generate", "--", "--page-size"])
        assert FakeLLM.made.asked[0][0] == "--page-size"

    def test_no_prompt_at_a_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipe(monkeypatch, "")
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        assert fails(capsys, "generate").startswith("no prompt: give one in quotes")

    def test_prompt_that_is_not_text(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipe(monkeypatch, b"\xff\xfe")
        assert fails(capsys, "generate").startswith("the prompt is not UTF-8 text")

    def test_missing_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        message = fails(capsys, "generate", "--file", "nowhere.txt")
        assert message == "nowhere.txt: No such file or directory"

    def test_prompt_and_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert fails(capsys, "generate", "a", "--file", "b") == (
            "give the prompt or --file, not both"
        )


@pytest.mark.usefixtures("fake_llm")
class TestOptions:
    def test_defaults_environment_file_flags(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("NANOVLLM_MAX_NUM_SEQS", "1")
        monkeypatch.setenv("NANOVLLM_BLOCK_SIZE", "1")
        monkeypatch.setenv("NANOVLLM_NUM_KV_BLOCKS", "1")
        path = tmp_path / "options.yaml"
        path.write_text("block_size: 2\nnum-kv-blocks: 2\nenable_prefix_caching: false\n")
        main(["generate", "Hello", "--num-kv-blocks", "3", "--config", str(path)])
        assert FakeLLM.made.config == EngineConfig(
            max_num_seqs=1, block_size=2, num_kv_blocks=3, enable_prefix_caching=False
        )

    def test_sampling_flags_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "options.yaml"
        path.write_text('temperature: 0.1\nmax_tokens: 7\nstop: ["a", "b"]\n')
        main(["--config", str(path), "generate", "Hello", "--max-tokens", "8"])
        params = FakeLLM.made.asked[0][1]
        assert (params.temperature, params.max_tokens, params.stop_strings) == (0.1, 8, ["a", "b"])

    def test_flags_turn_the_environment_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NANOVLLM_ENFORCE_EAGER", "1")
        main(["generate", "Hello", "--no-enforce-eager"])
        assert not FakeLLM.made.config.enforce_eager

    @pytest.mark.parametrize("alias", ["num_kvcache_blocks", "num-kvcache-blocks", "num_pages"])
    def test_names_of_the_family(self, alias: str, tmp_path: Path) -> None:
        for arguments in ([f"--{alias}", "9"], [f"--{alias}=9"]):
            main(["generate", "Hello", *arguments])
            assert FakeLLM.made.config.num_kv_blocks == 9
        path = tmp_path / "options.yaml"
        path.write_text(f"{alias}: 8\n")
        main(["generate", "Hello", "--config", str(path)])
        assert FakeLLM.made.config.num_kv_blocks == 8

    def test_no_alias_hides_an_option(self) -> None:
        assert not set(ALIASES) & {f.name for f in fields(EngineConfig)}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max-num-sqs", "1"], "Unknown option: --max-num-sqs. Did you mean --max-num-seqs?"),
            (["--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
            (
                ["--max-num-seqs", "many"],
                'Invalid value for --max-num-seqs: unable to convert "many" into int.',
            ),
            (["--device", "tpu"], 'Invalid value "tpu" for --device.'),
            (["--temperature", "-1"], "temperature must be non-negative and finite, got -1.0"),
            (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
            (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
            (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        ],
    )
    def test_mistakes(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert fails(capsys, "generate", "Hello", *arguments).startswith(message)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("modl: x\n", 'Unknown option: "modl" from {path}. Did you mean --model?'),
            ("[1, 2\n", "{path} is not valid YAML: "),
            (
                "model: m\na: b: c\n",
                "{path} is not valid YAML: mapping values are not allowed here "
                'in "{path}", line 2, column 5',
            ),
            ("!!python/object/apply:os.getpid []", "{path} is not valid YAML: could not determine"),
            ("model: !!bool 7\n", "{path} is not valid YAML: '7'"),
            ("day: 2026-99-99\n", "{path} is not valid YAML: month must be in 1..12"),
            ("a: \udcff\n", "{path} is not valid YAML: unacceptable character #x00ff"),
            ("[" * 5000, "{path} is not valid YAML: maximum recursion depth"),
            ("just text\n", "{path} must hold options as 'name: value', one a line"),
            ("max_num_seqs: 0\n", "max_num_seqs must be at least 1, got 0"),
        ],
    )
    def test_mistakes_in_a_file(
        self, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "o.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        shown = fails(capsys, "generate", "Hello", "--config", str(path))
        assert shown.startswith(message.format(path=path))

    def test_a_file_may_be_empty_but_no_directory(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "o.yaml"
        path.write_text("# nothing yet\n")
        main(["generate", "Hello", "--config", str(path)])
        assert FakeLLM.made.config == EngineConfig()
        capsys.readouterr()
        shown = fails(capsys, "generate", "Hello", "--config", str(tmp_path))
        assert shown == f"{tmp_path}: Is a directory"

    def test_mistakes_in_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("NANOVLLM_MAX_NUM_SEQS", "many")
        assert fails(capsys, "generate", "Hello") == (
            "environment variable NANOVLLM_MAX_NUM_SEQS='many' is not a valid int"
        )

    def test_unknown_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert 'Did you mean "generate"?' in fails(capsys, "generat")
        assert 'Did you mean "offline"?' in fails(capsys, "bench", "ofline")


@pytest.mark.usefixtures("fake_llm")
class TestChat:
    def test_keeps_the_history(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipe(monkeypatch, "Hi\n\nMore\n")
        main(["chat", "--system", "Be brief.", "--temperature", "0"])
        assert capsys.readouterr().out == "Once upon a time.\n" * 2
        first, second = FakeLLM.made.asked
        opening = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ]
        assert first[0] == opening
        assert second[0] == [
            *opening,
            {"role": "assistant", "content": "Once upon a time."},
            {"role": "user", "content": "More"},
        ]
        assert (first[1].max_tokens, first[1].temperature) == (None, 0.0)
        assert FakeLLM.made.closed

    def test_reset_forgets_all_but_the_system_message(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe(monkeypatch, "Hi\n/reset\nAgain\n")
        main(["chat", "--system", "Be brief."])
        assert [message["content"] for message in FakeLLM.made.asked[1][0]] == [
            "Be brief.",
            "Again",
        ]

    def test_exit_leaves_the_rest_unread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "Hi\n/exit\nNever\n")
        main(["chat"])
        assert len(FakeLLM.made.asked) == 1

    def test_interrupt_is_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", interrupt)
        with pytest.raises(SystemExit) as caught:
            main(["chat"])
        assert caught.value.code == 130
        assert FakeLLM.made.closed


def start(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    """Start the real command, which hears Ctrl-C even if the suite runs in the background."""
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@pytest.fixture
def dummy_model(checkpoint: Callable[[str], Path]) -> list[str]:
    """Flags for a model that writes for as long as anyone listens."""
    return ["--model", str(checkpoint("qwen3")), "--device", "cpu", "--max-num-seqs", "4"]


def test_doctor(dummy_model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", *dummy_model])
    shown = json.loads(capsys.readouterr().out)
    fit, machine = shown["fit"], shown["machine"]
    assert machine["num_cores"] >= 1
    assert fit["dtype"] == "float32"
    assert fit["weight_bytes"] == 4 * fit["num_parameters"]
    assert fit["kv_bytes_per_token"] == 2 * 3 * 2 * 32 * 4
    assert (fit["max_model_len"], fit["num_kv_tokens"]) == (512, 4 * 512)
    main(["doctor", *dummy_model])
    table = capsys.readouterr().out
    assert "instruction sets" in table
    assert "Qwen3ForCausalLM" in table


def test_what_fits_is_what_the_engine_takes(checkpoint: Callable[[str], Path]) -> None:
    from nanovllm.bench.fit import work_out_fit
    from nanovllm.llm import LLM

    config = EngineConfig(
        model=str(checkpoint("llama")), device="cpu", kv_cache_memory_bytes=100_000
    )
    fit = work_out_fit(config)
    with LLM.from_config(config) as llm:
        blocks = llm.engine.scheduler.block_manager
        assert fit.num_kv_tokens == blocks.num_blocks * blocks.block_size
        assert fit.max_model_len == llm.engine.max_model_len


def test_what_fits_of_a_model_that_devices_share(checkpoint: Callable[[str], Path]) -> None:
    from nanovllm.bench.fit import work_out_fit

    config = EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype="float32")
    whole, part = work_out_fit(config), work_out_fit(replace(config, tensor_parallel_size=2))
    assert part.num_parameters == whole.num_parameters
    assert part.kv_bytes_per_token == whole.kv_bytes_per_token // 2
    assert whole.weight_bytes // 2 <= part.weight_bytes < 0.6 * whole.weight_bytes


def test_what_fits_of_a_quantized_checkpoint(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from nanovllm.bench.fit import work_out_fit

    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "model.safetensors").write_bytes(bytes(54_321))
    assert work_out_fit(EngineConfig(model=str(directory), device="cpu")).weight_bytes == 54_321


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_what_fits_of_a_speech_model_is_what_its_engine_takes(
    kind: str, speech_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from nanovllm.bench.fit import work_out_fit
    from nanovllm.worker.loading import load_engine

    directory = speech_checkpoint(kind)
    config = EngineConfig(
        model=str(directory), device="cpu", dtype="float32", kv_cache_memory_bytes=100_000
    )
    fit = work_out_fit(config)
    loaded = load_engine(config, directory)
    blocks = loaded.engine.scheduler.block_manager
    assert fit.num_kv_tokens == blocks.num_blocks * blocks.block_size
    assert fit.max_model_len == loaded.engine.max_model_len
    assert fit.num_vae_parameters > 0
    assert fit.weight_bytes == 4 * (fit.num_parameters + fit.num_vae_parameters)
    main(["doctor", "--model", str(directory), "--device", "cpu"])
    table = capsys.readouterr().out
    assert "autoencoder" in table
    assert fit.architecture in table


def result() -> OfflineResult:
    machine = Machine(
        "Linux", "A CPU", 2, ["AVX2"], 8 << 30, 4 << 30, [], 2, [], {}, {"torch": "2"}
    )
    return OfflineResult(
        2, 100, 16, 40, 25, 0, 2.0, 0.5, 84, 1.5, 30, {"dtype": "float32"}, machine
    )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """Workloads that `bench offline` was asked to run, none of which it does run."""
    workloads: list[Workload] = []

    def remember(llm: object, workload: Workload, on_step: Callable[[int], None]) -> OfflineResult:
        workloads.append(workload)
        on_step(workload.num_output_tokens)
        return result()

    monkeypatch.setattr("nanovllm.cli.bench.run_offline", remember)
    return workloads


def test_bench_offline_as_json(
    dummy_model: list[str], ran: list[Workload], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["bench", "offline", "--small", "--json", *dummy_model])
    shown = json.loads(capsys.readouterr().out)
    rates = {name: shown.pop(name) for name in ("prefill_rate", "decode_rate")}
    assert rates == {"prefill_rate": 168.0, "decode_rate": 20.0}
    assert (shown.pop("output_rate"), shown.pop("total_rate")) == (20.0, 70.0)
    assert shown == asdict(result())
    assert ran == [make_workload(vocab_size=320, small=True)]


def test_bench_offline_as_a_table(
    dummy_model: list[str], ran: list[Workload], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["bench", "offline", *dummy_model])
    table = capsys.readouterr().out
    assert ran == [make_workload(vocab_size=320)]
    assert "168.0" in table
    assert "hardware: A CPU, 2 cores\n" in table
    assert "settings: dtype=float32\n" in table


def test_bench_offline_needs_its_context(
    dummy_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "offline", *dummy_model])
    assert "needs a context of" in capsys.readouterr().err


def test_missing_model_is_one_line_and_status_2() -> None:
    process = start("generate", "Hello", "--model", "./no/such/model")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == b""
    assert b"Traceback" not in err
    assert b"no/such/model" in err


def test_ctrl_c_is_130_without_a_traceback() -> None:
    process = start("generate", "Once upon a time", "--ignore-eos", "--max-tokens", "4000")
    if process.stdout is None:
        pytest.fail("no pipe")
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_closed_pipe_is_no_traceback() -> None:
    process = start("generate", "Once upon a time", "--ignore-eos", "--max-tokens", "4000")
    if process.stdout is None or process.stderr is None:
        pytest.fail("no pipe")
    process.stdout.read(1)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == 1


CTRL_C_AT_IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "cyclopts":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from nanovllm.__main__ import main
main()
"""


def test_ctrl_c_while_the_command_is_imported_is_no_traceback() -> None:
    run = subprocess.run([sys.executable, "-c", CTRL_C_AT_IMPORT], capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, b"")


@pytest.mark.parametrize("closing", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_standard_files_that_are_closed(closing: str, tmp_path: Path) -> None:
    """Their numbers are taken by nothing else, here and in processes that are started."""
    code = (
        "import os, sys; from pathlib import Path;"
        "from nanovllm.__main__ import open_standard_files; open_standard_files();"
        "sys.stdin.read(); sys.stdout.write('x'); sys.stderr.write('x');"
        "Path(sys.argv[1]).write_text(str([os.get_inheritable(number) for number in range(3)]))"
    )
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", code]
    run = subprocess.run(
        [*command, str(tmp_path / "out")], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert run.returncode == 0
    assert (tmp_path / "out").read_text() == "[True, True, True]"


def test_a_prompt_from_a_closed_input_is_empty() -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "nanovllm", "generate"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "nanovllm: error: the prompt is empty" in run.stderr
    assert "Traceback" not in run.stderr
