"""A clock in whole fits: rounds' times by hand, who is in time, and how a run goes on."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_lbgm import Dropout, LBGMFederated, LookBack, NaturalPartitioner, NetworkClock, TopK
from lightning_lbgm.network import replay

OWNER = [0] * 4 + [1] * 8 + [2] * 12 + [3] * 16 + [4] * 20  # with a batch size of 4: 1, 2, 3, 4, 5 local steps
BITS = 21 * 32  # of the model, up and down
# Down 0.25 + 1, up 0.25 + 2, half a second a step: client k needs 4 + k / 2.
CLOCK = {"uplink": BITS / 2, "downlink": BITS, "latency": 0.25, "compute": 0.5}


class Times(Recorder):
    """Also say who took part and the metrics of the clock."""

    @property
    def cohorts(self):
        return [[client.client_id for client in report.clients] for report in self.reports]

    @property
    def seconds(self):
        return [report.time.seconds for report in self.reports]

    def metric(self, name):
        return [metrics[f"time/{name}"] for metrics in self.callback_metrics]


def run(fit, rounds=3, callbacks=(), network=None, **settings):
    """Train FedAvg on ``OWNER``'s five clients; return the trainer, its module and what was recorded."""
    trainer_names = ("ckpt_path", "enable_checkpointing", "val", "logger", "default_root_dir")
    trainer_settings = {k: settings.pop(k) for k in trainer_names if k in settings}
    federation = {"num_clients": 5, "partitioner": NaturalPartitioner(OWNER), "uplink": [], "seed": 2}
    times = Times()
    network = NetworkClock(**CLOCK) if network is None else network
    trainer, module = fit(
        LBGMFederated(**{**federation, "network": network, **settings}),
        batch_size=4,
        max_epochs=rounds,
        callbacks=[times, *callbacks],
        **trainer_settings,
    )
    return trainer, module, times


def clock(**changes):
    return NetworkClock(**{**CLOCK, **changes})


# Rounds by hand


def test_a_round_lasts_until_the_slowest_client(fit):
    trainer, _, times = run(fit)
    assert times.metric("round_seconds") == [6.0] * 3
    assert times.metric("total_seconds") == [6.0, 12.0, 18.0]
    assert times.metric("straggler") == [4.0] * 3
    shares = [times.metric(f"{part}_share")[0] for part in ("download", "compute", "upload")]
    assert shares == pytest.approx([1.25 / 6, 2.5 / 6, 2.25 / 6], rel=1e-15)
    assert [c.seconds for c in times.reports[0].time.clients] == [4.0, 4.5, 5.0, 5.5, 6.0]
    assert trainer.strategy.ledger.seconds == 18.0
    assert trainer.strategy.settings()["network"] == repr(NetworkClock(**CLOCK))


def test_what_was_sent_is_what_counts(fit):
    """LBGM recycles all but the first updates, 4 bytes each; the downlink sends what it lacks."""
    _, _, times = run(fit, uplink=[LookBack(1.0)], downlink=[TopK(0.2)], rounds=3)
    for report in times.reports:
        for client, time in zip(report.clients, report.time.clients):
            assert time.upload == 0.25 + client.uplink_bits / (BITS / 2)
            assert time.download == 0.25 + client.downlink_bits / BITS
            assert time.compute == 0.5 * (client.client_id + 1)
    recycled = times.reports[1]
    assert recycled.time.clients[0].upload == 0.25 + 2 * 32 / BITS
    assert recycled.downlink_bits < 5 * BITS
    assert times.seconds[1] < times.seconds[0] == 6.0


def test_clients_may_have_their_own_links(fit):
    """Client 0 makes a step and sends at an eighth of the rate: 1.25 + 0.5 + 16.25."""
    rows = [{"client": k} for k in range(5)]
    rows[0]["uplink"] = BITS / 16
    _, _, times = run(fit, network=clock(clients=rows), rounds=1)
    assert times.metric("round_seconds") == [18.0]
    assert times.metric("straggler") == [0.0]


def test_measured_compute_is_the_same_a_step_for_all_clients(fit):
    _, _, times = run(fit, network=clock(compute="measured"))
    for report in times.reports:
        steps = [time.compute / (time.client_id + 1) for time in report.time.clients]
        assert min(steps) > 0
        assert min(steps) == pytest.approx(max(steps))
    assert all(share > 0 for share in times.metric("compute_share"))


@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
def test_vectorised_clients_take_the_same_time(fit, execution):
    settings = {"num_clients": 5, "seed": 2, "local_steps": 3, "uplink": [], "execution": execution}
    times = Times()
    fit(LBGMFederated(**settings, network=clock(spread=0.5)), max_epochs=2, callbacks=[times])
    links = clock(spread=0.5).links(2, 5)
    expected = [links[k].time(k, BITS, 3, BITS).seconds for k in range(5)]
    assert [c.seconds for c in times.reports[1].time.clients] == expected
    assert times.metric("total_seconds")[1] == pytest.approx(2 * max(expected))


