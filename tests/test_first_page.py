"""The first page: its figure's numbers, its five lines, and that README and site say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.uplink.first_page import METHODS, RESULTS, SEEDS, curve, draw, summary
from benchmarks.uplink.run import load
from benchmarks.uplink.variants import SETTINGS, variants

ROOT = Path(__file__).parent.parent
README, INDEX = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()


def row(method, seed, accuracy, uplink, downlink):
    return {"method": method, "seed": seed, "accuracy": accuracy, "uplink": uplink, "downlink": downlink}


def test_a_curve_is_the_mean_of_the_seeds_over_all_bytes_so_far():
    rows = [row("LBGM", 0, [0.5, 0.7], [10, 2], [10, 10]), row("LBGM", 1, [0.7, 0.9], [10, 6], [10, 10])]
    assert curve(rows, "LBGM") == [(20, pytest.approx(0.6)), (20 + 14, pytest.approx(0.8))]


def test_shares_are_of_fedavgs_bytes():
    rows = [row("FedAvg", 0, [0.9], [100], [100]), row("LBGM", 0, [0.8], [10], [100])]
    rows.append(row("recommended", 0, [0.7], [2], [4]))
    assert summary(rows) == {"FedAvg": (0.9, 1, 1), "LBGM": (0.8, 0.1, 0.55), "recommended": (0.7, 0.02, 0.03)}


def test_the_results_are_there_and_the_variants_are_those_of_the_comparison():
    rows = load(RESULTS)
    assert {(row["method"], row["seed"]) for row in rows} == {(method, seed) for method in METHODS for seed in SEEDS}
    assert {len(row["accuracy"]) for row in rows} == {SETTINGS["paper"].rounds}
    assert {METHODS[method][0] for method in METHODS} <= {variant.name for variant in variants("paper")}


@pytest.mark.parametrize("page", [README, INDEX], ids=["README", "index"])
def test_the_first_page_says_what_was_measured(page):
    found = summary(load(RESULTS))
    lost = 100 * (found["FedAvg"][0] - found["LBGM"][0])
    text = " ".join(page.split())
    assert f"{found['LBGM'][1]:.1%} of FedAvg's uplink for {lost:.1f} points".replace("%", " %") in text
    assert f"{found['recommended'][2]:.1%} of the bytes of both directions".replace("%", " %") in text
    assert found["recommended"][0] >= found["FedAvg"][0] - 0.0005  # "nothing lost"
    assert len(re.findall(r"first_page_(light|dark)\.svg", page)) == 2


def test_the_readme_and_the_first_page_have_the_same_lines():
    (lines,) = re.findall(r"```py\n(.*?)```", INDEX, re.DOTALL)
    assert f"```python\n{lines}```" in README


def test_the_readme_fits_one_screen_before_its_details():
    assert README.split("\n## ")[0].count("\n") <= 45


def test_the_figure_is_drawn_for_light_and_for_dark(tmp_path):
    for name, dark in (("light", False), ("dark", True)):
        draw(load(RESULTS), tmp_path / f"{name}.svg", dark=dark)
        drawn, kept = tmp_path / f"{name}.svg", ROOT / "docs" / "images" / f"first_page_{name}.svg"
        assert 10_000 < kept.stat().st_size < 100_000
        assert drawn.stat().st_size == pytest.approx(kept.stat().st_size, rel=0.2)  # as matplotlib does
