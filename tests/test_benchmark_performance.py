"""The measurements of performance: their arithmetic by hand, and the page is that of its results."""

from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.timing import ratio, take_turns
from benchmarks.workloads import W1, W2, loop, threads, vectorized

ROOT = Path(__file__).parent.parent
ROWS = page.load()


def test_a_ratio_is_the_median_over_the_turns():
    seconds = {"loop": [1.0, 2.0, 4.0], "ours": [2.0, 3.0, 4.0], "more": [2.5, 3.2, 8.0]}
    assert ratio(seconds, "ours", "loop") == pytest.approx(1.5)  # of 2, 1.5, 1
    assert ratio(seconds, "more", "loop", minus="ours") == pytest.approx(0.5)  # of 0.5, 0.1, 1


def test_contestants_take_turns_and_the_first_rounds_do_not_count():
    order = []

    def contestant(name):
        while True:
            order.append(name)
            yield

    seconds = take_turns({name: lambda name=name: contestant(name) for name in "ab"}, rounds=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("workload", [W1, W2], ids=["W1", "W2"])
def test_hand_written_ways_make_the_same_federation(workload):
    small = type(workload)(workload.name, "", workload.make_net, workload.shape, num_clients=4, cohort_size=3)
    by_hand = loop(small)
    expected = [next(by_hand) for _ in range(3)]
    for other in (threads(small), vectorized(small, 3), vectorized(small, 2)):
        assert [next(other) for _ in range(3)] == pytest.approx(expected, abs=1e-5)
    assert expected[2] < expected[0]


def test_a_table_between_its_marks_is_replaced():
    rows = [{"table": "round", "workload": w, "what": "[]", "ratio": r} for w, r in (("W1", 1.239), ("W2", None))]
    text = page.filled("a\n<!-- table: round -->\nold\n<!-- end -->\nb", rows)
    table = "|  | W1 | W2 |\n| --- | ---: | ---: |\n| [] | 1.24 | not measured |"
    assert text == f"a\n<!-- table: round -->\n\n{table}\n\n<!-- end -->\nb"


def test_the_documentation_shows_the_results():
    text = page.PAGE.read_text()
    assert page.filled(text, ROWS) == text
    assert {row["table"] for row in ROWS} == {*page.TITLES, "machine"}
    for name in page.TITLES:
        assert f"<!-- table: {name} -->" in text
    for figure in ("performance_round.png", "performance_scaling.png"):
        assert (ROOT / "docs" / "images" / figure).stat().st_size > 10_000


def test_the_look_backs_shares_are_of_the_bytes_that_must_move():
    # A recycled float32 update: 8 bytes an entry read by the test; 12 by the aggregation, 4 of them written.
    rows = [r for r in ROWS if r["table"] == "look_back" and r["outcome"] == "recycled" and r["dtype"] == "float32"]
    assert len(rows) == 3
    for row in rows:
        bandwidth = 1e3 * row["dot_gb_s"]  # bytes a microsecond
        assert row["test_share"] == pytest.approx(8 * row["size"] / row["test_us"] / bandwidth)
        assert row["aggregate_share"] == pytest.approx(12 * row["size"] / row["aggregate_us"] / bandwidth)
