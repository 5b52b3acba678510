"""The account of what was sent, by hand."""

import math
from dataclasses import replace

import pytest

from lightning_lbgm.compression import Decision
from lightning_lbgm.network import ClientTime, RoundTime
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.reports.metrics import client_rows, round_metrics
from lightning_lbgm.reports.reports import ClientReport, RoundReport

NAN = math.nan


def client(client_id, uplink_bits=320, recycled=None, errors=(), rejected=False):
    """A client of a model of 10 float32 parameters; a rejected one sends nothing."""
    decision = None
    if recycled is not None:
        coefficients = tuple(1.0 if r else NAN for r in recycled)
        outcome = "recycled" if all(recycled) else "partly recycled" if any(recycled) else "refreshed"
        decision = Decision(recycled, errors, coefficients, outcome=outcome)
    return ClientReport(
        client_id=client_id,
        num_examples=5,
        local_steps=2,
        loss=0.5,
        update_norm=1.0,
        uplink_bits=uplink_bits,
        dense_bits=0 if rejected else 320,
        downlink_bits=64,
        dense_downlink_bits=320,
        decision=decision,
        rejected=rejected,
    )


@pytest.fixture
def report():
    """A full send, a recycled one, one of two layers recycled, one rejected."""
    return RoundReport(
        round_index=3,
        clients=(
            client(0, 320, (False,), (0.9,)),
            client(1, 32, (True,), (0.1,)),
            client(4, 32 + 64, (True, False), (0.2, 0.6)),
            client(7, 0, rejected=True),
        ),
        update_norm=2.5,
    )


@pytest.mark.parametrize(
    ("report", "outcome"),
    [
        (client(0), "sent"),
        (client(0, 32, (True,), (0.1,)), "recycled"),
        (client(0, 0, rejected=True), "rejected"),
    ],
)
def test_a_clients_outcome_tells_what_it_did(report, outcome):
    assert report.outcome == outcome


def test_a_clients_error_is_the_mean_over_its_tests():
    assert client(0, 96, (True, False), (0.2, 0.6)).lbp_error == pytest.approx(0.4)
    assert client(0, 32, (True,), (0.0,)).lbp_error == 0.0
    assert math.isnan(client(0).lbp_error)


def test_a_rounds_figures_are_taken_over_clients_and_tests(report):
    assert report.uplink_bits == 320 + 32 + 96
    assert report.num_rejected == 1
    assert report.recycled_fraction == 2 / 4  # over the four tests, not the three clients
    assert report.lbp_error_mean == pytest.approx((0.9 + 0.1 + 0.2 + 0.6) / 4)


def test_a_round_without_tests_recycles_nothing_and_has_no_error():
    report = RoundReport(0, (client(0), client(1, 0, rejected=True)), 1.0)
    assert report.recycled_fraction == 0.0
    assert math.isnan(report.lbp_error_mean)


def test_a_round_without_clients_has_figures():
    report = RoundReport(0, (), 0.0)
    assert (report.uplink_bits, report.num_rejected, report.recycled_fraction) == (0, 0, 0.0)
    assert math.isnan(report.lbp_error_mean)


def test_the_ledger_adds_up_the_rounds(report):
    ledger = Ledger()
    ledger.record(report)
    assert ledger == Ledger(448, dense_uplink_bits=3 * 320, downlink_bits=4 * 64, dense_downlink_bits=4 * 320)
    ledger.record(RoundReport(4, (client(0, 32, (True,), (0.0,)),), 1.0))
    assert ledger == Ledger(480, dense_uplink_bits=4 * 320, downlink_bits=5 * 64, dense_downlink_bits=5 * 320)
    assert ledger.total_bits == 480 + 320
    assert ledger.total_savings == 1 - 800 / (9 * 320)
    assert ledger.savings == 1 - 480 / 1280
    assert ledger.uplink_floats == 480 / 32


def test_savings_are_zero_before_anything_was_sent_and_where_all_is_sent():
    assert Ledger().savings == Ledger().total_savings == 0.0
    assert Ledger().uplink_floats == 0.0
    ledger = Ledger()
    ledger.record(RoundReport(0, (client(0), client(1)), 1.0))
    assert ledger.savings == 0.0


def test_savings_are_negative_where_an_encoding_costs_more_than_it_spares():
    # TopK(1.0) sends an index beside each value: twice the bits.
    assert Ledger(uplink_bits=640, dense_uplink_bits=320).savings == -1.0


def test_totals_stay_exact_beyond_the_integers_of_a_float():
    ledger = Ledger(uplink_bits=2**60)
    ledger.record(RoundReport(0, (client(0, 1),), 1.0))
    assert ledger.uplink_bits == 2**60 + 1


def test_the_state_is_built_ins_and_restores_the_ledger(report):
    ledger = Ledger()
    ledger.record(report)
    state = ledger.state_dict()
    assert state == {"uplink_bits": 448, "dense_uplink_bits": 960, "downlink_bits": 256, "dense_downlink_bits": 1280}
    assert all(type(value) is int for value in state.values())
    assert Ledger.from_state(state) == ledger


def test_the_downlink_of_a_run_from_before_it_had_stages_was_dense():
    old = {"uplink_bits": 448, "dense_uplink_bits": 960, "downlink_bits": 1280}
    assert Ledger.from_state(old) == Ledger(448, 960, 1280, 1280)


def test_the_seconds_of_rounds_with_a_clock_are_added(report):
    ledger = Ledger()
    timed = replace(report, time=RoundTime((ClientTime(0, 1.0, 2.0, 0.5), ClientTime(4, 1.0, 1.0, 4.0))))
    for each in (timed, report, timed):
        ledger.record(each)
    assert ledger.seconds == 12.0
    assert Ledger.from_state(ledger.state_dict()) == ledger
    metrics = {name: value for name, value in round_metrics(timed, ledger).items() if name.startswith("time/")}
    assert metrics == {
        "time/round_seconds": 6.0, "time/total_seconds": 12.0, "time/straggler": 4,
        "time/download_share": 1 / 6, "time/compute_share": 1 / 6, "time/upload_share": 4 / 6,
    }  # fmt: skip
    rows = {row["client"]: row for row in client_rows(timed)}
    assert [rows[0][f"{part}_seconds"] for part in ("download", "compute", "upload")] == [1.0, 2.0, 0.5]
    assert math.isnan(rows[1]["upload_seconds"])
    assert "upload_seconds" not in next(client_rows(report))


def test_a_rounds_client_metrics_are_means_over_the_clients_that_have_them(report):
    report.clients[0].metrics["drift"] = 1.0
    report.clients[2].metrics.update(drift=4.0, accuracy=0.5)
    assert report.client_metrics == {"accuracy": 0.5, "drift": 2.5}