# Who is in time


def test_over_selection_takes_those_that_end_first_in_seconds(fit):
    """The more steps a client makes the faster is its link, so that the order is turned round: 10, 8.5, 7, 5.5, 5 s."""
    upload = [8.0, 6.0, 4.0, 2.0, 1.0]
    network = clock(clients=[{"uplink": BITS / seconds} for seconds in upload])
    needed = [1.25 + 0.5 * (k + 1) + 0.25 + upload[k] for k in range(5)]
    assert needed == [10.0, 8.5, 7.0, 5.5, 5.0]
    _, _, times = run(fit, network=network, clients_per_round=2, over_select=1.5, rounds=8)
    for cohort, report, seconds in zip(times.cohorts, times.reports, times.seconds):
        (dropped,) = (client.client_id for client in report.dropped)
        assert dropped < min(cohort)
        assert seconds == needed[min(cohort)]  # that of the second of three
    # With measured compute it cannot be told: by local steps, as without a clock, and as among clients planned alike.
    rows = [{"uplink": BITS / seconds} for seconds in upload]
    for network in (clock(clients=rows, compute="measured"), clock(compute=0)):
        _, _, times = run(fit, network=network, clients_per_round=2, over_select=1.5, rounds=4)
        assert all(report.dropped[0].client_id > max(cohort) for cohort, report in zip(times.cohorts, times.reports))


@pytest.mark.parametrize(
    ("settings", "cohort", "seconds", "straggler"),
    [
        ({"deadline": "4.6 s"}, [0, 1], 4.6, 1),  # two are late, for whom the server waits
        ({"deadline": "6 s"}, [0, 1, 2, 3, 4], 6.0, 4),  # all are in time
        ({"deadline": "2 min"}, [0, 1, 2, 3, 4], 6.0, 4),
        ({"deadline": 2}, [0, 1], 4.5, 1),  # local steps are known beforehand
        ({"deadline": "7 s", "dropout": lambda t, k: (k == 4) * 0.9999999}, [0, 1, 2, 3], 7.0, 3),
        ({"dropout": lambda t, k: (k == 4) * 0.9999999}, [0, 1, 2, 3], 5.5, 3),
        # It never got the model, and nobody waits for it.
        ({"deadline": "7 s", "dropout": lambda t, k: Dropout((k == 4) * 0.9999999)}, [0, 1, 2, 3], 5.5, 3),
        # Planned with uploads of half the size: client 3 is planned at 4.5, and needs 5.5.
        ({"deadline": "4.6 s", "network": clock(planned_uplink=0.5)}, [0, 1, 2, 3], 5.5, 3),
        ({"availability": np.array([[0] * 5, [1] * 5]), "deadline": "7 s"}, [], 0.0, math.nan),
    ],
)
def test_what_the_server_waits_for(fit, settings, cohort, seconds, straggler):
    _, _, times = run(fit, rounds=1, **settings)
    assert times.cohorts == [cohort]
    assert times.metric("round_seconds") == [seconds]
    assert times.metric("straggler") == pytest.approx([straggler], nan_ok=True)


