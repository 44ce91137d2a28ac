"""Curves: where their points lie, what the pointer shows, and what many or extreme values do."""

from __future__ import annotations

import math
import re

import pytest
from run_folders import full_run, page_of

from lora_training.report.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Plot,
    draw_svg,
    nice_ticks,
    smoothed,
    thinned,
)

pytestmark = pytest.mark.unit


def position(curve: Curve, plot: Plot) -> list[tuple[float, float]]:
    """Where a curve's points lie, read back through the labels of the axes."""
    svg = draw_svg(plot)
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)</text>', svg)
    across = [
        (float(x), float(t)) for x, y, _, t in labels if float(y) > HEIGHT - BOTTOM + 10 and _ == "middle"
    ]
    upright = [(float(y) - 4, float(t)) for x, y, _, t in labels if float(x) == LEFT - 6]

    def read(place: float, known: list[tuple[float, float]]) -> float:
        (a, va), (b, vb) = known[0], known[-1]
        return va + (place - a) / (b - a) * (vb - va)

    path = re.findall(r'class="curve [^"]*" d="([^"]+)"', svg)[plot.curves.index(curve)]
    drawn = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in drawn)
    return [(read(x, across), read(y, upright)) for x, y in drawn]


def test_curves_lie_where_their_values_are():
    points = [(s, 0.1 + (s - 170) ** 2 / 1e5) for s in range(10, 351, 10)]
    other = [(s, 0.2 + s / 1000) for s in range(50, 351, 50)]
    plot = Plot("Loss", "", [Curve("a", points), Curve("b", other, 1)])
    for curve, expected in zip(plot.curves, (points, other), strict=True):
        drawn = position(curve, plot)
        assert len(drawn) == len(expected)
        for (step, value), (x, y) in zip(expected, drawn, strict=True):
            assert abs(x - step) < 0.5 and abs(y - value) < 0.002, (step, value, x, y)


def test_the_pointer_and_the_legend_tell_the_values(tmp_path):
    html, page = page_of(full_run(tmp_path / "mine"))
    assert "<b>0.01667</b>" in html  # 1 / 60, the last loss
    stops = [attrs["data-values"].split("|") for attrs in page.all("g")]
    assert ["step 40", "0.025"] in [s[:2] for s in stops]
    assert ["step 40", "40%", "20%", "10%"] in stops
    assert "step 40: learned 40%, learned, held-out pictures 20%, forgotten 10%" in page.text
    assert "held-out pictures <b>0.24</b>" in html
    assert "7.25" in page.text and "30 s" in page.text  # memory; 60 steps of half a second


def test_a_spike_does_not_flatten_the_rest():
    points = [(s, 0.5 + s / 1000) for s in range(100)] + [(100, 500.0)]
    plot = Plot("Gradient norm", "", [Curve("a", points)], from_zero=True)
    drawn = position(plot.curves[0], plot)
    assert abs(drawn[50][1] - 0.55) < 0.01 and drawn[-1][1] < 2


def test_many_points_are_thinned_but_not_their_ends():
    points = [(s, math.sin(s) + (9.0 if s == 5003 else 0)) for s in range(10_000)]
    shown = thinned(points)
    assert len(shown) < 700 and points[5003] in shown and shown[-1] == points[-1] and shown == sorted(shown)
    assert nice_ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_smoothing_is_a_mean_that_starts_at_the_first_value():
    assert smoothed([(1, 3.0)]) == [(1, 3.0)]
    noisy = [(s, 1.0 + (-1) ** s * 0.5) for s in range(200)]
    assert all(abs(v - 1) < 0.1 for _, v in smoothed(noisy)[50:])
