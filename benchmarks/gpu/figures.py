"""What was measured, beside what it is held to."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FAILED = "failed"
SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound that a figure is to keep."""

    bound: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


GOALS = {
    "0.6b decode, 1 stream, ms a token": Goal(0.8),
    "8b decode, 1 stream, share of the HBM bound": Goal(0.8, at_least=True),
    "0.6b offline, output tokens/s": Goal(19_000, at_least=True),
    "0.6b offline, times transformers' continuous batching": Goal(8, at_least=True),
    "0.6b, p99 between tokens, 8k prompts arriving over none": Goal(2),
    "speech, 1 stream, RTF": Goal(0.03),
    "speech, 64 streams, RTF": Goal(0.2),
    "speech, 1 stream, first audio, ms": Goal(40),
}
"""By the name of a figure. They are for one H200."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    Args:
        section: Which section did.
        name: What it is, unit included.
        value: A number, or a text; `FAILED` and `SKIPPED` have their reason in `note`.
        share: Of what the machine could do at best.
        note: What one must know besides.
        detail: More of it, for JSON alone.
    """

    section: str
    name: str
    value: float | str
    share: float | None = None
    note: str = ""
    detail: Any = field(default=None)

    @property
    def goal(self) -> Goal | None:
        return GOALS.get(self.name)

    @property
    def is_met(self) -> bool | None:
        """Whether it keeps its goal; None if it has none or was not measured."""
        if self.goal is None or isinstance(self.value, str):
            return None
        return self.goal.met_by(self.value)

    def cells(self, is_judged: bool) -> list[str]:
        """Name, value, share and goal as texts; the verdict with the goal if it is to be judged."""
        value = self.value if isinstance(self.value, str) else _shown(self.value)
        share = "" if self.share is None else f"{self.share:.0%}"
        goal = "" if self.goal is None else str(self.goal)
        if is_judged and self.is_met is not None:
            goal += " met" if self.is_met else " MISSED"
        return [self.name, value, share, goal]

    def to_dict(self, is_judged: bool) -> dict[str, Any]:
        """Everything, for JSON."""
        goal = str(self.goal) if self.goal else None
        return asdict(self) | {"goal": goal, "met": self.is_met if is_judged else None}


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Recorder:
    """Appends the figures of a section to a file, each at once: a section may be cut short.

    Args:
        path: The file, a line of JSON a figure.
        section: The section.
    """

    def __init__(self, path: Path, section: str) -> None:
        self._path, self._section = path, section

    def __call__(
        self,
        name: str,
        value: float | str,
        *,
        share: float | None = None,
        note: str = "",
        detail: Any = None,
    ) -> None:
        """Record a figure; see `Figure`."""
        figure = Figure(self._section, name, value, share, note, detail)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figure), default=str) + "\n")

    def skip(self, name: str, reason: str) -> None:
        """Record that something was not measured, and why."""
        self(name, SKIPPED, note=reason)

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Record what goes wrong within, so that the rest can go on."""
        try:
            yield
        except Exception as e:  # noqa: BLE001  # it is recorded, and makes the run incomplete
            self(name, FAILED, note=f"{type(e).__name__}: {e}"[:300])


def read_figures(path: Path) -> list[Figure]:
    """What has been recorded so far; a line that was cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Figure(**json.loads(line)) for line in lines if line.endswith("\n")]


def as_table(figures: Iterable[Figure], is_judged: bool) -> str:
    """Lines for a terminal, a heading a section; goals are for one GPU, not judged elsewhere."""
    lines, section = [], None
    for figure in figures:
        if figure.section != section:
            section = figure.section
            lines.append(f"\n{section:82} {'':>12} {'of limit':>8}")
        name, value, share, goal = figure.cells(is_judged)
        line = f"  {name:80} {value:>12} {share:>8}  {goal}"
        lines.append(line.rstrip() + (f"  ({figure.note})" if figure.note else ""))
    return "\n".join(lines)


def as_markdown(figures: Iterable[Figure], is_judged: bool) -> str:
    """Rows for `docs/performance.md`."""
    rows = ["| figure | measured | of the limit | goal |", "|---|---:|---:|---|"]
    rows += [f"| {' | '.join(figure.cells(is_judged))} |" for figure in figures]
    return "\n".join(rows)
