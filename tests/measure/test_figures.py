"""Plots: what is drawn can be told apart."""

import numpy as np
import torch

from lmc.measure.figures import curves_figure, labelled_grid, statistics_figure

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


def test_small_pictures_are_shown_enlarged_pixel_by_pixel():
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    sheet = np.asarray(labelled_grid({"block": {"row": pictures}})).astype(float)
    large = np.asarray(labelled_grid({"block": {"row": torch.zeros(2, 3, 64, 64)}}))
    assert sheet.shape == large.shape
    wanted = (pictures + 1) / 2 * 255
    top, left = 18 + 1, 76 + 1  # below the title, beside the label; the gap between pictures
    for row, column in ((0, 0), (15, 3), (8, 15)):
        seen = sheet[top + 4 * row : top + 4 * row + 4, left + 4 * column : left + 4 * column + 4]
        for channel in range(3):
            assert abs(seen[..., channel] - wanted[0, channel, row, column].item()).max() <= 1


def test_of_a_title_that_is_too_long_the_end_is_shown():
    pictures, name = torch.zeros(1, 3, 64, 64), "lmc:corrector=somewhere/else:guidance_scale="
    first, second = (
        np.asarray(labelled_grid({f"{name}{omega}": {"row": pictures}})) for omega in (1, 5)
    )
    assert (first != second).any()
    assert labelled_grid({name: {"row": torch.zeros(1, 3, 64, 2)}}), "none of it fits"
