"""Advice in the run: memories that age with small cohorts, and look-back tests that recycle nothing."""

import math
import warnings

import pytest
import torch
from conftest import Recorder, TinyModule

from lightning_lbgm import (
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LBGMCallback,
    LBGMFederated,
    LookBack,
    PowerSGD,
    Predict,
    TargetSavings,
    TopK,
)
from lightning_lbgm.callbacks.advice import keeps_memory
from lightning_lbgm.compression import Encoded, Stage, as_chain

ABSENT = "fl/rounds_absent_mean"
RARE, NOTHING = "Cohorts of", "recycled nothing"


class Wrapped(Stage):
    """A stage of a user's own that wraps a chain and keeps nothing itself."""

    def __init__(self, *stages):
        self.inner = as_chain(stages)

    def init(self):
        return {"inside": self.inner.init()}

    def encode(self, update, state, context=None):
        return self.inner.encode(update, state["inside"])


class Counting(Stage):
    """A stage of a user's own that keeps a number."""

    def init(self):
        return {"turns": 0}

    def encode(self, update, state, context=None):
        state["turns"] += 1
        return Encoded(update)


@pytest.fixture
def run(fit):
    """Train; return each round's cohort and metric, and the warnings of this kind."""

    def train(uplink, num_rounds, ckpt_path=None, module=None, **settings):
        recorder = Recorder()
        wanted = {"num_clients": 10, "clients_per_round": 2, "seed": 0, **settings}
        callbacks = wanted.pop("callbacks", [])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer, _ = fit(
                LBGMFederated(uplink=uplink, **wanted),
                max_epochs=num_rounds,
                callbacks=[*callbacks, recorder],  # which sees what the others have logged
                ckpt_path=ckpt_path,
                module=module,
            )
        told = [str(one.message) for one in caught if RARE in str(one.message) or NOTHING in str(one.message)]
        cohorts = [[client.client_id for client in report.clients] for report in recorder.reports]
        metrics = [metrics.get(ABSENT) for metrics in recorder.callback_metrics]
        return trainer, cohorts, metrics, told

    return train


def rounds_absent(cohorts):
    """The metric by its definition."""
    expected = []
    for index, cohort in enumerate(cohorts):
        since = []
        for client in cohort:
            earlier = [i for i in range(index) if client in cohorts[i]]
            since += [index - earlier[-1]] if earlier else []
        expected.append(sum(since) / len(since) if since else math.nan)
    return expected


@pytest.mark.parametrize(
    ("uplink", "expected"),
    [
        ([], False),
        ([TopK(0.1), QSGD(4)], False),
        ([LayerRecycling(1)], False),
        ([Wrapped(TopK(0.1), QSGD(4))], False),
        ([Wrapped(TopK(0.1), ErrorFeedback(QSGD(4)))], True),
        ([LookBack(0.2)], True),
        ([ErrorFeedback(TopK(0.1))], True),
        ([DIANA(TopK(0.1))], True),
        ([Predict(2, TopK(0.1))], True),
        ([PowerSGD(1)], True),
        ([Cast(), Counting()], True),
    ],
    ids=repr,
)
def test_a_stage_keeps_a_memory_if_its_state_has_anything(uplink, expected):
    assert keeps_memory(as_chain(uplink)) is expected


def test_a_memory_of_clients_that_take_part_rarely_is_warned_of_and_measured(run):
    _, cohorts, metrics, told = run([TopK(0.5), ErrorFeedback(QSGD(4))], 12)
    assert metrics == pytest.approx(rounds_absent(cohorts), nan_ok=True)
    assert math.isnan(metrics[0])
    assert max(metrics[-5:]) > 1
    (message,) = told
    assert message.startswith("Cohorts of 2 of 10 clients: a client's turn comes every 5 rounds")
    assert "what ErrorFeedback(QSGD(levels=4)) keeps" in message
    assert "TopK" not in message  # which keeps nothing
    assert "Ternary()" in message


@pytest.mark.parametrize(
    ("uplink", "settings", "measured"),
    [
        ([QSGD(4)], {}, False),
        ([ErrorFeedback(TopK(0.5))], {"clients_per_round": 10}, False),
        ([ErrorFeedback(TopK(0.5))], {"clients_per_round": 3}, True),  # measured, and not so rare
        ([LookBack(0.0)], {"clients_per_round": 0.5}, True),
    ],
    ids=repr,
)
def test_no_advice_without_need(run, uplink, settings, measured):
    _, _, metrics, told = run(uplink, 3, **settings)
    assert told == []
    assert all((value is not None) is measured for value in metrics)


@pytest.mark.parametrize("figures", [True, False])
def test_a_resumed_run_knows_how_long_clients_were_away(run, tmp_path, figures):
    uplink = [ErrorFeedback(TopK(0.5))]
    _, cohorts, metrics, _ = run(uplink, 10, callbacks=[LBGMCallback(figures=figures)])
    first, *_ = run(uplink, 6, callbacks=[LBGMCallback(figures=figures)])
    first.save_checkpoint(tmp_path / "half.ckpt")
    path = tmp_path / "half.ckpt"
    _, rest, resumed, told = run(uplink, 10, path, callbacks=[LBGMCallback(figures=figures)])
    assert rest == cohorts[6:]
    assert resumed == pytest.approx(metrics[6:], nan_ok=True)
    assert len(told) == 1
    assert len(torch.load(path, weights_only=True)["callbacks"]["LBGMCallback"]["last_rounds"]) > 2
    # Saved without figures, resumed with them.
    run(uplink, 7, path, callbacks=[LBGMCallback()])


class Turning(TinyModule):
    """Its gradient is orthogonal to that of the round before."""

    def training_step(self, batch, batch_idx):
        return self.net.weight[self.trainer.global_step % 3, self.trainer.global_step % 6] + 0 * super().training_step(
            batch, batch_idx
        )


def test_twenty_rounds_without_a_recycled_update_are_warned_of_once(run):
    everyone = {"clients_per_round": None, "num_clients": 3}
    _, _, _, told = run([LookBack(0.25)], 20, module=Turning(), **everyone)
    assert told == []  # in the first round there was nothing to look back to
    _, _, _, told = run([LookBack(0.25)], 45, module=Turning(), **everyone)
    (message,) = told
    assert message.startswith("Round 20: `LookBack` has recycled nothing for 20 rounds.")
    assert "was 1 in the mean, the threshold is 0.25" in message


@pytest.mark.parametrize(
    "uplink",
    [[LookBack(0.0)], [LookBack(1.0)], [LookBack(TargetSavings(0.5))], [TopK(0.5)], [DIANA(TopK(0.5))]],
    ids=repr,
)
def test_no_word_of_look_back_if_it_recycles_or_must_not(run, uplink):
    assert run(uplink, 25, clients_per_round=None, num_clients=3)[3] == []


def test_a_resumed_fit_counts_anew(run, tmp_path):
    everyone = {"clients_per_round": None, "num_clients": 3}
    first, *_ = run([LookBack(0.25)], 15, module=Turning(), **everyone)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, _, _, told = run([LookBack(0.25)], 34, tmp_path / "half.ckpt", module=Turning(), **everyone)
    assert told == []  # 19 rounds since
    _, _, _, told = run([LookBack(0.25)], 37, tmp_path / "half.ckpt", module=Turning(), **everyone)
    assert len(told) == 1
