"""Curves over the steps as inline SVG; what it holds beside its own elements is escaped."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 52, 12, 12, 26
MOST_POINTS = 600  # drawn of one curve
MOST_STRIPS = 200  # strips that answer to the pointer
MOST_DOTS = 60
Points = list[tuple[int, float]]  # (step, value), in the order of the steps


def format_value(value: float) -> str:
    """Three to four digits, whatever the size."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def format_percent(value: float) -> str:
    """A share in percent, with three digits."""
    return f"{100 * value:.3g}%" if math.isfinite(value) else str(value)


@dataclass
class Curve:
    """Values over the steps. style: "", "thin", "dashed", or "dotted" (each value is a dot as well)."""

    name: str
    points: Points
    tone: int = 0  # the number of its colour
    style: str = ""

    @property
    def finite(self) -> Points:
        """The points that have a place in a plot."""
        return [(step, value) for step, value in self.points if math.isfinite(value)]


@dataclass
class Plot:
    """Curves in one plot, with a heading and what is good and bad to see in them."""

    title: str
    about: str
    curves: list[Curve]
    format: Callable[[float], str] = format_value
    from_zero: bool = False
    advised_step: int | None = None  # as an upright line
    level: tuple[float, str] | None = None  # a value with a meaning and its label, as a level line

    def __post_init__(self) -> None:
        self.curves = [curve for curve in self.curves if curve.points]

    @property
    def has_drawing(self) -> bool:
        """Whether any value has a place in a drawing."""
        return any(curve.finite for curve in self.curves)

    @property
    def last_step(self) -> int:
        """The last step that a curve has a value for."""
        return max(curve.points[-1][0] for curve in self.curves)

    @property
    def svg(self) -> str:
        """The drawing."""
        return draw_svg(self)

    @property
    def problems(self) -> list[str]:
        """What the curves don't show: values that aren't finite, or lie beyond the top."""
        problems = []
        lost = {step for curve in self.curves for step, value in curve.points if not math.isfinite(value)}
        if steps := sorted(lost):
            few = ", ".join(map(str, steps[:6])) + (", …" if len(steps) > 6 else "")
            problems.append(f"Not finite at step {few}: the red triangles.")
        highest, step = max((value, step) for curve in self.curves for step, value in curve.finite)
        if highest > value_range(self)[1]:
            problems.append(f"Highest at step {step}, beyond the top: {self.format(highest)}.")
        return problems


class Scale:
    """Where steps and values lie in the drawing."""

    def __init__(self, plot: Plot) -> None:
        self.steps = sorted({step for curve in plot.curves for step, _ in curve.points})
        first, last = self.steps[0], self.steps[-1]
        if len(self.steps) == 1:
            first, last = first - 1, last + 1
        self.first, self.last = (0 if 0 <= first < 0.2 * last else first), last
        self.low, self.high = value_range(plot)

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def smoothed(points: Points) -> Points:
    """A running mean of the finite values, each weighing less the further back it lies.

    The window grows with the number of values.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    decay = 1 - 1 / max(2.0, len(finite) / 12)
    total, weight, means = 0.0, 0.0, []
    for step, value in finite:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        means.append((step, total / weight))
    return means


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between low and high, `most` of them at most."""
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def value_range(plot: Plot) -> tuple[float, float]:
    """Lowest and highest value of the axis.

    A few values far above all others don't flatten the rest: they leave at the top.
    """
    values = sorted(value for curve in plot.curves for _, value in curve.finite)
    low, high = values[0], values[-1]
    common = values[int(0.97 * (len(values) - 1))]
    floor = min(low, 0.0) if plot.from_zero or 0 <= low < 0.4 * common else low
    if common - floor > 0 and high - floor > 4 * (common - floor):
        high = floor + 1.5 * (common - floor)
    if plot.level and low <= plot.level[0] <= 1.5 * high:
        high = max(high, plot.level[0])
    margin = 0.06 * (high - floor) or 0.1 * abs(high) or 1.0
    return (floor if floor == 0 else floor - margin), high + margin


