"""A round that breaks off, wherever, leaves module, clients, ledger and loop counters as they were before it."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_lbgm import DIANA, ErrorFeedback, LayerRecycling, LBGMFederated, LookBack, Predict, TargetSavings, TopK
from lightning_lbgm.simulation import undo as round_undo

BREAKING_ROUND = 2


class Module(TinyModule):
    """Has a running statistic, an accuracy and a schedule; breaks off where it is told to."""

    broken: str | None = None

    def __init__(self, gamma=1.0):
        torch.manual_seed(0)
        super().__init__(net=nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
        self.accuracy = MulticlassAccuracy(3)
        self.gamma, self.now = gamma, 0

    def raise_if(self, where):
        if self.broken == where and self.now >= BREAKING_ROUND:
            raise RuntimeError("boom")

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        if self.broken == "log" and self.now >= BREAKING_ROUND:
            self.log("x", loss.detach().expand(2))  # refused by Lightning once the clients are through
        return loss

    def optimizer_step(self, *args, **kwargs):
        self.raise_if("optimizer_step before")
        super().optimizer_step(*args, **kwargs)
        self.raise_if("optimizer_step after")

    def on_train_batch_start(self, batch, batch_idx):
        self.now = batch.index
        self.raise_if("on_train_batch_start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.raise_if("on_train_batch_end")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ServerAdam(torch.optim.Adam):
    """Breaks off after it has changed parameters and moments."""

    module: Module | None = None

    def step(self, closure=None):
        super().step(closure)
        self.module.raise_if("server")


def make_strategy(module, uplink, rounds_per_epoch=1):
    def server_optimizer(parameters):
        optimizer = ServerAdam(parameters, lr=0.05)
        optimizer.module = module
        return optimizer

    return LBGMFederated(
        num_clients=4,
        clients_per_round=3,
        uplink=uplink,
        server_optimizer=server_optimizer,
        rounds_per_epoch=rounds_per_epoch,
        seed=0,
    )


class Callbacks(pl.Callback):
    """Break off in a callback, before or after the strategy's own has reported."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.raise_if("callback")


def loader():
    return DataLoader(make_data(60), batch_size=8)


def everything(trainer, module):
    """What a round may change, as text: exact."""
    strategy, loops = trainer.strategy, trainer.fit_loop.epoch_loop
    federation = strategy._federation
    return {
        "parameters": flat_params(module).tolist(),
        "buffers": {name: buffer.tolist() for name, buffer in module.named_buffers()},
        "round": strategy.round_index,
        "ledger": strategy.ledger.state_dict(),
        "clients": {k: repr(state) for k, state in sorted(federation.clients.items())},
        "shared": repr(federation.shared),
        "server": repr(federation.server.optimizer.state_dict()["state"]),
        "global_step": trainer.global_step,
        "completed": loops.batch_progress.total.completed,
        "ready": loops.batch_progress.total.ready,
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "metric": (module.accuracy._update_count, module.accuracy.tp.tolist()),
    }


UPLINKS = {
    "FedAvg": list,
    "look-back": lambda: [ErrorFeedback(LookBack(0.7, rank=2))],
    "rows": lambda: [LookBack(TargetSavings(0.5), rowwise=True, rank=2)],
    "DIANA": lambda: [ErrorFeedback(DIANA([TopK(0.3)]))],
    "predict": lambda: [Predict(2, TopK(0.3))],
    "layers": lambda: [LayerRecycling(1)],
}
PLACES = [
    "log",
    "server",
    "optimizer_step before",
    "optimizer_step after",
    "on_train_batch_start",
    "on_train_batch_end",
    "callback",
]


def train(root, uplink, rounds_per_epoch=1, epochs=5, broken=None, callbacks=(), gamma=1.0):
    module = Module(gamma)
    module.broken = broken
    strategy = make_strategy(module, uplink, rounds_per_epoch)
    trainer = build_trainer(root, strategy, max_epochs=epochs, callbacks=[Callbacks(), *callbacks])
    return trainer, module


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("uplink", ["look-back", "layers"])
def test_a_broken_round_is_taken_back_and_made_again(tmp_path, uplink, place):
    assert_taken_back(tmp_path, UPLINKS[uplink], place, rounds_per_epoch=1)


