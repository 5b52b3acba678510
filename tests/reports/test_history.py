"""What is remembered for figures is bounded, and its bins are the means and maxima of the points in them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from conftest import TinyModule, fit_tiny

from lightning_lbgm import ConvergenceMonitor, LBGMCallback, LBGMFederated, LookBack
from lightning_lbgm.figures.communication import draw_lbp_errors
from lightning_lbgm.reports.history import Curves, ErrorMap


@pytest.mark.parametrize("capacity", [4, 5, 7])
def test_bins_are_what_the_points_in_them_say(capacity):
    values = [random.Random(1).random() for _ in range(100)]
    curves = Curves(("last", "mean", "max"), capacity)
    stride = 1
    for x, value in enumerate(values):
        curves.append((x, value, value))
        stride *= 2 if -(-(x + 1) // stride) > capacity else 1
        bins = [values[i : min(i + stride, x + 1)] for i in range(0, x + 1, stride)]
        ends = np.cumsum([len(b) for b in bins]) - 1
        expected = [(end, sum(b) / len(b), max(b)) for end, b in zip(ends, bins)]
        np.testing.assert_allclose(curves.points(), expected)
        again = Curves(("last", "mean", "max"), capacity)
        again.load_state_dict(curves.state_dict())
        curves = again
    assert len(curves) <= capacity


def test_a_point_at_the_same_place_replaces_the_last_one():
    curves = Curves(("last", "last"))
    for point in ((1.0, 5.0), (2.0, 6.0), (2.0, 7.0)):
        curves.append(point)
    assert curves.points() == [(1.0, 5.0), (2.0, 7.0)]


def test_what_is_not_a_number_does_not_count_beside_one():
    curves = Curves(("last", "mean", "max"), capacity=1)
    for point in ((0, math.nan, 2.0), (1, 4.0, math.nan)):
        curves.append(point)
    assert curves.points() == [(1.0, 4.0, 2.0)]


def test_cells_are_means_of_the_errors_in_them():
    draw, errors, seen = random.Random(0), ErrorMap(max_rounds=8, max_clients=4), {}
    for round_index in range(3, 100):
        clients = draw.sample(range(13 if round_index > 20 else 3), 2)
        pairs = [(client, draw.random()) for client in clients]
        seen.update({(round_index, client): error for client, error in pairs})
        errors.add(round_index, [*pairs, (0, math.nan)])
        cells: dict[tuple[int, int], list[float]] = {}
        for (t, k), error in seen.items():
            key = (t // errors.round_stride * errors.round_stride, k // errors.client_stride * errors.client_stride)
            cells.setdefault(key, []).append(error)
        found = {(t, k): error for t, k, error in zip(*errors.cells())}
        assert len(errors) == len(found)
        assert found == pytest.approx({key: sum(e) / len(e) for key, e in cells.items()}, abs=1e-6)
        again = ErrorMap(max_rounds=8, max_clients=4)
        again.load_state_dict(errors.state_dict())
        errors = again
    assert (errors.round_stride, errors.client_stride) == (16, 4)


def size(state):
    """Return the bytes of the tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.element_size() * state.numel()
    return sum(map(size, state.values())) if isinstance(state, dict) else 0


def test_a_long_run_of_many_clients_keeps_no_more_than_a_figure_shows():
    errors = ErrorMap()
    errors.add(0, [(client, 0.5) for client in range(150)])
    assert size(errors.state_dict()) == 16 * 150
    for round_index in range(1, 900):
        errors.add(round_index, [(client, 0.5) for client in range(round_index % 7, 5000, 40)])
    assert errors.cells()[2] == [0.5] * len(errors)
    assert len(errors) <= 400 * 200
    assert errors.round_stride == 4
    assert errors.client_stride == 32


def test_a_merged_map_is_drawn_in_rounds_and_clients(tmp_path):
    # Cells of 4 rounds and 2 clients: rounds 8 to 15, clients 0 to 3.
    figure = draw_lbp_errors([8, 12], [0, 2], [0.25, 1.0], cell=(4, 2))
    (image,) = figure.axes[0].get_images()
    np.testing.assert_array_equal(image.get_array().filled(np.nan), [[0.25, np.nan], [np.nan, 1.0]])
    assert tuple(image.get_extent()) == (7.5, 15.5, 3.5, -0.5)
    assert figure.axes[0].get_title() == "LBP error per client and round, means of 4 x 2"
    figure.savefig(tmp_path / "figure.png")


def watched(root, **settings):
    callbacks = [LBGMCallback(**settings), ConvergenceMonitor(figure=settings.get("figures", True))]
    fit_tiny(root, LBGMFederated(num_clients=5, uplink=[LookBack(0.5)], seed=0), callbacks=callbacks, val=True)
    return callbacks


def test_without_figures_nothing_is_kept(tmp_path):
    for callback in watched(tmp_path, figures=False):
        assert callback.state_dict() == {}
    ours, monitor = watched(tmp_path)
    assert size(ours.state_dict()["lbp_errors"]) == 3 * 5 * 16
    assert size(monitor.state_dict()) == 3 * 4 * 8


def test_checkpoints_of_version_0_1_load(tmp_path):
    """Their callbacks' states were all points and all tests."""
    ours, monitor = watched(tmp_path)
    old = {
        "metric": "val/acc",
        "curve": torch.tensor(ours.state_dict()["curve"]["points"].tolist(), dtype=torch.float64),
        "rounds": torch.tensor([t for t in range(3) for _ in range(5)], dtype=torch.int32),
        "clients": torch.tensor(list(range(5)) * 3, dtype=torch.int32),
        "errors": ours.state_dict()["lbp_errors"]["means"],
    }
    again = LBGMCallback()
    again.load_state_dict(old)
    assert again.state_dict()["total"]["metric"] is None  # what both directions had sent was not kept
    assert str({**again.state_dict(), "total": None}) == str({**ours.state_dict(), "total": None})
    second = ConvergenceMonitor()
    second.load_state_dict({"history": monitor.state_dict()["history"]["points"]})
    assert str(second.state_dict()) == str(monitor.state_dict())
    off = LBGMCallback(figures=False)
    off.load_state_dict(old)
    assert off.state_dict() == {}


def test_drawing_and_keeping_leave_the_generators_alone(tmp_path):
    class Draws(TinyModule):
        def on_train_end(self):
            self.drawn = (random.random(), np.random.rand(), float(torch.rand(())))

    drawn = []
    for figures in (True, False):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        module = Draws()
        callbacks = [LBGMCallback(figures=figures), ConvergenceMonitor(figure=figures)]
        fit_tiny(tmp_path, LBGMFederated(num_clients=3, seed=0), module, callbacks=callbacks, val=True)
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