def test_enough_updates_end_a_round_before_its_deadline(fit):
    _, _, times = run(fit, clients_per_round=2, over_select=2, deadline="5.2 s", rounds=12)
    ended = set()
    for cohort, report, seconds in zip(times.cohorts, times.reports, times.seconds):
        assert all(4 + k / 2 <= 5.2 for k in cohort)
        chosen = {client.client_id for client in report.chosen}
        in_time = sorted(chosen & {0, 1, 2})[:2]
        assert cohort == in_time
        assert seconds == (4 + max(cohort) / 2 if len(cohort) == 2 else 5.2)
        ended.add(len(cohort))
    assert 2 in ended


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"deadline": "3 s"},
            r"`deadline='3 s'` would drop every client.*fastest.*4 s, 84 bytes up and 84 down.*planned",
        ),
        ({"deadline": "30 s", "network": clock(compute="measured")}, "`deadline='30 s'` decides before.*'measured'"),
        (
            {"deadline": "30 s", "network": clock(clients=[{"compute": "measured"}] * 5)},
            "`deadline='30 s'` decides before.*'measured'",
        ),
        ({"network": clock(clients=[{}] * 4)}, "4 rows, but there are 5 clients"),
        ({"deadline": "30"}, "`deadline='30'` must be a time above 0 with a unit"),
        ({"deadline": "0 s"}, "`deadline='0 s'` must be a time above 0"),
        ({"deadline": "soon"}, "`deadline` must be '40 ms'.*got 'soon'"),
        ({"network": 3}, "`network` must be a `NetworkClock.*got 3"),
        ({"network": "5g"}, "preset='5g'.*must be one of"),
    ],
)
def test_what_does_not_go_together_is_refused(fit, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(fit, rounds=1, **settings)


def test_a_time_needs_a_clock():
    with pytest.raises(ValueError, match=r"`deadline='30 s'` is a time, which needs a clock: pass `network="):
        LBGMFederated(deadline="30 s")
    with pytest.raises(TypeError, match=r"bandwidth=...\)`: there is no such argument. Use `network=NetworkClock"):
        LBGMFederated(bandwidth="1 MB/s")


def test_a_clock_changes_nothing_else(fit):
    strategy = LBGMFederated(num_clients=5, partitioner=NaturalPartitioner(OWNER), uplink=[], seed=2)
    plain, module = fit(strategy, batch_size=4)
    _, timed, _ = run(fit)
    assert torch.equal(flat_params(module), flat_params(timed))
    assert not [name for name in plain.callback_metrics if name.startswith("time/")]
    assert plain.strategy.last_report.time is None
    assert "seconds" not in plain.strategy.ledger.state_dict()


# Going on

RULES = {
    "network": clock(spread=0.5),
    "clients_per_round": 3,
    "over_select": 1.5,
    "deadline": "9 s",
    "dropout": 0.2,
    "uplink": [LookBack(0.5)],
}


def test_a_resumed_run_takes_the_time_of_the_unbroken_one(fit, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole, module, times = run(fit, rounds=6, callbacks=[save], enable_checkpointing=True, **RULES)
    path, store = tmp_path / "step=4.ckpt", str(tmp_path / "store")
    resumed, again, later = run(fit, rounds=6, ckpt_path=path, client_store=store, **RULES)
    assert torch.equal(flat_params(module), flat_params(again))
    assert later.cohorts == times.cohorts[4:]
    assert later.seconds == times.seconds[4:]
    assert resumed.strategy.ledger == whole.strategy.ledger
    assert resumed.strategy.ledger.seconds == sum(times.seconds)
    # Without a clock the total stays; a checkpoint from before there were clocks begins at 0.
    plain, _ = fit(
        LBGMFederated(num_clients=5, partitioner=NaturalPartitioner(OWNER), uplink=[LookBack(0.5)], seed=2),
        batch_size=4, max_epochs=5, ckpt_path=path,
    )  # fmt: skip
    assert plain.strategy.ledger.seconds == sum(times.seconds[:4])
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["lightning_lbgm"]["ledger"]["seconds"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    old, _, later = run(fit, rounds=6, ckpt_path=tmp_path / "old.ckpt", **RULES)
    assert old.strategy.ledger.seconds == sum(later.seconds) == sum(times.seconds[4:])


class Breaking(TinyModule):
    """Breaks off in a round, before or after the server's step."""

    place = None

    def training_step(self, batch, batch_idx):
        if self.place == "training_step" and self.trainer.strategy.round_index == 2:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        if self.place == "on_train_batch_end" and self.trainer.strategy.round_index == 3:
            raise RuntimeError("boom")


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
def test_a_round_that_is_taken_back_takes_no_time(make_trainer, place):
    strategy = LBGMFederated(
        num_clients=5, partitioner=NaturalPartitioner(OWNER), uplink=[], seed=2, network=NetworkClock(**CLOCK)
    )
    module, trainer = Breaking(), make_trainer(strategy, max_epochs=5)
    loader = DataLoader(make_data(), batch_size=4)
    module.place = place
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, loader)
    assert strategy.ledger.seconds == 12.0 == 6.0 * strategy.round_index
    module.place = None
    trainer.fit(module, loader)
    assert strategy.ledger.seconds == 30.0


# What it leaves


def test_the_table_the_figure_and_a_replay(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    _, _, times = run(fit, rounds=6, logger=logger, val=True, **RULES)
    with open(f"{logger.log_dir}/clients.csv") as file:
        rows = list(csv.DictReader(file))
    taken = {(r.round_index, c.client_id): c for r in times.reports for c in r.time.clients}
    names = ("download_seconds", "compute_seconds", "upload_seconds")
    for row in rows:
        client = taken.get((int(row["round"]), int(row["client"])))
        assert (client is None) == (row["decision"] == "dropped")
        expected = [math.nan] * 3 if client is None else [client.download, client.compute, client.upload]
        assert [float(row[name]) for name in names] == pytest.approx(expected, nan_ok=True)
    assert (tmp_path / logger.log_dir / "figures" / "metric_vs_hours.png").read_bytes().startswith(b"\x89PNG")
    # Replayed on its own network it takes the same, but for waiting until the deadline.
    again = replay(rows, RULES["network"], seed=2)
    for report in times.reports:
        assert again[report.round_index].last == report.time.last
        assert again[report.round_index].seconds == report.time.last.seconds
    assert sum(time.seconds for time in replay(rows, NetworkClock(preset="data_centre")).values()) < 1


def test_no_figure_without_a_clock(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(LBGMFederated(num_clients=4, seed=0), logger=logger, val=True)
    names = {path.name for path in (tmp_path / logger.log_dir / "figures").iterdir()}
    assert "metric_vs_uplink.png" in names
    assert "metric_vs_hours.png" not in names
