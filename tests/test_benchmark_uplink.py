"""The comparison of uplinks and downlinks: its summaries by hand, one run through the Trainer, and its results file."""

import json

import pytest
import torch

from benchmarks.uplink.__main__ import RESULTS
from benchmarks.uplink.report import DOCS, Summary, draw, pareto, summarise, table
from benchmarks.uplink.run import Job, load, run_missing
from benchmarks.uplink.variants import DATASETS, SETTINGS, Variant, variants
from lightning_lbgm import DIANA, Cast, ErrorFeedback, LookBack, SignSGD, TopK


def rows(setting="cohorts"):
    """Two seeds of FedAvg and of the paper's method on MNIST."""
    runs = [
        ("FedAvg", 0, 0.9, 0.88, 1.0, 1.0),
        ("FedAvg", 1, 0.8, 0.78, 1.0, 1.0),
        ("LookBack(0.2)", 0, 0.8, 0.86, 0.1, 0.55),
        ("LookBack(0.2)", 1, 0.7, 0.74, 0.4, 0.70),
    ]
    names = ("variant", "seed", "accuracy", "late", "uplink", "total")
    return [{"setting": setting, "data": "MNIST", "rounds": 1, **dict(zip(names, one))} for one in runs]


def test_a_summary_is_the_mean_of_the_seeds_against_fedavg_of_the_same_seeds():
    fedavg, look_back = summarise("cohorts", "MNIST", rows() + rows("noisy"))
    assert (fedavg.variant, fedavg.accuracy, fedavg.lost, fedavg.late) == ("FedAvg", pytest.approx(0.85), 0, 0)
    assert look_back.accuracy == pytest.approx(0.75)
    assert look_back.spread == pytest.approx(0.05)
    assert look_back.lost == pytest.approx(10)
    assert look_back.late == pytest.approx(3)
    assert look_back.uplink == pytest.approx(0.25)
    assert look_back.total == pytest.approx(0.625)
    # A seed that FedAvg and the other share alone counts.
    one = summarise("cohorts", "MNIST", [row for row in rows() if row["variant"] == "FedAvg" or row["seed"] == 1])
    assert one[1].late == pytest.approx(4)


def test_a_table_has_the_data_sets_side_by_side_and_what_was_not_run_is_empty():
    head, _, fedavg, look_back = table("cohorts", rows()).splitlines()
    assert head.count("lost, last 20 rounds") == 2
    assert fedavg.startswith("| `FedAvg` | 0.8500 ± 0.0500 | +0.00 | +0.00 | 1.0000 | 1.0000 |")
    assert look_back == "| `LookBack(0.2)` | 0.7500 ± 0.0500 | +10.00 | +3.00 | 0.2500 | 0.6250 |  |  |  |  |  |"


def test_the_pareto_front_has_what_nothing_beats_in_both():
    points = {"a": (0.0, 1.0), "b": (0.0, 0.5), "c": (1.0, 0.6), "d": (2.0, 0.1), "e": (3.0, 0.1)}
    summaries = [Summary(name, "", 0, 0, lost, lost, total, total) for name, (lost, total) in points.items()]
    assert [summary.variant for summary in pareto(summaries)] == ["d", "b"]


def test_names_are_short_and_tell_the_variants_apart():
    sparse_signs = [TopK(0.03), SignSGD()]
    assert Variant("", []).name == "FedAvg"
    assert Variant("", [ErrorFeedback(DIANA(sparse_signs))]).name == "EF(DIANA(TopK(0.03) + SignSGD()))"
    assert Variant("", [Cast(torch.bfloat16), LookBack(0.9, rank=8)]).name == "Cast(bfloat16) + LookBack(0.9, rank=8)"
    assert Variant("", [SignSGD()], sparse_signs).name == "↑ SignSGD() ↓ TopK(0.03) + SignSGD()"
    assert Variant("", [], sparse_signs).name == "↑ full ↓ TopK(0.03) + SignSGD()"
    for setting in SETTINGS:
        names = [variant.name for variant in variants(setting)]
        assert names[0] == "FedAvg"
        assert len(set(names)) == len(names) <= 16


def test_only_what_the_results_file_lacks_is_run(tmp_path, monkeypatch):
    """A result that is there is taken, one of fewer rounds is not; what is missing is trained and written."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results.jsonl"
    there = {**rows()[2], "rounds": 120}
    results.write_text("".join(json.dumps(row) + "\n" for row in (there, {**there, "rounds": 1, "accuracy": 0.0})))
    assert run_missing([Job("cohorts", "MNIST", "LookBack(0.2)", 0)], results, workers=1) == [there]
    assert len(results.read_text().splitlines()) == 2


def test_a_figure_is_drawn_of_what_there_is(tmp_path):
    draw("cohorts", rows(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_documentation_shows_the_results(setting):
    rows = load(RESULTS)
    assert table(setting, rows) in (DOCS / "choosing.md").read_text()
    assert (DOCS / "images" / f"uplink_{setting}.png").stat().st_size > 10_000
    found = {(row["data"], row["variant"], row["seed"]) for row in rows if row["setting"] == setting}
    assert found == {(data, v.name, seed) for data in DATASETS for v in variants(setting) for seed in range(3)}
    assert {row["rounds"] for row in rows if row["setting"] == setting} == {SETTINGS[setting].rounds}
