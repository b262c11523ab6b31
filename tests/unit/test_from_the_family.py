"""The page for people who come from the family names nothing that is not there."""

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

import nanovllm
from nanovllm.async_llm import AsyncLLM
from nanovllm.bench.serve_config import ServeConfig
from nanovllm.cli import app as command_line
from nanovllm.config import (
    ALIASES,
    DEMO_MODEL,
    EngineConfig,
    PoolConfig,
    ServerConfig,
    SpeechConfig,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.app import create_app
from nanovllm.speech_params import SpeechParams

ROOT = Path(__file__).parents[2]
CONFIGS = (EngineConfig, PoolConfig, ServerConfig, SpeechConfig)
OPTIONS = {name for config in CONFIGS for name in config.names()}
NAME = re.compile(r"(GET|POST) /[\w/.{}]*|(uvicorn|fastapi run|nanovllm) [\w ./:-]+|[\w./:-]+")
"""What is a name; anything else in code type is an example."""
WORDS = {
    *("rr", "fsfs", "random", "cache_aware", "Retry-After"),  # values and headers
    *("fa", "fi", "trtllm", "flash_attention_2", "fa3", "eager"),
    *("text_delta", "mode", "detail", "error", "route"),  # fields of requests and answers
    *("scheduler", "output.finished", "fastapi", "model", "speech", "response_format"),
}


def page() -> str:
    return (ROOT / "docs" / "from-the-family.md").read_text(encoding="utf-8")


def ours() -> list[str]:
    """What stands in code type in the last column of any table."""
    rows = [line.split("|") for line in page().splitlines() if line.startswith("| ")]
    return sorted({name for row in rows for name in re.findall(r"`([^`]+)`", row[-2])})


@pytest.fixture(scope="module")
def served() -> tuple[set[str], str]:
    """Routes, as method and path, and the text of the metrics of an app that has not started."""
    app = create_app(ServerConfig(), EngineConfig(model=str(DEMO_MODEL)), PoolConfig())
    paths = app.openapi()["paths"].items()
    routes = {f"{method.upper()} {path}" for path, methods in paths for method in methods}
    metrics = generate_latest(app.state.server.metrics.registry).decode()
    return routes | {f"GET {app.docs_url}"}, metrics


def exists(name: str, routes: set[str], metrics: str) -> bool:
    """Whether a name on the page is something of ours, by the look of it."""
    if re.match(r"(GET|POST) /", name):
        return name in routes
    if name.startswith(("vllm:", "nanovllm_")):
        return f"# HELP {name.removesuffix('_total')}" in metrics
    if name.startswith("--"):
        known = {*OPTIONS, *ServeConfig.__dataclass_fields__, "small"}
        return name.removeprefix("--").replace("-", "_") in known
    if name.startswith(("uvicorn nanovllm", "fastapi run nanovllm")):
        return (ROOT / "nanovllm" / "server" / "app.py").exists()
    if name.startswith("nanovllm "):
        _, *commands = name.split()
        found = command_line
        for command in commands:
            found = found[command]
        return True
    if "/" in name:
        return (ROOT / name).exists()
    fields = {*SamplingParams.__dataclass_fields__, *SpeechParams.__dataclass_fields__}
    return name in OPTIONS | set(ALIASES) | fields or _is_python(name)


def _is_python(name: str) -> bool:
    root, *rest = name.split(".")
    found: object = getattr(nanovllm, root, None)
    if rest == ["engine"]:  # an attribute of instances
        return found is not None
    for part in rest:
        found = getattr(found, part, None)
    return found is not None


def test_every_name_of_ours_exists(served: tuple[set[str], str]) -> None:
    names = [name for name in ours() if NAME.fullmatch(name) and name not in WORDS]
    assert len(names) > 100
    assert [name for name in names if not exists(name, *served)] == []


def test_every_alias_is_on_the_page() -> None:
    text = page()
    options = [(config, name) for config in CONFIGS for name in config.names()]
    names = [*ALIASES, *(v for config, name in options for v in config.variables_of(name)[1:])]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_variable_leads_where_the_page_says() -> None:
    section = page().split("## Environment")[1].split("And these are not")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert rows
    for variables, _, here in rows:
        names = re.findall(r"`([^`]+)`", variables)
        options = [name for name in re.findall(r"`(\w+)`", here) if name in OPTIONS]
        for index, variable in enumerate(names):
            option = options[index if len(options) >= len(names) > 1 else 0]
            config = next(config for config in CONFIGS if option in config.names())
            ours = variable.replace("_SERVERPOOL_", "_")
            assert not {variable, ours}.isdisjoint(config.variables_of(option))


def test_step_loop_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(page().split("```python")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("0 [")


def test_async_engine_has_what_the_page_says() -> None:
    assert {"warm", "generate", "abort", "stats", "drain", "close"} <= set(dir(AsyncLLM))
