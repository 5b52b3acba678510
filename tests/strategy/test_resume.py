"""Resuming again and again, from any checkpoint, makes the rounds of the unbroken run."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyModule, flat_params
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated, LookBack
from lightning_lbgm._compat.loop_progress import between_rounds

ROUNDS = 6


class Scheduled(TinyModule):
    interval = "step"

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return [optimizer], [{"scheduler": schedule, "interval": self.interval}]


class ByEpoch(Scheduled):
    interval = "epoch"


class Events(Callback):
    """Each round, epoch start and validation, with all that Lightning counts."""

    def __init__(self) -> None:
        self.rounds, self.epochs, self.validations = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        counters = trainer.global_step, trainer.current_epoch, batch_idx, trainer.fit_loop.epoch_loop.total_batch_idx
        self.rounds.append((batch.index, *counters, rate))

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append((trainer.global_step, trainer.current_epoch))

    def on_validation_end(self, trainer, pl_module):
        self.validations.append((trainer.global_step, trainer.current_epoch))


SETTINGS = {
    "one round an epoch": (1, "every round", {"max_epochs": 6}, TinyModule),
    "a schedule over epochs": (1, "every round", {"max_epochs": 6}, ByEpoch),
    "three rounds an epoch": (3, "every round", {"max_epochs": 2}, Scheduled),
    "max_steps": (1, "every round", {"max_epochs": -1, "max_steps": 6}, TinyModule),
    "max_steps, three rounds an epoch": (3, "every round", {"max_epochs": -1, "max_steps": 6}, ByEpoch),
    "epoch's end": (1, "epoch", {"max_epochs": 6}, TinyModule),
    "epoch's end, max_steps": (2, "epoch", {"max_epochs": -1, "max_steps": 6}, Scheduled),
    "after validation, max_steps": (1, "validation", {"max_epochs": -1, "max_steps": 6}, TinyModule),
    "validation within an epoch": (6, "every round", {"max_epochs": 1, "val_check_interval": 2}, TinyModule),
    "validation by rounds": (
        1,
        "validation",
        {"max_epochs": 6, "val_check_interval": 2, "check_val_every_n_epoch": None},
        TinyModule,
    ),
}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize(("rounds_per_epoch", "kind", "limits", "module"), SETTINGS.values(), ids=SETTINGS)
def test_resuming_three_times_makes_the_rounds_of_the_unbroken_run(
    fit, tmp_path, rounds_per_epoch, kind, limits, module
):
    def run(name, ckpt_path=None):
        when = {
            "every round": {"every_n_train_steps": 1},
            "epoch": {"save_on_train_epoch_end": True},
            "validation": {},
        }[kind]
        events = Events()
        checkpoint = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, **when)
        torch.manual_seed(0)
        trainer, trained = fit(
            LBGMFederated(num_clients=2, uplink=[LookBack(0.3)], seed=0, rounds_per_epoch=rounds_per_epoch),
            module=module(),
            batch_size=10,
            val=True,
            callbacks=[events, checkpoint],
            enable_checkpointing=True,
            ckpt_path=ckpt_path,
            **limits,
        )
        return trainer, flat_params(trained), events

    unbroken, params, events = run("unbroken")
    assert unbroken.global_step == ROUNDS
    before = "unbroken"
    for step in (1, 2, 3, 4, 6):
        path = tmp_path / before / f"step={step}.ckpt"
        if not path.exists():  # made every second or third round
            continue
        before = f"{before}-{step}"
        trainer, resumed_params, resumed = run(before, path)
        assert trainer.strategy.round_index == ROUNDS
        assert trainer.strategy.ledger == unbroken.strategy.ledger
        assert (trainer.global_step, trainer.current_epoch) == (ROUNDS, unbroken.current_epoch)
        logged_steps = [run.fit_loop.epoch_loop._batches_that_stepped for run in (trainer, unbroken)]
        assert logged_steps == [ROUNDS, ROUNDS]
        assert resumed.rounds == events.rounds[step:]
        assert resumed.epochs == [entry for entry in events.epochs if entry[0] >= step]
        assert resumed.validations == [entry for entry in events.validations if entry[0] > step]
        assert torch.equal(resumed_params, params)


def test_a_round_that_broke_off_is_made_again(fit, tmp_path):
    class Failing(TinyModule):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and self.trainer.global_step == 3:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    def run(module, ckpt_path=None, **kwargs):
        torch.manual_seed(0)
        events = Events()
        strategy = LBGMFederated(num_clients=2, uplink=[], seed=0, rounds_per_epoch=2)
        callbacks = [events, *kwargs.pop("callbacks", [])]
        fit(strategy, module=module(), callbacks=callbacks, max_epochs=3, ckpt_path=ckpt_path, **kwargs)
        return events

    with pytest.raises(RuntimeError, match="boom"):
        run(Failing, callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    Failing.fails = False
    unbroken = run(Failing)
    assert run(Failing, tmp_path / "on_exception.ckpt").rounds == unbroken.rounds[3:]


def test_a_finished_run_that_is_resumed_keeps_its_federation(fit, data, tmp_path):
    def strategy():
        return LBGMFederated(num_clients=2, uplink=[LookBack(0.3)], seed=0)

    trainer, _ = fit(strategy(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, module = fit(strategy(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    resumed.save_checkpoint(tmp_path / "b.ckpt")
    state = torch.load(tmp_path / "b.ckpt", weights_only=True)["lightning_lbgm"]
    assert (state["round_index"], sorted(state["clients"])) == (2, [0, 1])
    resumed.fit_loop.max_epochs = 4
    resumed.fit(module, DataLoader(data, batch_size=1000))
    unbroken, expected = fit(strategy(), max_epochs=4)
    assert torch.equal(flat_params(module), flat_params(expected))
    assert resumed.strategy.ledger == unbroken.strategy.ledger


def test_counters_that_lag_are_mended():
    # As Lightning leaves them when it resumes from the end of an epoch: in the first hook after the fourth batch of
    # epochs of one batch, `ready` and `started` are one short.
    def counters(ready, processed, completed):
        return {"ready": ready, "started": ready, "processed": processed, "completed": completed}

    loops = {
        "epoch_progress": {"total": counters(3, 3, 3), "current": counters(3, 3, 3)},
        "epoch_loop.batch_progress": {
            "total": counters(4, 4, 3),
            "current": counters(1, 1, 0),
            "is_last_batch": True,
        },
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": {"total": {"ready": 4, "completed": 4}}}
        },
    }
    mended = between_rounds({"loops": {"fit_loop": loops}})["loops"]["fit_loop"]
    assert mended["epoch_progress"] == {"total": counters(4, 4, 4), "current": counters(4, 4, 4)}
    assert mended["epoch_loop.batch_progress"]["current"] == counters(0, 0, 0)
    assert mended["epoch_loop.state_dict"] == {"_batches_that_stepped": 4}


def test_an_epoch_that_a_hook_cut_short_is_not_counted_twice(fit, tmp_path):
    class Skipping(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch.index == 2 and batch_idx == 2 else None  # the third round of the first epoch only

    def run(ckpt_path=None, callbacks=()):
        torch.manual_seed(0)
        events = Events()
        strategy = LBGMFederated(num_clients=2, uplink=[], seed=0, rounds_per_epoch=3)
        fit(strategy, module=Skipping(), callbacks=[events, *callbacks], max_epochs=3, ckpt_path=ckpt_path)
        return events

    class Save(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    unbroken = run(callbacks=[Save()])
    assert len(unbroken.rounds) == 9  # one of them skipped
    assert run(tmp_path / "1.ckpt").rounds == unbroken.rounds[3:]


def test_a_plain_checkpoint_keeps_its_counters():
    assert between_rounds({"state_dict": {}}) == {"state_dict": {}}


def test_resuming_with_batch_norm_and_more_rounds_an_epoch(fit, tmp_path):
    def module():
        torch.manual_seed(0)
        return TinyModule(net=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))

    trainer, _ = fit(LBGMFederated(num_clients=2, seed=0), module=module(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    events = Events()
    strategy = LBGMFederated(num_clients=2, seed=0, rounds_per_epoch=3)
    fit(strategy, module=module(), callbacks=[events], max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert [entry[0] for entry in events.rounds] == [2, 3, 4, 5, 6, 7]
