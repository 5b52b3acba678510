"""The figures of the gradient space show its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_lbgm.figures.gradient_space import draw_components, draw_cosines, draw_principal_cosines


def test_components_are_a_line_each_beside_the_number_of_gradients_and_the_metric():
    counts = {"N95": [1, 1, 2], "N99": [1, 2, 3]}
    layers = {"N95": [[1, 1], [1, 2], [2, 4]], "N99": [[1, 1], [2, 2], [2, 2]]}
    figure = draw_components([4, 5, 6], counts, layers, "val/acc", [(4, 0.5), (6, 0.75)])
    above, below = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in above.lines}
    assert lines["N95"] == [[4, 1], [5, 1], [6, 2]]
    assert lines["N99, mean of 2 tensors ± deviation"] == [[4, 1], [5, 2], [6, 2]]
    assert lines["N95, mean of 2 tensors ± deviation"] == [[4, 1], [5, 1.5], [6, 3]]
    assert lines["gradients so far"] == [[4, 1], [5, 2], [6, 3]]
    band = above.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 6, 1].min() == 2  # 3 - 1
    assert below.lines[0].get_xydata().tolist() == [[4, 0.5], [6, 0.75]]
    assert (below.get_ylabel(), below.get_xlabel()) == ("val/acc", "epoch")


def test_without_a_metric_there_is_one_panel():
    (axes,) = draw_components([0], {"N95": [1]}).axes
    assert axes.get_xlabel() == "epoch"
    assert {line.get_label() for line in axes.lines} == {"N95", "gradients so far"}


def test_principal_cosines_are_drawn_without_their_signs():
    figure = draw_principal_cosines([0, 1], {"whole model": [[-0.5, 1.0], [0.25, 0.0], [0.0, -1.0]]}, 0.99)
    axes, bar = figure.axes
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), [[0.5, 1.0], [0.25, 0.0], [0.0, 1.0]])
    assert image.get_clim() == (0, 1)
    assert tuple(image.get_extent()) == (-0.5, 1.5, 3.5, 0.5)
    assert (axes.get_ylabel(), bar.get_ylabel()) == ("principal direction", "|cosine|")
    assert "explain 99%" in figure.get_suptitle()


def test_cosines_are_drawn_with_their_signs_and_an_epoch_without_a_gradient_is_white():
    figure = draw_cosines([3, 5], {"whole model": [[1.0, -0.5], [-0.5, 1.0]]})
    (image,) = figure.axes[0].get_images()
    nan = np.nan
    expected = [[1, nan, -0.5], [nan, nan, nan], [-0.5, nan, 1]]
    np.testing.assert_array_equal(image.get_array().filled(nan), expected)
    assert image.get_clim() == (-1, 1)
    assert tuple(image.get_extent()) == (2.5, 5.5, 5.5, 2.5)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_each_tensor_has_its_panel(count, tmp_path):
    names = [f"layer{i}.weight" for i in range(count)]
    figure = draw_cosines([0, 1], {name: np.eye(2) for name in names})
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert len(panels) == count
    if count > 1:
        assert [axes.get_title() for axes in panels] == names
    figure.savefig(tmp_path / "figure.png")


def test_a_tensor_without_variance_says_so(tmp_path):
    figure = draw_principal_cosines([0, 1], {"a": [[1.0, 0.5]], "b": np.zeros((0, 2))}, 0.99)
    assert [text.get_text() for text in figure.axes[1].texts] == ["does not vary"]
    figure.savefig(tmp_path / "figure.png")
    draw_principal_cosines([0], {"a": np.zeros((0, 1))}, 0.99).savefig(tmp_path / "figure.png")
