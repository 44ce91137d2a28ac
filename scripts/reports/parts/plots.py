"""Curves over the steps as inline SVG: axes, a legend that shows the values under the pointer, and the same as hover titles."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 52, 12, 12, 26
MOST_POINTS, MOST_STOPS = 600, 200  # drawn in one curve; places that answer to the pointer
Points = list[tuple[int, float]]

STYLE = """
:root { --t0: #2f6f4f; --t1: #c2691a; --t2: #3566b0; --t3: #8a4fa3; --t4: #b3402a; --t5: #1c8a94; --t6: #7a5c2e; --t7: #6b6b66; }
@media (prefers-color-scheme: dark) { :root { --t0: #7cc49c; --t1: #f0a35e; --t2: #86b0f0; --t3: #cf9be6; --t4: #ef8a72;
  --t5: #6fd0d8; --t6: #cbb07d; --t7: #a0a098; } }
.t0 { --tone: var(--t0); } .t1 { --tone: var(--t1); } .t2 { --tone: var(--t2); } .t3 { --tone: var(--t3); }
.t4 { --tone: var(--t4); } .t5 { --tone: var(--t5); } .t6 { --tone: var(--t6); } .t7 { --tone: var(--t7); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.plot { padding: 14px 14px 8px; display: flex; flex-direction: column; }
.plot h3 { font-size: 15px; margin: 0 0 4px; } .plot p { margin: 0 0 8px; font-size: 13px; color: var(--dim); }
.plot p.why { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin: auto 0 4px; color: var(--dim); }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 6px 3px 0;
  background: var(--tone); } .legend .thin::before { height: 1.5px; opacity: .55; } .legend .at { min-width: 5.5em; }
.legend .dashed::before { background: repeating-linear-gradient(90deg, var(--tone) 0 4px, transparent 4px 7px); }
.legend .at::before { content: none; } .legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.plot svg { display: block; width: 100%; height: auto; font: 12.5px system-ui, sans-serif; touch-action: pan-y; }
.plot svg .rule { stroke: var(--line); } .plot svg .axis { stroke: var(--dim); } .plot svg text { fill: var(--dim); }
.plot svg .curve { fill: none; stroke: var(--tone); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.plot svg .thin { stroke-width: 1; opacity: .5; } .plot svg .dashed { stroke-dasharray: 6 4; }
.plot svg .dot { fill: var(--tone); stroke: var(--card); stroke-width: 1.5; }
.plot svg .taken { stroke: var(--mark); stroke-dasharray: 3 3; } .plot svg .level { stroke: var(--bad); stroke-dasharray: 2 4; }
.plot svg .lost { fill: var(--bad); } .plot svg .stop line { opacity: 0; stroke: var(--ink); } .plot svg .stop:hover line { opacity: .5; }
"""

# The legend shows the values of the step under the pointer
SCRIPT = """
for (const plot of document.querySelectorAll('.plot')) {
  const shown = [...plot.querySelectorAll('.legend b')], last = shown.map(b => b.textContent);
  for (const stop of plot.querySelectorAll('.stop')) stop.addEventListener('pointerenter', () =>
    stop.dataset.values.split('|').forEach((v, i) => shown[i].textContent = v));
  plot.addEventListener('pointerleave', () => shown.forEach((b, i) => b.textContent = last[i]));
}
"""


def plain(value: float) -> str:
    """Three to four digits, whatever the size."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%" if math.isfinite(value) else str(value)


@dataclass
class Curve:
    """Values over the steps; `look`: "", "thin", "dashed" or "dotted" (each value is a dot as well)."""

    name: str
    points: Points
    tone: int = 0
    look: str = ""


@dataclass
class Plot:
    """A plot with its heading and what is good and bad to see in it."""

    title: str
    about: str
    curves: list[Curve]
    unit: Callable[[float], str] = plain
    from_zero: bool = False
    taken: int | None = None  # the step that is advised, as an upright line
    level: tuple[float, str] | None = None  # a value with a meaning, as a level line
    problems: list[str] = field(default_factory=list)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between low and high, `most` of them at most."""
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def value_range(plot: Plot) -> tuple[float, float]:
    """Lowest and highest value of the axis. A few values far above all others don't flatten the rest: they leave at the top."""
    values = sorted(v for c in plot.curves for _, v in c.points if math.isfinite(v))
    low, high = values[0], values[-1]
    common = values[int(0.97 * (len(values) - 1))]
    floor = min(low, 0.0) if plot.from_zero or 0 <= low < 0.4 * common else low
    if common - floor > 0 and high - floor > 4 * (common - floor):
        high = floor + 1.5 * (common - floor)
    if plot.level and low <= plot.level[0] <= 1.5 * high:
        high = max(high, plot.level[0])
    room = 0.06 * (high - floor) or 0.1 * abs(high) or 1.0
    return (floor if floor == 0 else floor - room), high + room


def thinned(points: Points) -> Points:
    """So many points as can be told apart: of each stretch the lowest and the highest."""
    if len(points) <= MOST_POINTS:
        return points
    size, out = math.ceil(2 * len(points) / MOST_POINTS), []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        finite = [p for p in part if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        out += sorted(ends | {p for p in part if not math.isfinite(p[1])} | ({points[-1]} & set(part)))
    return out


def svg_of(plot: Plot) -> str:
    """The drawing itself. Needs a finite value in one of the curves."""
    steps = sorted({s for c in plot.curves for s, _ in c.points})
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)
    first = 0 if 0 <= first < 0.2 * last else first
    low, high = value_range(plot)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    base, out = HEIGHT - BOTTOM, []
    for tick in nice_ticks(low, high, 7):
        out.append(f'<path class="rule" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(plot.unit(tick))}</text>')
    for tick in nice_ticks(first, last, 6):
        if tick == int(tick):
            out.append(f'<path class="axis" d="M{x(tick):.1f} {base}v4"/>')
            anchor = "end" if x(tick) > WIDTH - RIGHT - 16 else "middle"
            out.append(f'<text x="{x(tick):.1f}" y="{base + 18}" text-anchor="{anchor}">{int(tick)}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    if plot.level and low <= plot.level[0] <= high:
        out.append(f'<path class="level" d="M{LEFT} {y(plot.level[0]):.1f}H{WIDTH - RIGHT}"/>')
        out.append(
            f'<text x="{WIDTH - RIGHT}" y="{y(plot.level[0]) - 4:.1f}" text-anchor="end">{escape(plot.level[1])}</text>'
        )
    if plot.taken is not None and first <= plot.taken <= last:
        out.append(
            f'<path class="taken" d="M{x(plot.taken):.1f} {TOP}V{base}"><title>advised: step {plot.taken}</title></path>'
        )
    for curve in plot.curves:
        out.append(drawn(curve, x, y, high))
    out += stops(plot, steps, x)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"'
        f' aria-label="{escape(plot.title)} over the steps">{"".join(out)}</svg>'
    )


def drawn(curve: Curve, x: Callable, y: Callable, high: float) -> str:
    """A curve, broken where a value isn't finite, with a mark there; what lies above the axis runs along its top."""
    path, pen, marks = [], "M", []
    for step, value in thinned(curve.points):
        if not math.isfinite(value):
            pen = "M"
            place = f"M{x(step):.1f} {HEIGHT - BOTTOM - 9}l5 9h-10z"
            marks.append(f'<path class="lost" d="{place}"><title>step {step}: {value}</title></path>')
            continue
        path.append(f"{pen}{x(step):.1f} {y(min(value, high)):.1f}")
        pen = "L"
    finite = [(s, v) for s, v in curve.points if math.isfinite(v)]
    dots = finite if curve.look == "dotted" and len(finite) <= 60 else finite[-1:] if curve.look != "thin" else []
    tone = f"t{curve.tone % 8}"
    marks += [f'<circle class="dot {tone}" cx="{x(s):.1f}" cy="{y(min(v, high)):.1f}" r="3.2"/>' for s, v in dots]
    return f'<path class="curve {curve.look} {tone}" d="{"".join(path)}"/>{"".join(marks)}'


def stops(plot: Plot, steps: list[int], x: Callable) -> list[str]:
    """Upright strips that tell the values at their step."""
    every, out = math.ceil(len(steps) / MOST_STOPS), []
    chosen = sorted({*steps[::every], steps[-1]})
    orders = [[s for s, _ in c.points] for c in plot.curves]
    for i, step in enumerate(chosen):
        left = (x(chosen[i - 1]) + x(step)) / 2 if i else x(step) - 8
        right = (x(chosen[i + 1]) + x(step)) / 2 if i + 1 < len(chosen) else x(step) + 8
        values = [value_at(c.points, order, step, plot.unit) for c, order in zip(plot.curves, orders, strict=True)]
        told = ", ".join(f"{c.name} {v}" for c, v in zip(plot.curves, values, strict=True))
        out.append(
            f'<g class="stop" data-values="step {step}|{escape("|".join(values))}">'
            f'<rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{HEIGHT}" fill="transparent"/>'
            f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f"<title>step {step}: {escape(told)}</title></g>"
        )
    return out


def value_at(points: Points, order: list[int], step: int, unit: Callable[[float], str]) -> str:
    """The value at a step, or the last one before it."""
    i = bisect_right(order, step)
    return unit(points[i - 1][1]) if i else "–"


def figure(plot: Plot) -> str:
    """The plot with heading, explanation and legend; empty where there is nothing to draw."""
    plot.curves = [c for c in plot.curves if c.points]
    if not any(math.isfinite(v) for c in plot.curves for _, v in c.points):
        if not plot.curves:
            return ""
        return (
            f'<figure class="plot"><h3>{escape(plot.title)}</h3><p>{plot.about}</p>'
            f'<p class="why">None of the {len(plot.curves[0].points)} values is finite.</p></figure>\n'
        )
    bad = sorted({s for c in plot.curves for s, v in c.points if not math.isfinite(v)})
    if bad:
        few = ", ".join(map(str, bad[:6])) + (", …" if len(bad) > 6 else "")
        plot.problems.append(f"Not finite at step {few}: the red triangles.")
    top = value_range(plot)[1]
    highest, step = max((v, s) for c in plot.curves for s, v in c.points if math.isfinite(v))
    if highest > top:
        plot.problems.append(f"Highest at step {step}, beyond the top: {plot.unit(highest)}.")
    last = max(c.points[-1][0] for c in plot.curves)
    problems = "".join(f'<p class="why">{escape(p)}</p>' for p in plot.problems)
    legend = "".join(
        f'<span class="{c.look} t{c.tone % 8}">{escape(c.name)} <b>{escape(plot.unit(c.points[-1][1]))}</b></span>'
        for c in plot.curves
    )
    return (
        f'<figure class="plot"><h3>{escape(plot.title)}</h3><p>{plot.about}</p>{problems}'
        f'<div class="legend"><span class="at"><b>step {last}</b></span>{legend}</div>{svg_of(plot)}</figure>\n'
    )
