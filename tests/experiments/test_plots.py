"""Pictures: ticks at what was run, legends beside the data, and Matplotlib only where something is drawn."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import _plots

ROOT = Path(__file__).parents[2]


def test_ticks_are_at_the_values_that_were_run():
    figure, axes = _plots.subplots()
    axes.plot([4, 16, 128, 64], [1, 2, 3, 4])
    _plots.ticks_at(axes, [16, 4, 64, 128, 16], log=True)
    figure.draw_without_rendering()
    assert [(label.get_position()[0], label.get_text()) for label in axes.get_xticklabels()] == [
        (4, "4"),
        (16, "16"),
        (64, "64"),
        (128, "128"),
    ]
    assert len(axes.get_xticks(minor=True)) == 0


def test_rounds_are_whole_numbers():
    figure, axes = _plots.subplots()
    axes.plot(range(5), range(5))
    _plots.whole_rounds(axes)
    figure.draw_without_rendering()
    assert axes.get_xlabel() == "round"
    np.testing.assert_array_equal(axes.get_xticks() % 1, 0)


def test_a_legend_covers_no_data():
    figure, (left, right) = _plots.subplots(1, 2)
    for axes, count in ((left, 5), (right, 2)):
        for i in range(count):
            axes.plot([0, 1], [i, 1 - i], label=f"line {i} of {count}")
    _plots.legend(figure, left, right)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 7
    for axes in (left, right):
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert axes.get_legend() is None


def test_the_main_command_starts_without_matplotlib():
    program = "import sys, experiments.fedmezo; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("length", [3, 30, 60])
def test_a_legend_is_inside_the_figure(length):
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    for i in range(4):
        axes.plot([0, 1], label=str(i) * length)
    _plots.legend(figure, axes, columns=4)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