def thinned(points: Points) -> Points:
    """As many points as can be told apart: of each stretch the lowest and the highest."""
    if len(points) <= MOST_POINTS:
        return points
    size, selected = math.ceil(2 * len(points) / MOST_POINTS), []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        shown = {point for point in stretch if not math.isfinite(point[1])}
        if finite:
            shown |= {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        selected += sorted(shown | ({points[-1]} & set(stretch)))
    return selected


def draw_svg(plot: Plot) -> str:
    """The drawing itself. Needs a finite value in one of the curves."""
    scale = Scale(plot)
    pieces = [*draw_axes(plot, scale), *draw_reference_lines(plot, scale)]
    pieces += [draw_curve(curve, scale) for curve in plot.curves]
    pieces += draw_hover_strips(plot, scale)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"'
        f' aria-label="{escape(plot.title)} over the steps">{"".join(pieces)}</svg>'
    )


def draw_axes(plot: Plot, scale: Scale) -> list[str]:
    """Level lines with their values, and the axis of the steps."""
    base, pieces = HEIGHT - BOTTOM, []
    for tick in nice_ticks(scale.low, scale.high, 7):
        y, label = scale.y(tick), escape(plot.format(tick))
        pieces.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        pieces.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in nice_ticks(scale.first, scale.last, 6):
        if tick == int(tick):
            x = scale.x(tick)
            anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
            pieces.append(f'<path class="axis" d="M{x:.1f} {base}v4"/>')
            pieces.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{int(tick)}</text>')
    pieces.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    return pieces


def draw_reference_lines(plot: Plot, scale: Scale) -> list[str]:
    """The value with a meaning, and the advised step."""
    pieces = []
    if plot.level and scale.low <= plot.level[0] <= scale.high:
        y, label = scale.y(plot.level[0]), escape(plot.level[1])
        pieces.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        pieces.append(f'<text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{label}</text>')
    step = plot.advised_step
    if step is not None and scale.first <= step <= scale.last:
        line = f"M{scale.x(step):.1f} {TOP}V{HEIGHT - BOTTOM}"
        pieces.append(f'<path class="taken" d="{line}"><title>advised: step {step}</title></path>')
    return pieces


def draw_curve(curve: Curve, scale: Scale) -> str:
    """A curve, broken where a value isn't finite, with a mark there.

    What lies above the axis runs along its top.
    """
    path, pen, marks = [], "M", []
    for step, value in thinned(curve.points):
        if not math.isfinite(value):
            pen = "M"
            triangle = f"M{scale.x(step):.1f} {HEIGHT - BOTTOM - 9}l5 9h-10z"
            marks.append(f'<path class="lost" d="{triangle}"><title>step {step}: {value}</title></path>')
            continue
        path.append(f"{pen}{scale.x(step):.1f} {scale.y(min(value, scale.high)):.1f}")
        pen = "L"
    dots = curve.finite
    if curve.style != "dotted" or len(dots) > MOST_DOTS:
        dots = [] if curve.style == "thin" else dots[-1:]
    tone = f"t{curve.tone % 8}"
    for step, value in dots:
        place = f'cx="{scale.x(step):.1f}" cy="{scale.y(min(value, scale.high)):.1f}"'
        marks.append(f'<circle class="dot {tone}" {place} r="3.2"/>')
    return f'<path class="curve {curve.style} {tone}" d="{"".join(path)}"/>{"".join(marks)}'


def draw_hover_strips(plot: Plot, scale: Scale) -> list[str]:
    """Upright strips that tell the values at their step to the pointer."""
    steps, x = scale.steps, scale.x
    shown = sorted({*steps[:: math.ceil(len(steps) / MOST_STRIPS)], steps[-1]})
    steps_of_curves = [[step for step, _ in curve.points] for curve in plot.curves]
    pieces = []
    for i, step in enumerate(shown):
        left = (x(shown[i - 1]) + x(step)) / 2 if i else x(step) - 8
        right = (x(shown[i + 1]) + x(step)) / 2 if i + 1 < len(shown) else x(step) + 8
        values = [
            value_at(curve.points, curve_steps, step, plot.format)
            for curve, curve_steps in zip(plot.curves, steps_of_curves, strict=True)
        ]
        title = ", ".join(f"{curve.name} {v}" for curve, v in zip(plot.curves, values, strict=True))
        pieces.append(
            f'<g class="stop" data-values="step {step}|{escape("|".join(values))}">'
            f'<rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{HEIGHT}" fill="transparent"/>'
            f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f"<title>step {step}: {escape(title)}</title></g>"
        )
    return pieces


def value_at(points: Points, steps: list[int], step: int, formatter: Callable[[float], str]) -> str:
    """The value at a step, or the last one before it. steps: those of the points."""
    i = bisect_right(steps, step)
    return formatter(points[i - 1][1]) if i else "–"
