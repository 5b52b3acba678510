"""The figures show the data, and drawing them needs no display."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_lbgm.figures import communication as figures
from lightning_lbgm.figures.clients import draw_clients
from lightning_lbgm.figures.communication import draw_lbp_errors, draw_metric_against_uplink
from lightning_lbgm.figures.convergence import draw_convergence

PNG = b"\x89PNG\r\n\x1a\n"
CURVES = {"fedavg": [(1000.0, 0.1), (2000.0, 0.6), (3000.0, 0.7)], "lbgm": [(100.0, 0.2), (250.0, 0.65)]}


def assert_saves_as_png(figure, path):
    figure.savefig(path)
    assert path.read_bytes().startswith(PNG)


def test_each_run_is_a_line_through_its_points(tmp_path):
    figure = draw_metric_against_uplink(CURVES, "val_acc")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        name: [list(point) for point in points] for name, points in CURVES.items()
    }
    assert axes.get_xlabel() == "uplink so far"
    assert axes.get_ylabel() == "val_acc"
    assert axes.get_title() == "val_acc against uplink"
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fedavg", "lbgm"]
    assert_saves_as_png(figure, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("longest", "unit", "size"), [(7200.0, "hours", 3600), (3599.0, "minutes", 60), (59.0, "seconds", 1)]
)
def test_time_is_drawn_in_a_unit_that_fits(longest, unit, size):
    (axes,) = figures.draw_metric_against_time({"a": [(1.0, 0.1), (longest, 0.6)], "b": []}, "acc", network="LTE").axes
    assert axes.get_xlabel() == f"{unit} on LTE"
    assert axes.lines[0].get_xdata().tolist() == [1 / size, longest / size]


def test_the_uplink_is_labelled_in_bytes():
    (axes,) = draw_metric_against_uplink(CURVES, "acc").axes
    label = axes.xaxis.get_major_formatter()
    assert [label(x) for x in (0, 1000, 2_500_000)] == ["0 B", "1 kB", "2.5 MB"]


def test_the_uplink_can_be_drawn_in_decades_and_is_labelled_in_bytes_still(tmp_path):
    figure = draw_metric_against_uplink(CURVES, "acc", log_scale=True)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_major_formatter()(1000) == "1 kB"
    assert_saves_as_png(figure, tmp_path / "figure.png")


def test_one_run_needs_no_legend():
    (axes,) = draw_metric_against_uplink({"run": [(1.0, 2.0)]}, "acc").axes
    assert axes.get_legend() is None
    assert len(axes.lines) == 1


@pytest.mark.parametrize("curves", [{}, {"run": []}, {"run": [], "other": [(1.0, 2.0)]}], ids=str)
def test_a_run_without_points_is_an_empty_line(curves, tmp_path):
    figure = draw_metric_against_uplink(curves, "acc")
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[list(p) for p in c] for c in curves.values()]
    assert_saves_as_png(figure, tmp_path / "figure.png")


def heat_map(figure):
    axes = figure.axes[0]
    (image,) = axes.get_images()
    return axes, image


def test_errors_are_a_cell_for_each_client_and_round_and_empty_where_there_was_no_test(tmp_path):
    # Rounds 3 to 5, clients 0 to 2; client 1 never took part.
    figure = draw_lbp_errors(rounds=[3, 3, 5], clients=[0, 2, 2], errors=[0.25, 1.0, 0.5])
    assert isinstance(figure, Figure)
    axes, image = heat_map(figure)
    nan = np.nan
    expected = [[0.25, nan, nan], [nan, nan, nan], [1.0, nan, 0.5]]
    np.testing.assert_array_equal(image.get_array().filled(nan), expected)
    assert image.get_clim() == (0, 1)
    # Cells are centred on whole rounds and clients, client 0 at the top.
    assert tuple(image.get_extent()) == (2.5, 5.5, 2.5, -0.5)
    assert axes.get_xlabel() == "round"
    assert axes.get_ylabel() == "client"
    assert axes.get_title() == "LBP error per client and round"
    assert figure.axes[1].get_ylabel() == "LBP error, sin²(α)"
    assert_saves_as_png(figure, tmp_path / "figure.png")


def test_cells_without_a_test_are_white():
    _, image = heat_map(draw_lbp_errors([0, 1], [0, 1], [0.5, 0.5]))
    *_, alpha = image.to_rgba(image.get_array())[0, 1]
    assert alpha == 0  # transparent, on the white of the axes
    assert image.axes.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_the_threshold_is_marked_on_the_colour_bar(tmp_path):
    figure = draw_lbp_errors([0], [0], [0.5], threshold=0.2)
    bar = figure.axes[1]
    marks = [line for line in bar.lines if list(line.get_ydata()) == [0.2, 0.2]]
    assert len(marks) == 1
    assert "δ=0.2" in [text.get_text() for text in bar.texts]
    assert_saves_as_png(figure, tmp_path / "figure.png")


def test_without_a_threshold_nothing_is_marked():
    bar = draw_lbp_errors([0], [0], [0.5]).axes[1]
    assert list(bar.texts) == []
    assert [line for line in bar.lines if len(set(line.get_ydata())) == 1] == []


@pytest.mark.parametrize("size", [2, 3, 11])
def test_ticks_are_whole_rounds_and_clients(size):
    figure = draw_lbp_errors(list(range(size)), list(range(size)), [0.5] * size)
    figure.canvas.draw()
    axes, _ = heat_map(figure)
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        assert all(float(tick).is_integer() for tick in ticks)


def test_errors_of_what_was_sent_stand_above_the_gap_in_decades(tmp_path):
    figure = draw_convergence([3, 4, 5], [0.0, 0.1, 0.2], [0.0, 0.3, 0.4], [0.0, 0.5, 0.25], bound=0.35)
    above, below = figure.axes
    assert {line.get_label(): list(line.get_ydata()) for line in above.lines} == {
        "largest of the cohort": [0.0, 0.3, 0.4],
        "mean": [0.0, 0.1, 0.2],
        "Δ²=0.35": [0.35, 0.35],
    }
    assert list(above.lines[0].get_xdata()) == list(below.lines[0].get_xdata()) == [3, 4, 5]
    assert list(below.lines[0].get_ydata()) == [0.0, 0.5, 0.25]
    assert (above.get_yscale(), below.get_yscale(), below.get_xlabel()) == ("log", "log", "round")
    assert_saves_as_png(figure, tmp_path / "figure.png")


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("bound", [None, 0.1])
def test_nothing_lost_and_nothing_known_can_be_drawn(value, bound, tmp_path):
    figure = draw_convergence([0, 1], [value] * 2, [value] * 2, [value] * 2, bound)
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear"]
    assert_saves_as_png(figure, tmp_path / "figure.png")


# The package itself comes with torchmetrics, which imports pyplot; so the module is loaded on its own.
ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("figures", sys.argv[1])
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)
assert not [name for name in sys.modules if name.split(".")[0] == "matplotlib"], "imported before drawing"
figures.draw_metric_against_uplink({"run": [(1.0, 2.0)]}, "acc").savefig(sys.argv[2])
figures.draw_lbp_errors([0], [0], [0.5], threshold=0.2).savefig(sys.argv[2])
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules, "pyplot opens windows"
"""


def test_matplotlib_is_imported_when_a_figure_is_drawn_and_pyplot_never(tmp_path):
    path = tmp_path / "figure.png"
    result = subprocess.run(
        [sys.executable, "-c", ALONE, figures.__file__, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(("lower", "ranked"), [(False, [0.2, 0.5, 0.9]), (True, [0.9, 0.5, 0.2])])
def test_clients_are_sorted_from_the_worst_and_stand_against_what_they_sent(tmp_path, lower, ranked):
    models = {"global model": {0: 0.5, 3: 0.9, 4: 0.2}, "tuned": {3: 0.7}}
    figure = draw_clients("val/acc", models, {0: 1000.0, 3: 50.0, 4: 2_000_000.0}, lower_is_better=lower)
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [ranked, [0.7]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["global model", "tuned"]
    assert right.collections[0].get_offsets().tolist() == [[1000.0, 0.5], [50.0, 0.9], [2_000_000.0, 0.2]]
    assert right.xaxis.get_major_formatter()(1000) == "1 kB"
    assert_saves_as_png(figure, tmp_path / "figure.png")
