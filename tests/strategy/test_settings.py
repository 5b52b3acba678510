"""Settings as they are shown, and hints for arguments that belong elsewhere."""

from __future__ import annotations

import functools
import inspect
import logging

import lightning.pytorch as pl
import pytest
import torch

from lightning_lbgm import LBGMFederated, LookBack, TopK
from lightning_lbgm.core.describe import describe_optimizer


def shown(fit, caplog, **settings) -> str:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(LBGMFederated(seed=3, **settings), max_epochs=1)
    return next(r.getMessage() for r in caplog.records if r.getMessage().startswith("Federated training"))


def test_the_settings_line_shows_what_is_not_the_default(fit, caplog):
    assert shown(fit, caplog, num_clients=4) == "Federated training: 21 parameters, num_clients=4, seed=3."
    caplog.clear()
    line = shown(
        fit,
        caplog,
        num_clients=8,
        clients_per_round=0.5,
        local_steps=2,
        uplink=[TopK(0.5)],
        server_optimizer=torch.optim.Adam,
        execution="sequential",
    )
    assert line == (
        "Federated training: 21 parameters, num_clients=8, uplink=[TopK(fraction=0.5)], clients_per_round=4,"
        " local_steps=2, server_optimizer=Adam(lr=0.001), seed=3, execution=sequential."
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (None, "SGD(lr=1.0)"),
        (torch.optim.Adam, "Adam(lr=0.001)"),
        (functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9), "SGD(lr=1.0, momentum=0.9)"),
        (lambda params: torch.optim.Adagrad(params, initial_accumulator_value=4.0), None),
    ],
)
def test_the_server_optimizer_is_described_as_it_was_made(fit, make, expected):
    strategy = LBGMFederated(num_clients=4, server_optimizer=make)
    fit(strategy, max_epochs=1)
    assert strategy.settings()["server_optimizer"] == (expected or "Adagrad(lr=0.01, initial_accumulator_value=4.0)")


def test_an_optimizer_of_ones_own_is_described():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, rate=2.0):
            super().__init__(params, {"rate": rate, "weights": torch.ones(3)})

    assert describe_optimizer(Own([torch.zeros(1)], rate=3.0)) == "Own(rate=3.0)"
    assert describe_optimizer(Own([torch.zeros(1)])) == "Own()"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"threshold": 0.2}, r"`LBGMFederated\(threshold=...\)`.*`uplink=\[LookBack\(threshold=...\)\]`"),
        ({"rank": 2}, r"LookBack\(rank=...\)"),
        ({"num_client": 2}, "Use `num_clients=...`"),
        ({"cohort_size": 2}, "clients_per_round"),
        ({"num_rounds": 2}, r"Trainer\(max_epochs=...\)"),
        ({"lr": 2}, "server_optimizer.*configure_optimizers"),
        ({"zzz": 2}, "It takes `num_clients`, `partitioner`, `uplink`"),
    ],
)
def test_an_unknown_argument_gets_a_hint(arguments, hint):
    with pytest.raises(TypeError, match=hint):
        LBGMFederated(num_clients=4, **arguments)


def test_a_subclass_keeps_the_signature():
    class Mine(LBGMFederated):
        def __init__(self, threshold: float = 0.2, **settings) -> None:
            super().__init__(uplink=[LookBack(threshold)], **settings)

    assert Mine(0.3, num_clients=3).num_clients == 3
    with pytest.raises(TypeError, match=r"`Mine\(client=...\)`"):
        Mine(client=3)
    parameters = inspect.signature(LBGMFederated).parameters
    assert list(parameters)[:3] == ["num_clients", "partitioner", "uplink"]
    assert parameters["num_clients"].default == 10


def test_a_validation_interval_longer_than_an_epoch_speaks_of_rounds(fit):
    def run(rounds_per_epoch=1, **settings):
        strategy = LBGMFederated(num_clients=4, rounds_per_epoch=rounds_per_epoch)
        trainer, _ = fit(strategy, val=True, **settings)
        return trainer.global_step

    message = r"val_check_interval=5.*an epoch has {0} .*rounds_per_epoch={1}.*check_val_every_n_epoch=None"
    with pytest.raises(Exception, match=message.format(1, 1)):
        run(val_check_interval=5)
    with pytest.raises(Exception, match=message.format(3, 6)):
        run(6, val_check_interval=5, limit_train_batches=0.5)
    assert run(val_check_interval=5, check_val_every_n_epoch=None) == 3
    if not pl.__version__.startswith("2.6.0"):  # which refuses it itself
        assert run(val_check_interval=5, limit_val_batches=0) == 3
    assert run(5, val_check_interval=5) == 15
    assert run(val_check_interval=0.25) == 3
