"""Charts of a load test as one SVG, drawn here: three panels of lines need no plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from nanovllm.bench.stats import LATENCIES, LoadResult, percentile

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 34, 44
COLORS = ("#2a78d6", "#eb6834", "#1baf7a")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}"
    ".grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
)


def plot_loads(loads: Sequence[LoadResult]) -> str:
    """Latency over load for a sweep, or over its percentiles for a single load.

    Returns:
        A whole SVG document.
    """
    panels = []
    for place, name in enumerate(("ttft", "tpot", "e2e")):
        if len(loads) > 1:
            is_closed = loads[0].load.concurrency is not None
            x_label = "clients" if is_closed else "requests per second"
            series = {p: _over_load(loads, name, p) for p in ("p50", "p90", "p99")}
        else:
            x_label = "percentile"
            series = {LATENCIES[name]: _percentiles(loads[0].samples[name])}
        title = f"{LATENCIES[name]}, ms"
        panels.append(f'<g transform="translate({place * WIDTH},0)">')
        panels.append(_panel(title, x_label, series))
        panels.append("</g>")
    size = f'width="{3 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {3 * WIDTH} {HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def _over_load(loads: Sequence[LoadResult], name: str, percentile: str) -> Points:
    """A percentile in ms over the load; a load without an end has no place on the axis."""
    points = []
    for result in loads:
        x, figures = result.load.concurrency or result.load.request_rate, getattr(result, name)
        if math.isfinite(x) and figures is not None:
            points.append((x, getattr(figures, percentile) * 1e3))
    return sorted(points)


def _percentiles(ordered: Sequence[float]) -> Points:
    """Every percentile in ms."""
    if not ordered:
        return []
    return [(share, percentile(ordered, share / 100) * 1e3) for share in range(101)]


def _panel(title: str, x_label: str, series: Mapping[str, Points]) -> str:
    """One chart, with both axes from 0."""
    every = [point for points in series.values() for point in points]
    x_max = _round_up(max((x for x, _ in every), default=1.0))
    y_max = _round_up(max((y for _, y in every), default=1.0))

    def place(x: float, y: float) -> tuple[float, float]:
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + width * x / x_max, 1), round(TOP + height * (1 - y / y_max), 1)

    parts = [_text(LEFT, 16, title, "start", ' class="title"')]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        (left, y), (right, _) = place(0, y_max * share), place(x_max, 0)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(_text(left - 6, y + 4, f"{y_max * share:g}", "end"))
        x, bottom = place(x_max * share, 0)
        parts.append(_text(x, bottom + 16, f"{x_max * share:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    for index, ((name, points), color) in enumerate(zip(series.items(), COLORS, strict=False)):
        corners = [place(*point) for point in points]
        path = "L".join(f"{x} {y}" for x, y in corners)
        if path:
            parts.append(f'<path class="line" stroke="{color}" d="M{path}"/>')
        if len(series) > 1:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in corners]
            style = f' style="fill:{color}"'
            parts.append(
                _text(WIDTH - RIGHT - 36 * (len(series) - 1 - index), 16, name, "end", style)
            )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, attributes: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8, 10 times a power of ten, so that quarters of it are short."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if value <= step * power * (1 + 1e-9))
