"""Partition figures: a column for a client and a row for a label, and sizes as bars or a histogram."""

import numpy as np
import pytest

from lightning_lbgm.figures.partition import draw_client_sizes, draw_label_map

NUMBERS = {"label_distance_mean": 0.254, "label_distance_chance": 0.119, "labels_effective_mean": 1.88}
NUMBERS |= {"size_min": 3, "size_max": 10, "size_cv": 0.489}


def parts_of(figure):
    """Return the axes of the sizes and of the map, and the map's shares with 0 for white."""
    above, axes = figure.axes[:2]
    return above, axes, axes.images[0].get_array().filled(0)


def test_the_map_has_the_share_of_each_label_at_each_client(tmp_path):
    figure = draw_label_map([[3, 1], [0, 2], [0, 0]], ["cat", "a dog with a long name"], NUMBERS)
    above, axes, shares = parts_of(figure)
    np.testing.assert_allclose(shares, [[0.75, 0, 0], [0.25, 1, 0]])
    assert axes.images[0].get_array().mask.tolist() == [[False, True, True], [False, False, True]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "a dog with a …"]
    assert [bar.get_height() for bar in above.patches] == [4, 2, 0]
    assert axes.get_xlabel() == "client"
    assert figure.get_suptitle() == (
        "Labels of the clients\ndistance from the mix of all 0.25, by chance 0.12; 1.9 effective labels a client"
    )
    figure.savefig(tmp_path / "map.png")


def test_of_many_clients_evenly_spaced_ones_are_drawn_sorted_by_their_most_frequent_label(tmp_path):
    # Client k has k + 1 examples of the label k % 10, and one of the next.
    counts = np.zeros((3000, 10), dtype=int)
    counts[np.arange(3000), np.arange(3000) % 10] = np.arange(3000) + 1
    counts[np.arange(3000), (np.arange(3000) + 1) % 10] += 1
    figure = draw_label_map(counts, range(10))
    above, axes, shares = parts_of(figure)
    assert shares.shape == (10, 100)
    assert shares.argmax(0).tolist() == sorted(list(range(10)) * 10)
    np.testing.assert_allclose(shares.sum(0), 1)
    # Real clients, not means over some: the sizes are those of distinct clients.
    sizes = [bar.get_height() for bar in above.patches]
    assert len(set(sizes)) == 100
    assert set(sizes) <= set(counts.sum(1).tolist())
    assert axes.get_xlabel() == "100 of 3,000 clients, by their most frequent label"
    figure.savefig(tmp_path / "map.png")


def test_many_labels_are_groups_of_neighbours(tmp_path):
    figure = draw_label_map(np.eye(4, 130, dtype=int), range(130))
    _, axes, shares = parts_of(figure)
    assert shares.shape == (44, 4)  # three labels a row, the last row one
    assert shares[0].tolist() == [1, 1, 1, 0]
    assert shares[1].tolist() == [0, 0, 0, 1]
    assert axes.get_yticklabels()[0].get_text() == "0 to 2"
    figure.savefig(tmp_path / "map.png")


def test_few_clients_are_bars_with_their_mean(tmp_path):
    figure = draw_client_sizes([5, 10, 3], NUMBERS)
    (axes,) = figure.axes
    assert axes.get_title() == "Examples of the clients\n3 to 10 examples a client, coefficient of variation 0.49"
    assert [bar.get_height() for bar in axes.patches] == [5, 10, 3]
    assert axes.lines[0].get_ydata()[0] == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean, 6"]
    figure.savefig(tmp_path / "sizes.png")


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [
        (np.arange(41) + 100, "linear"),
        (np.full(100, 600), "linear"),
        (np.arange(1, 3001), "log"),
        ([0, *[40] * 60], "linear"),
        ([0, *[1, 10, 100] * 30], "linear"),
    ],
    ids=range(5),
)
def test_many_clients_are_a_histogram_of_all_of_them(tmp_path, sizes, scale):
    figure = draw_client_sizes(sizes)
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == len(sizes)
    assert len(axes.patches) <= 41
    assert axes.get_xscale() == scale
    figure.savefig(tmp_path / "sizes.png")
