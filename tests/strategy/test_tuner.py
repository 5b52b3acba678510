"""Lightning's tuner tries rounds, and leaves no trace of them."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_lbgm import ErrorFeedback, LBGMFederated, LookBack, TopK
from lightning_lbgm.reports.ledger import Ledger


class WithLoaders(TinyModule):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(lr=0.1)
        self.batch_size = 4

    def train_dataloader(self):
        return DataLoader(make_data(60), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(make_data(30, seed=1), batch_size=self.batch_size)


def trainer_for(root, store="memory", **settings):
    uplink = [ErrorFeedback(TopK(0.5)), LookBack(0.5)]
    strategy = LBGMFederated(num_clients=4, uplink=uplink, seed=0, client_store=store)
    return build_trainer(root, strategy, limit_val_batches=2, **settings)


def expected(root, epochs=3, lr=None):
    """Return the parameters and the account of a run without a tuner."""
    module = WithLoaders()
    module.lr = module.lr if lr is None else lr
    trainer = trainer_for(root, max_epochs=epochs)
    trainer.fit(module)
    return flat_params(module), trainer.strategy.ledger


def test_the_learning_rate_finder_tries_one_learning_rate_a_round(tmp_path):
    settings = {"min_lr": 1e-3, "max_lr": 10.0, "num_training": 20, "update_attr": False}
    plain = Tuner(build_plain(tmp_path)).lr_find(WithLoaders(), **settings)
    module, trainer = WithLoaders(), trainer_for(tmp_path)
    finder = Tuner(trainer).lr_find(module, **settings)
    assert finder.results["lr"] == plain.results["lr"]  # 20, although three epochs are three rounds
    assert len(finder.results["loss"]) == 20
    assert finder.suggestion() is not None
    assert trainer.max_epochs == 3
    # As if nothing had happened.
    assert trainer.strategy.round_index == trainer.global_step == 0
    assert trainer.strategy.ledger == Ledger()
    trainer.fit(module)
    params, ledger = expected(tmp_path)
    assert torch.equal(flat_params(module), params)
    assert trainer.strategy.ledger == ledger


def test_the_losses_of_the_trial_are_those_of_rounds_with_these_learning_rates(tmp_path):
    class Scheduled(WithLoaders):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lrs[min(t, len(lrs) - 1)])
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    trainer = trainer_for(tmp_path)
    finder = Tuner(trainer).lr_find(WithLoaders(), min_lr=0.01, max_lr=1.0, num_training=5, update_attr=False)
    lrs, losses = finder.results["lr"], []
    trainer_for(tmp_path, max_epochs=5).fit(Scheduled())
    # The finder smooths with 0.98 and corrects the bias.
    smoothed, average = [], 0.0
    for number, loss in enumerate(losses, 1):
        average = 0.98 * average + 0.02 * loss
        smoothed.append(average / (1 - 0.98 ** (number + 1)))
    assert finder.results["loss"] == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.parametrize("kind", ["callback", "tuner"])
def test_batch_sizes_are_tried_as_in_lightning(tmp_path, kind):
    sizes = []
    for federated in (False, True):
        finder = BatchSizeFinder(init_val=16, steps_per_trial=2)
        settings = {"callbacks": [finder]} if kind == "callback" else {}
        module = WithLoaders()
        make = trainer_for if federated else build_plain
        trainer = make(tmp_path, **settings)
        if kind == "callback":
            trainer.fit(module)
        else:
            Tuner(trainer).scale_batch_size(module, init_val=16, steps_per_trial=2)
        sizes.append(module.batch_size)
    assert sizes[0] == sizes[1] > 60  # until the data is one batch
    if kind == "tuner":
        assert trainer.strategy.round_index == 0
        module.batch_size = 4
        trainer.fit(module)
        assert torch.equal(flat_params(module), expected(tmp_path)[0])
    assert trainer.global_step == trainer.strategy.round_index == 3


def build_plain(root, **settings):
    return build_trainer(root, "auto", limit_val_batches=2, **settings)


def test_the_callback_sets_the_learning_rate_of_the_run(tmp_path):
    module = WithLoaders()
    finder = LearningRateFinder(num_training_steps=20)
    trainer = trainer_for(tmp_path, callbacks=[finder])
    trainer.fit(module)
    assert module.lr != 0.1
    params, ledger = expected(tmp_path, lr=module.lr)
    assert torch.equal(flat_params(module), params)
    assert trainer.strategy.ledger == ledger


class AtEpochs(LearningRateFinder):
    """As in Lightning's documentation, for fine-tuning."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in (0, 2):
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_trial_in_the_middle_of_a_run_changes_nothing(tmp_path, store):
    store = store if store == "memory" else str(tmp_path / "store")
    module = WithLoaders()
    trainer = trainer_for(tmp_path, store, max_epochs=4, callbacks=[AtEpochs(num_training_steps=5, update_attr=False)])
    trainer.fit(module)
    params, ledger = expected(tmp_path, epochs=4)
    assert torch.equal(flat_params(module), params)
    assert trainer.strategy.ledger == ledger
    assert trainer.global_step == trainer.strategy.round_index == 4


def test_a_trial_between_two_fits_changes_nothing(tmp_path):
    module, trainer = WithLoaders(), trainer_for(tmp_path)
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 5
    Tuner(trainer).lr_find(module, num_training=4, update_attr=False)
    assert trainer.global_step == trainer.strategy.round_index == 3
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module)
    params, ledger = expected(tmp_path, epochs=5)
    assert torch.equal(flat_params(module), params)
    assert trainer.strategy.ledger == ledger


@pytest.mark.parametrize("finder", [BatchSizeFinder(), LearningRateFinder()])
def test_a_finder_at_the_start_of_a_resumed_run_is_refused(tmp_path, finder):
    trainer = trainer_for(tmp_path)
    trainer.fit(WithLoaders())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=r"Finder` in a run that is resumed.*Run it without"):
        trainer_for(tmp_path, callbacks=[finder]).fit(WithLoaders(), ckpt_path=tmp_path / "a.ckpt")
