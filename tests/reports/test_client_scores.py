"""Scores of clients against numbers by hand."""

from __future__ import annotations

import math

import pytest

from lightning_lbgm.reports.client_scores import ClientHistory, ClientScores, Direction, score_rows, summarize
from lightning_lbgm.reports.reports import ClientReport


def scores_of(values, name="acc", sizes=None):
    return {k: ClientScores(sizes[k] if sizes else 1, {name: v}) for k, v in enumerate(values)}


def test_mean_worst_percentile_and_spread_by_hand():
    # Weights 1, 2, 5: (0.5 + 2 * 0.8 + 5 * 0.2) / 8. Of 0.2, 0.5, 0.8 the 10th percentile is 0.2 into the first gap.
    found = summarize(scores_of([0.5, 0.8, 0.2], sizes=[1, 2, 5]), {}, Direction())
    assert found == pytest.approx(
        {
            "clients/acc_mean": 3.1 / 8,
            "clients/acc_worst": 0.2,
            "clients/acc_p10": 0.2 + 0.2 * 0.3,
            "clients/acc_std": math.sqrt((0.0 + 0.09 + 0.09) / 3),
        }
    )


def test_the_worst_end_of_a_loss_is_the_upper_one():
    found = summarize(scores_of([1.0, 3.0, 2.0], "val/loss"), {0: {"val/loss": 0.5}, 1: {"val/loss": 3.0}}, Direction())
    assert found["clients/val/loss_worst"] == 3.0
    assert found["clients/val/loss_p10"] == pytest.approx(2.8)
    assert found["clients/val/loss_worse_than_own"] == 0.5  # client 0 is, client 1 ties, client 2 has none of its own


def test_worse_than_own_counts_clients_with_an_own_model():
    found = summarize(scores_of([0.5, 0.8, 0.2]), {0: {"acc": 0.6}, 1: {"acc": 0.7}, 2: {"other": 1.0}}, Direction())
    assert found["clients/acc_worse_than_own"] == 0.5
    assert "clients/acc_worse_than_own" not in summarize(scores_of([0.5]), {}, Direction())


def test_tuned_scores_have_their_own_names_and_no_comparison():
    scores = {0: ClientScores(1, {"acc": 0.5}, {"acc": 0.7}), 1: ClientScores(3, {"acc": 0.5}, {"acc": 0.9})}
    found = summarize(scores, {0: {"acc": 1.0}}, Direction())
    assert found["clients/tuned/acc_mean"] == pytest.approx(0.85)
    assert found["clients/tuned/acc_worst"] == 0.7
    assert "clients/tuned/acc_worse_than_own" not in found


def test_a_metric_that_some_clients_do_not_log_is_of_the_others():
    scores = {0: ClientScores(1, {"a": 1.0}), 1: ClientScores(9, {"a": 3.0, "b": 5.0})}
    found = summarize(scores, {}, Direction())
    assert (found["clients/a_mean"], found["clients/b_mean"], found["clients/b_std"]) == (pytest.approx(2.8), 5.0, 0.0)


def test_nan_of_one_client_is_seen():
    found = summarize(scores_of([0.5, math.nan]), {0: {"acc": 0.6}, 1: {"acc": 0.6}}, Direction())
    assert all(math.isnan(found[f"clients/acc_{part}"]) for part in ("mean", "worst", "p10", "std"))


@pytest.mark.parametrize(
    ("given", "name", "lower"),
    [
        (None, "val/RMSE", True),
        (None, "val/top1_error", True),
        (None, "perplexity", True),
        (None, "val/f1", False),
        (["val/bpc"], "val/bpc", True),
        (["val/bpc"], "val/loss", True),
        ({"val/loss": False}, "val/loss", False),
    ],
)
def test_the_better_direction_is_known_by_name_or_told(given, name, lower):
    assert Direction(given)(name) is lower


@pytest.mark.parametrize("wrong", ["val/loss", 3])
def test_a_direction_of_another_type_is_refused(wrong):
    with pytest.raises(TypeError, match="`lower_is_better` must be a list of names"):
        Direction(wrong)


def report(client_id, bits):
    return ClientReport(client_id, 1, 1, 0.0, 0.0, bits, 0, 0)


def test_a_round_that_is_recorded_again_replaces_itself():
    history = ClientHistory()
    history.record(0, [report(0, 80), report(1, 8)], {0: {"acc": 0.1}})
    history.record(1, [report(0, 800)], {0: {"acc": 0.9}})
    history.record(1, [report(1, 16)], {1: {"acc": 0.5}})  # the round broke off and was made again
    assert history.uplink_bytes == {0: 10.0, 1: 3.0}
    assert history.own == {0: {"acc": 0.1}, 1: {"acc": 0.5}}
    resumed = ClientHistory()
    resumed.load_state_dict(history.state_dict())
    resumed.record(2, [report(0, 8)], {})
    assert resumed.uplink_bytes == {0: 11.0, 1: 3.0}
    assert history.uplink_bytes == {0: 10.0, 1: 3.0}


def test_a_row_has_what_is_known_of_a_client():
    history = ClientHistory()
    history.record(3, [report(1, 80)], {1: {"acc": 0.25}})
    scores = {0: ClientScores(2, {"acc": 0.5}, {"acc": 0.6}), 1: ClientScores(4, {"acc": 1.0}, {})}
    first, second = score_rows(3, scores, history, ["a", "b"])
    assert first.pop("own/acc") != first.get("own/acc")  # NaN
    assert first == {
        "round": 3, "client": 0, "name": "a", "num_examples": 2, "acc": 0.5, "tuned/acc": 0.6, "uplink_bytes": 0.0,
    }  # fmt: skip
    assert (second["own/acc"], second["uplink_bytes"], second["name"]) == (0.25, 10.0, "b")
    assert "own/acc" not in next(score_rows(3, scores, history, with_own=False))
