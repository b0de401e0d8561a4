"""Plots: what is drawn can be told apart."""

import torch

from lmc.measure.figures import curves_figure, statistics_figure

NAMES = ["source", *(f"loss {i}" for i in range(25))]


def look(line) -> tuple:
    return line.get_color(), line.get_linestyle()


def test_no_two_curves_look_alike_and_the_source_is_black():
    flat = {name: torch.ones(8) for name in NAMES}
    points = {name: [(0.0, 0.0, "1"), (1.0, 1.0, "5")] for name in NAMES}
    statistics = statistics_figure(flat, flat)
    for axes in (*statistics.axes, *curves_figure(points, "x", "y").axes):
        looks = [look(line) for line in axes.lines]
        assert len(set(looks)) == len(NAMES) and looks[0] == ("black", "-")
    # A loss looks the same in both panels.
    left, right = statistics.axes
    assert [look(line) for line in left.lines] == [look(line) for line in right.lines]
