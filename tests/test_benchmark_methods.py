"""The comparison of methods: its table by hand, one run through the Trainer, and its page is that of its results."""

import json

import pytest

from benchmarks import methods
from benchmarks.methods import PAGE, RESULTS, SETTINGS, filled, load, run_missing, table, tables


def row(method, value, seed, accuracy, goal=10, bytes_=1.0):
    numbers = {"accuracy": accuracy, "spread": 0.01 * seed, "goal": goal, "bytes": bytes_, "seconds": 1.0}
    return {"setting": "drift", "method": method, "value": value, "seed": seed, "rounds": 100, **numbers}


def test_a_table_compares_with_fedavg_of_the_same_seeds():
    rows = [row("FedAvg", None, 0, 0.8), row("FedAvg", None, 1, 0.7, None)]
    rows += [row("SCAFFOLD", None, 0, 0.9, 5, 1.5), row("SCAFFOLD", None, 1, 0.8, 15, 1.5), row("FedDyn", 0.1, 1, 0.75)]
    _, _, fedavg, scaffold, feddyn = table(rows).splitlines()
    assert fedavg == "| FedAvg |  | 2 | 0.7500 ± 0.0500 | +0.00 | 0.50 | never | 1.00 |"
    assert scaffold == "| SCAFFOLD |  | 2 | 0.8500 ± 0.0500 | +10.00 | 0.50 | 10 | 1.50 |"
    assert feddyn == "| FedDyn | 0.1 | 1 | 0.7500 ± 0.0000 | +5.00 | 1.00 | 10 | 1.00 |"


def test_only_what_the_results_file_lacks_is_run(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("FedAvg", None, 0, 0.5)) + "\n")
    ran = []
    monkeypatch.setattr(methods, "run", lambda *job: ran.append(job) or row("SCAFFOLD", None, 0, 0.6))
    jobs = [("drift", "FedAvg", None, 0), ("drift", "SCAFFOLD", None, 0)]
    found = run_missing(jobs, path, None)
    assert [r["accuracy"] for r in found] == [0.5, 0.6]
    assert ran == [(*jobs[1], None)]
    assert load(path) == found


def test_methods_are_settings_that_the_strategy_takes():
    from lightning_lbgm import LBGMFederated

    for method in methods.methods().values():
        for value in (*method.chosen.values(), *method.tried):
            LBGMFederated(num_clients=100, **method.make(value))
        assert set(method.chosen) <= set(SETTINGS)
        assert all(value in method.tried for value in method.chosen.values())


def test_the_documentation_shows_the_results():
    text = PAGE.read_text()
    for name, content in tables(load(RESULTS)).items():
        assert "FedDyn" in content
        assert filled(text, name, content) == text


def test_a_page_without_the_marks_is_not_written():
    with pytest.raises(ValueError, match="unpack"):
        filled("no marks", "drift", "")
