"""Updates that are not finite, exceptions in a round, and what is left behind."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from torch.utils.data import TensorDataset

from lightning_lbgm import LBGMFederated, NaturalPartitioner


class Exploding(TinyModule):
    """The loss of a client whose first feature is 100 is not finite."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        loss = loss / 0 if float(batch[0][0, 0]) == 100 else loss
        self.log("train/loss", loss)
        return loss


def test_a_client_whose_update_is_not_finite_is_left_out(fit):
    dataset = make_data(12)
    dataset.tensors[0][8:, 0] = 100
    partitioner = NaturalPartitioner([0] * 4 + [1] * 4 + [2] * 4)
    recorder = Recorder()
    torch.manual_seed(0)
    module = Exploding()
    with pytest.warns(UserWarning, match="Round 0: the update of client 2 is not finite"):
        trainer, _ = fit(
            LBGMFederated(num_clients=3, partitioner=partitioner),
            module=module,
            dataset=dataset,
            callbacks=[recorder],
            max_epochs=2,
        )
    # The two others, in a federation of their own with the weights 1/2 each.
    torch.manual_seed(0)
    reference = TinyModule()
    rest = TensorDataset(*(t[:8] for t in dataset.tensors))
    fit(
        LBGMFederated(num_clients=2, partitioner=NaturalPartitioner([0] * 4 + [1] * 4)),
        module=reference,
        dataset=rest,
        max_epochs=2,
    )
    torch.testing.assert_close(flat_params(module), flat_params(reference))
    assert recorder.callback_metrics[1]["fl/rejected_clients"] == 1
    assert recorder.callback_metrics[0]["comm/uplink_bytes"] == 2 * 84
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.filterwarnings("ignore:Round 0")
def test_a_round_without_any_finite_update_leaves_the_model(fit):
    dataset = make_data(8)
    dataset.tensors[0][:, 0] = 100
    torch.manual_seed(0)
    module = Exploding()
    begin = flat_params(module)
    trainer, _ = fit(LBGMFederated(num_clients=2), module=module, dataset=dataset, max_epochs=2)
    assert torch.equal(flat_params(module), begin)
    assert trainer.callback_metrics["fl/rejected_clients"] == 2


def test_an_exception_in_a_round_leaves_the_global_model(fit):
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1 and self.count == 2:
                raise RuntimeError("boom")
            self.count += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            self.count = 0

    torch.manual_seed(0)
    recorder, module = Recorder(), Failing()
    with pytest.raises(RuntimeError, match="boom"):
        fit(LBGMFederated(num_clients=4), module=module, callbacks=[recorder])
    assert torch.equal(flat_params(module), recorder.params[0])
    assert "log" not in vars(module)


def test_the_module_is_left_as_it_was_found(fit):
    torch.manual_seed(0)
    module = TinyModule()
    before = set(vars(module))
    _, module = fit(module=module)
    assert not {"log", "_on_before_batch_transfer"} & (set(vars(module)) - before)
    module.log  # noqa: B018 (is the class's own again)
    assert module.log.__func__ is pl.LightningModule.log


def test_client_randomness_does_not_touch_the_global_generators(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            torch.rand(3)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    module, state = Module(), torch.get_rng_state()
    torch.manual_seed(5)
    fit(LBGMFederated(num_clients=3, seed=1), module=module, shuffle=True, batch_size=4)
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(state, torch.get_rng_state())
