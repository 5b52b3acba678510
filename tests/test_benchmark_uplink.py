"""The comparison of uplinks: its summaries by hand, and the documentation's tables are those of its results."""

import json
from pathlib import Path

import pytest

from benchmarks.uplink import SETTINGS, Summary, pareto, summarise, table, uplinks

ROOT = Path(__file__).parent.parent
RESULTS = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "uplink.jsonl").read_text().splitlines()]


def test_a_summary_is_the_mean_of_the_seeds_and_the_farthest_of_them():
    runs = [("FedAvg", 0.9, 1.0), ("FedAvg", 0.8, 1.0), ("LookBack(0.2)", 0.8, 0.1), ("LookBack(0.2)", 0.7, 0.4)]
    rows = [{"setting": "paper", "uplink": u, "accuracy": a, "share": s} for u, a, s in runs]
    fedavg, look_back = summarise("paper", [*rows, {**rows[0], "setting": "noisy"}])
    assert (fedavg.uplink, fedavg.accuracy, fedavg.lost) == ("FedAvg", pytest.approx(0.85), pytest.approx(0))
    assert (look_back.accuracy, look_back.accuracy_spread) == (pytest.approx(0.75), pytest.approx(0.05))
    assert (look_back.share, look_back.share_spread) == (pytest.approx(0.25), pytest.approx(0.15))
    assert look_back.lost == pytest.approx(10)


def test_the_pareto_front_has_what_nothing_beats_in_both():
    points = {"a": (0.9, 1.0), "b": (0.9, 0.5), "c": (0.8, 0.6), "d": (0.7, 0.1), "e": (0.6, 0.1)}
    summaries = [Summary(name, "", accuracy, 0, share, 0, 0) for name, (accuracy, share) in points.items()]
    assert [summary.uplink for summary in pareto(summaries)] == ["d", "b"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_documentation_shows_the_results(setting):
    shown = table(summarise(setting, RESULTS))
    assert shown in (ROOT / "docs" / "choosing.md").read_text()
    assert (ROOT / "docs" / "images" / f"uplink_{setting}.png").stat().st_size > 10_000
    seeds = {(row["uplink"], row["seed"]) for row in RESULTS if row["setting"] == setting}
    assert seeds == {(name, seed) for name in uplinks(setting) for seed in range(3)}
