"""The comparison of rules of who takes part: its table by hand, one run through the Trainer, and the documentation."""

import statistics

import pytest

from benchmarks.participation import DOCS, ROUNDS, RULES, SEEDS, load, run, table


def row(rule, seed, late, reached):
    counts = {"cohort": 6, "dropped": 1.5, "waited": 7.25, "uplink": 1_500_000, "downlink": 2_000_000}
    return {"rule": rule, "seed": seed, "rounds": ROUNDS, "late": late, "reached": reached, **counts}


def test_a_table_has_the_means_over_the_seeds():
    rows = [row("uniform", 0, 0.8, 40), row("uniform", 1, 0.9, 50), row("dropout=0.2", 0, 0.7, None)]
    head, _, uniform, dropout = table(rows).splitlines()
    assert head.count("|") == uniform.count("|") == 9
    assert uniform == "| `uniform` | 0.850 ± 0.050 | 45 | 6.0 | 1.5 | 7.2 steps | 1.50 MB | 2.00 MB |"
    assert dropout.startswith("| `dropout=0.2` | 0.700 ± 0.000 | not by all |")


def test_a_run_is_counted_by_its_reports():
    """A linear model of 64 x 10 + 10 floats."""
    found = run("over_select=1.3, dropout=0.2", seed=0, rounds=4)
    assert (found["rounds"], found["reached"]) == (4, None)
    assert found["cohort"] + found["dropped"] == 8  # 1.3 * 6 = 7.8
    assert found["uplink"] == 4 * found["cohort"] * 650 * 4
    assert found["downlink"] == 4 * 8 * 650 * 4
    assert found["waited"] >= 1
    assert 0 < found["late"] < 1


def test_the_documentation_shows_the_results():
    rows = load()
    assert table(rows) in DOCS.read_text()
    assert [(found["rule"], found["seed"]) for found in rows] == [(rule, seed) for rule in RULES for seed in SEEDS]
    assert {found["rounds"] for found in rows} == {ROUNDS}


@pytest.mark.parametrize("rule", ["over_select=1.3", "deadline=5"])
def test_the_results_wait_for_fewer_steps_where_the_slowest_are_dropped(rule):
    uniform, other = ([r["waited"] for r in load() if r["rule"] == name] for name in ("uniform", rule))
    assert statistics.mean(other) < statistics.mean(uniform)