@pytest.mark.parametrize("uplink", UPLINKS)
def test_with_every_kind_of_state(tmp_path, uplink):
    assert_taken_back(tmp_path, UPLINKS[uplink], "on_train_batch_end", rounds_per_epoch=1)


@pytest.mark.parametrize("place", ["log", "callback", "on_train_batch_start"])
def test_within_an_epoch_the_next_fit_goes_on_there(tmp_path, place):
    assert_taken_back(tmp_path, UPLINKS["look-back"], place, rounds_per_epoch=4)


def test_learning_rates_are_taken_back(tmp_path):
    break_off(tmp_path, UPLINKS["FedAvg"], "on_train_batch_end", 1, gamma=0.8)


def assert_taken_back(root, uplink, place, rounds_per_epoch):
    unbroken, reference = train(root, uplink(), rounds_per_epoch)
    unbroken.fit(reference, loader())
    trainer, module = break_off(root, uplink, place, rounds_per_epoch)
    module.broken = None
    trainer.fit(module, loader())
    assert trainer.strategy.round_index == unbroken.strategy.round_index == 5 * rounds_per_epoch
    assert trainer.global_step == unbroken.global_step
    assert torch.equal(flat_params(module), flat_params(reference))
    assert trainer.strategy.ledger == unbroken.strategy.ledger


def break_off(root, uplink, place, rounds_per_epoch, **settings):
    """Train until the round that breaks off; all must be as it was before it."""

    class Snapshot(pl.Callback):
        taken = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.index == BREAKING_ROUND and Snapshot.taken is None:
                Snapshot.taken = everything(trainer, pl_module)
                Snapshot.taken["ready"] -= 1  # Lightning has counted the round as begun

    trainer, module = train(root, uplink(), rounds_per_epoch, broken=place, callbacks=[Snapshot()], **settings)
    with pytest.raises((RuntimeError, ValueError)):
        trainer.fit(module, loader())
    assert everything(trainer, module) == Snapshot.taken
    return trainer, module


def test_clients_whose_state_is_too_large_to_be_kept_twice_send_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr(round_undo, "_MAX_KEPT_BYTES", 0)
    trainer, module = train(tmp_path, [LookBack(0.0)], broken="callback")
    with pytest.warns(UserWarning, match="What 3 of its clients had kept"), pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, loader())
    assert trainer.strategy.round_index == BREAKING_ROUND
    # Three of four clients had their turn in the round that broke off.
    assert len(trainer.strategy._federation.clients) == 1


def test_a_stage_that_writes_to_its_state_makes_the_client_send_in_full(tmp_path):
    class InPlace(LookBack):
        def encode(self, update, state, context):
            encoded = super().encode(update, state, context)
            for basis in state["lbgs"].values():
                basis["payloads"][0]["values"].add_(0)
            return encoded

    trainer, module = train(tmp_path, [InPlace(1.0)], broken="callback")
    with pytest.warns(UserWarning, match="could not|too large"), pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, loader())
    assert len(trainer.strategy._federation.clients) == 1


def test_what_is_kept_of_a_round_is_let_go_before_validation(tmp_path):
    kept = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            kept.append(trainer.strategy._federation.undo is not None)

        def on_validation_end(self, trainer, *args):
            kept.append(trainer.strategy._federation.undo is not None)

    trainer, module = train(tmp_path, [LookBack(0.2)], epochs=1, callbacks=[Look()])
    trainer.fit(module, loader(), DataLoader(make_data(20), batch_size=20))
    assert kept == [True, False]


def test_an_interrupt_from_the_keyboard_is_taken_back_too(tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.strategy.last_report.round_index == 1:
                raise KeyboardInterrupt

    trainer, module = train(tmp_path, [LookBack(0.2)], callbacks=[Interrupt()])
    with pytest.raises(SystemExit):
        trainer.fit(module, loader())
    assert trainer.strategy.round_index == trainer.global_step == 1
