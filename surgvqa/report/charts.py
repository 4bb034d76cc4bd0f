"""Charts as SVG that takes its colours from the page: bars for cells of tables, lines with axes, reliability.

What a chart shows is also in its title, or in numbers beside it. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

Point = tuple[float, float]
Ends = tuple[float, float]

COLOURS = 6
"""Classes c0 … c5 of the page's style."""

_MOST = 300
"""Points of a line; longer ones are thinned out to means."""


@dataclass(frozen=True)
class Line:
    """What is drawn in one colour."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    ends: Sequence[Ends | None] = ()
    """The interval of each point, where there are any."""
    look: str = ""
    """`dashed`, `faint`, or neither."""


@dataclass(frozen=True)
class Chart:
    title: str
    """What is up."""
    below: str
    """What is to the right."""
    lines: Sequence[Line] = field(repr=False)
    percent: bool = False
    """Whether values are shares of 1, shown times 100."""
    zero: bool = False
    """Whether 0 is on the axis whatever the values."""

    @property
    def svg(self) -> Markup:
        return _drawn(self)


def bar(
    value: float | None,
    ends: Sequence[float] | None = None,
    prior: float | None = None,
    colour: int = 0,
) -> Markup:
    """A share of 1 as a bar that fills its place, its interval as a line, the prior as a mark."""
    parts = [Markup('<rect class="track" width="1000" height="20"/>')]
    if value is not None:
        parts.append(Markup('<rect class="fill" width="{}" height="20"/>').format(_permille(value)))
    if ends:
        low, high = map(_permille, ends)
        parts.append(
            Markup('<path class="span" d="M{0} 10H{1}M{0} 5V15M{1} 5V15"/>').format(low, high),
        )
    if prior is not None:
        parts.append(Markup('<path class="prior" d="M{} 0V20"/>').format(_permille(prior)))
    return Markup(
        '<svg class="bar c{}" viewBox="0 0 1000 20" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(colour % COLOURS, Markup("").join(parts))


def _permille(share: float) -> int:
    return round(1000 * max(0.0, min(1.0, share)))


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most _MOST points: means of as many neighbours as that takes."""
    size = math.ceil(len(points) / _MOST)
    if size <= 1:
        return list(points)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in blocks]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential means over about a fortieth of the points, corrected for where they begin."""
    decay, mean, weight, found = 1 - 1 / max(1.0, len(points) / 40), 0.0, 0.0, []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        found.append((x, mean / weight))
    return found


def curve(name: str, points: Sequence[Point], colour: int) -> list[Line]:
    """A noisy course as two lines: itself, faint, and its means. A short one is drawn as it is."""
    if len(points) < 60:
        return [Line(name, points, colour)]
    return [
        Line("", thinned(points), colour, look="faint"),
        Line(name, thinned(smooth(points)), colour),
    ]


_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 38


def _drawn(chart: Chart) -> Markup:
    lines = [line for line in chart.lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines if line.look != "faint" for _, y in line.points]
    ys += [end for line in lines for ends in line.ends if ends for end in ends]
    if not xs or not ys:
        return Markup("")
    faint = [y for line in lines if line.look == "faint" for _, y in line.points]
    if faint:  # of the noise, all but what would make the rest flat
        margin = 0.5 * (max(ys) - min(ys) or 1)
        ys += [max(min(ys) - margin, min(faint)), min(max(ys) + margin, max(faint))]
    columns = steps(min(xs), max(xs), whole=True)
    rows = steps(min([0.0, *ys] if chart.zero else ys), max(ys))
    if chart.percent:
        rows = [row for row in rows if -1e-9 <= row <= 1 + 1e-9] or rows
    left, right = min(columns[0], min(xs)), max(columns[-1], max(xs))
    low, high = min(rows[0], min(ys)), max(rows[-1], max(ys))

    def x(value: float) -> float:
        share = (value - left) / (right - left) if right > left else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return round(_HEIGHT - _BOTTOM - max(-0.02, min(1.02, share)) * (_HEIGHT - _BOTTOM - _TOP), 1)

    parts = _axes(chart, columns, rows, x, y)
    for line in lines:
        parts.append(_line(line, x, y, chart.percent))
    return _framed(chart, _WIDTH, _HEIGHT, parts)


def _axes(
    chart: Chart,
    columns: Sequence[float],
    rows: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[Markup]:
    parts = []
    for row in rows:
        label = number(100 * row if chart.percent else row)
        parts.append(
            Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, y(row), _WIDTH - _RIGHT)
            + Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(_LEFT - 7, y(row) + 4, label)
        )
    for column in columns:
        parts.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                x(column), _HEIGHT - _BOTTOM + 16, number(column)
            )
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(middle, _HEIGHT - 4, chart.below)
    )
    return parts


def _line(line: Line, x: Callable[[float], float], y: Callable[[float], float], percent: bool) -> Markup:
    path = "M" + "L".join(f"{x(a)} {y(b)}" for a, b in line.points)
    parts = [Markup('<path class="line {}" d="{}"/>').format(line.look, path)]
    for (a, _), ends in zip(line.points, line.ends, strict=False):
        if ends:
            parts.append(Markup('<path class="span" d="M{} {}V{}"/>').format(x(a), y(ends[0]), y(ends[1])))
    if len(line.points) <= 40 and not line.look:
        for a, b in line.points:
            told = f"{100 * b:.1f} %" if percent else f"{b:.4g}"
            title = f"{line.name}, {number(a)}: {told}"
            parts.append(
                Markup('<circle r="3" cx="{}" cy="{}"><title>{}</title></circle>').format(x(a), y(b), title)
            )
    return Markup('<g class="c{}">{}</g>').format(line.colour % COLOURS, Markup("").join(parts))


def _framed(chart: Chart, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    last = "; ".join(
        f"{line.name} ends at {100 * line.points[-1][1]:.1f} %"
        if chart.percent
        else f"{line.name} ends at {line.points[-1][1]:.4g}"
        for line in chart.lines
        if line.points and line.name
    )
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(width, height, f"{chart.title} by {chart.below}", last, Markup("").join(parts))


@dataclass(frozen=True)
class Bin:
    """Of a reliability table: answers with about the same confidence."""

    confidence: float
    exact: float
    share: float
    """Of all answers."""
    n: int


def reliability(runs: Sequence[tuple[str, int, Sequence[Bin]]]) -> Markup:
    """How often answers are right against how sure they are, and below how many are how sure.

    `runs` are name, colour and bins of each.
    """
    side, left, top, gap, strip = 240, 46, 10, 10, 44

    def x(share: float) -> float:
        return round(left + share * side, 1)

    def y(share: float) -> float:
        return round(top + (1 - share) * side, 1)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            Markup('<path class="grid" d="M{} {}H{}"/>').format(x(0), y(tick), x(1))
            + Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(
                left - 7, y(tick) + 4, f"{100 * tick:g}"
            )
            + Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                x(tick), top + side + gap + strip + 17, f"{100 * tick:g}"
            )
        )
    parts.append(Markup('<path class="axis" d="M{} {}L{} {}"/>').format(x(0), y(0), x(1), y(1)))
    below = top + side + gap + strip
    most = max((bin.share for _, _, bins in runs for bin in bins), default=1)
    thick = max(2.0, 12 / len(runs)) if runs else 0
    for place, (name, colour, bins) in enumerate(runs):
        path = "M" + "L".join(f"{x(bin.confidence)} {y(bin.exact)}" for bin in bins)
        own = [Markup('<path class="line" d="{}"/>').format(path)]
        for bin in bins:
            told = (
                f"{name}: {bin.n:,} answers, {100 * bin.confidence:.1f} % sure, {100 * bin.exact:.1f} % right"
            )
            height = round(strip * bin.share / most, 1)
            beside = (place - (len(runs) - 1) / 2) * (thick + 1) - thick / 2
            own.append(
                Markup('<circle r="{}" cx="{}" cy="{}"><title>{}</title></circle>').format(
                    round(2.5 + 5 * math.sqrt(bin.share), 1), x(bin.confidence), y(bin.exact), told
                )
                + Markup('<rect class="fill" x="{}" y="{}" width="{}" height="{}"/>').format(
                    round(x(bin.confidence) + beside, 1), round(below - height, 1), round(thick, 1), height
                )
            )
        parts.append(Markup('<g class="c{}">{}</g>').format(colour % COLOURS, Markup("").join(own)))
    parts.append(
        Markup('<text class="tick middle" x="{}" y="{}">confidence of the answer, %</text>').format(
            x(0.5), below + 34
        )
    )
    return Markup(
        '<svg class="chart square" viewBox="0 0 {} {}" role="img">'
        "<title>Reliability: share of right answers by confidence</title>{}</svg>"
    ).format(left + side + 14, below + 40, Markup("").join(parts))


def steps(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that surround low and high, nearly evenly; with `whole` inside of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high - low < 1e-12 * max(1.0, abs(high)):
        return [low]
    rough = (high - low) / (6 if whole else 4)
    size = 10 ** math.floor(math.log10(rough))
    size *= next(times for times in (1, 2, 2.5, 5, 10) if times * size >= rough)
    if whole:
        size = max(1.0, math.ceil(size))
        first, last = math.ceil(low / size), math.floor(high / size)
    else:
        first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(place * size, 12) for place in range(first, last + 1)] or [low]


def number(value: float) -> str:
    """Short, for an axis."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{round(value, 4):g}"
