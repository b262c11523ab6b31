"""The documentation keeps up with the code."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm.config import ALIASES, EngineConfig, Options, PoolConfig, ServerConfig, SpeechConfig

ROOT = Path(__file__).parents[2]
CONFIGS = (EngineConfig, PoolConfig, ServerConfig, SpeechConfig)
OPTIONS = [(config, option) for config in CONFIGS for option in fields(config)]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def option_rows() -> dict[str, list[str]]:
    """Cells of every table row in docs/configuration.md that begins with an option's name."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows if row and re.fullmatch(r"`\w+`", row[0])}


def test_every_option_has_its_row_and_no_other() -> None:
    assert list(option_rows()) == [option.name for _, option in OPTIONS]


@pytest.mark.parametrize(
    ("config", "option"), OPTIONS, ids=lambda value: getattr(value, "name", "")
)
def test_default_variables_and_aliases_of_each_option(
    config: type[Options], option: object
) -> None:
    name, default = option.name, option.default  # type: ignore[attr-defined]
    shown_default, environment, aliases, meaning = option_rows()[name]
    assert shown_default == f"`{default!r}`"
    assert environment == ", ".join(f"`{variable}`" for variable in config.variables_of(name))
    assert aliases == ", ".join(f"`{a}`" for a, target in sorted(ALIASES.items()) if target == name)
    assert meaning


def links_of(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not [link for link in links_of(page) if not (page.parent / link).exists()]


def test_some_link_leads_to_every_page() -> None:
    linked = {(page.parent / link).resolve() for page in PAGES for link in links_of(page)}
    assert {page.resolve() for page in PAGES[1:]} <= linked


def test_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("```") :].split("```")[1]
    assert block.strip().splitlines() == [
        'pip install uv && uv run nanovllm generate "Once upon a time"',
        "pip install uv && uv run pytest",
    ]


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text.split("## Python")[1].split("```python")[1].split("```")[0]
    exec(example, {})
    assert capsys.readouterr().out.count("Once upon a time") == 1
