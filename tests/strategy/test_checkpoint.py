"""Checkpoints: the global model for everyone, the federation beside it, and resuming bit for bit."""

from __future__ import annotations

import pytest
import torch
from conftest import Recorder, TinyModule, flat_params
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from states import assert_same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lbgm import ErrorFeedback, LBGMCallback, LBGMFederated, LookBack, PathologicalPartitioner, SignSGD, TopK


class NoisyModule(TinyModule):
    """Dropout, BatchNorm and a random augmentation: what must be resumed besides the parameters."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        super().__init__(lr=0.1, net=net, momentum=0.9)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)]


UPLINKS = {
    "look-back": [LookBack(0.4)],
    "layer": [LookBack(0.4, "layer")],
    "top-k, error feedback, look-back": [ErrorFeedback(TopK(0.3)), LookBack(0.4)],
    "error feedback around sign and look-back": [ErrorFeedback([SignSGD(), LookBack(0.6)])],
}


@pytest.mark.filterwarnings("ignore:.*buffers='client'")
@pytest.mark.parametrize("uplink", UPLINKS.values(), ids=UPLINKS)
@pytest.mark.parametrize(("buffers", "rounds_per_epoch", "stop_at"), [("average", 1, 4), ("client", 3, 5)])
def test_resuming_equals_the_unbroken_run_bitwise(fit, tmp_path, uplink, buffers, rounds_per_epoch, stop_at):
    def run(**kwargs):
        torch.manual_seed(7)
        recorder = Recorder()
        strategy = LBGMFederated(
            num_clients=5,
            clients_per_round=3,
            uplink=uplink,
            local_steps=2,
            server_optimizer=lambda params: torch.optim.SGD(params, lr=0.9, momentum=0.5),
            buffers=buffers,
            rounds_per_epoch=rounds_per_epoch,
            seed=11,
        )
        trainer, module = fit(
            strategy,
            module=NoisyModule(),
            batch_size=4,
            shuffle=True,
            max_epochs=9 // rounds_per_epoch,
            callbacks=[recorder, *kwargs.pop("callbacks", [])],
            **kwargs,
        )
        return trainer, module, recorder

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=stop_at, save_top_k=-1, filename="{step}")
    unbroken, module, recorder = run(callbacks=[checkpoint], enable_checkpointing=True)
    resumed, resumed_module, resumed_recorder = run(ckpt_path=tmp_path / f"step={stop_at}.ckpt")
    assert resumed.global_step == unbroken.global_step == 9
    assert len(resumed_recorder.reports) == 9 - stop_at
    for a, b in zip(recorder.reports[stop_at:], resumed_recorder.reports):
        assert a.round_index == b.round_index
        assert [(c.client_id, c.outcome, c.uplink_bits) for c in a.clients] == [
            (c.client_id, c.outcome, c.uplink_bits) for c in b.clients
        ]
    assert all(torch.equal(a, b) for a, b in zip(recorder.params[stop_at:], resumed_recorder.params))
    states = zip(module.state_dict().items(), resumed_module.state_dict().items())
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)
    assert unbroken.strategy.ledger == resumed.strategy.ledger
    assert unbroken.callback_metrics["comm/savings"] == resumed.callback_metrics["comm/savings"]


class NoisyDataset(Dataset):
    """Not tensors, with a random transform."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.full((6,), float(index)) + torch.randn(6), index % 3


def test_resuming_replays_random_transforms(fit, tmp_path):
    def run(**kwargs):
        torch.manual_seed(0)
        recorder = Recorder()
        strategy = LBGMFederated(num_clients=4, seed=0)
        callbacks = [recorder, *kwargs.pop("callbacks", [])]
        fit(strategy, dataset=NoisyDataset(), batch_size=4, shuffle=True, max_epochs=4, callbacks=callbacks, **kwargs)
        return recorder.params

    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    unbroken = run(callbacks=[checkpoint], enable_checkpointing=True)
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(unbroken[-1], resumed[-1])


def test_a_checkpoint_holds_the_global_model(fit, tmp_path):
    trainer, module = fit(LBGMFederated(num_clients=4), max_epochs=2)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    plain = TinyModule.load_from_checkpoint(path)
    assert torch.equal(flat_params(plain), flat_params(module))
    assert list(torch.load(path, weights_only=True)["state_dict"]) == ["net.weight", "net.bias"]


def test_a_checkpoint_from_within_a_round_holds_the_global_model(fit, tmp_path):
    class Saving(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    recorder = Recorder()
    fit(LBGMFederated(num_clients=3, local_steps=2), module=Saving(), callbacks=[recorder], max_epochs=2)
    state = torch.load(tmp_path / "within.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([state["net.weight"].reshape(-1), state["net.bias"]]), recorder.params[0])


def test_a_weights_only_checkpoint_holds_no_federation(fit, tmp_path):
    trainer, _ = fit()
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    assert "lightning_lbgm" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["lightning_lbgm"]
    assert (state["round_index"], sorted(state["clients"])) == (3, [0, 1, 2, 3])


def test_a_checkpoint_of_an_interrupted_round_resumes(fit, tmp_path):
    class Failing(TinyModule):
        armed, calls = True, 0

        def training_step(self, batch, batch_idx):
            self.calls += self.trainer.global_step == 2
            if self.armed and self.calls == 4:  # the second client's second step
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    def save(trainer, pl_module, error):
        trainer.save_checkpoint(tmp_path / "crash.ckpt")

    torch.manual_seed(0)
    strategy = LBGMFederated(num_clients=3, uplink=[LookBack(1.0)], local_steps=2, seed=0)
    with pytest.raises(RuntimeError, match="boom"):
        fit(strategy, module=Failing(), callbacks=[LambdaCallback(on_exception=save)], max_epochs=4)
    Failing.armed = False
    recorder = Recorder()
    strategy = LBGMFederated(num_clients=3, uplink=[LookBack(1.0)], local_steps=2, seed=0)
    fit(strategy, module=Failing(), callbacks=[recorder], ckpt_path=tmp_path / "crash.ckpt", max_epochs=4)
    # The first client had sent when the round broke: it was taken back.
    assert [c.outcome for c in recorder.reports[0].clients] == ["recycled", "recycled", "recycled"]
    assert [r.round_index for r in recorder.reports] == [2, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_clients": 6}, "num_clients=5"),
        ({"uplink": [LookBack(0.3)]}, "uplink="),
        ({"seed": 2}, "seed=1"),
        ({"partitioner": PathologicalPartitioner(2)}, "partitioner=IIDPartitioner"),
        ({"server_optimizer": torch.optim.Adam}, "server_optimizer=SGD.*server_optimizer=Adam"),
    ],
)
def test_resuming_with_other_settings_is_an_error(fit, tmp_path, change, named):
    settings = {"num_clients": 5, "uplink": [LookBack(0.2)], "seed": 1}
    trainer, _ = fit(LBGMFederated(**settings))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=named):
        fit(LBGMFederated(**{**settings, **change}), ckpt_path=tmp_path / "a.ckpt", max_epochs=5)


def test_resuming_without_a_seed_takes_the_checkpoints(fit, tmp_path):
    trainer, _ = fit(LBGMFederated(num_clients=5, seed=1), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    strategy = LBGMFederated(num_clients=5)
    fit(strategy, ckpt_path=tmp_path / "a.ckpt", max_epochs=4)
    assert strategy.settings()["seed"] == 1


def test_resuming_from_a_plain_checkpoint_warns(fit, make_trainer, data, tmp_path):
    plain = make_trainer("auto", max_epochs=2)
    plain.fit(TinyModule(), DataLoader(data, batch_size=1000))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    strategy = LBGMFederated(num_clients=4)
    with pytest.warns(UserWarning, match="no federation's state"):
        fit(strategy, ckpt_path=tmp_path / "plain.ckpt", max_epochs=4)
    assert strategy.round_index == 4


def test_validating_a_checkpoint_needs_no_federation(fit, make_trainer, data, tmp_path):
    trainer, module = fit(val=True)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = make_trainer(LBGMFederated(num_clients=9))
    result = fresh.validate(TinyModule(), DataLoader(data, batch_size=60), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    x, y = data.tensors
    assert result[0]["val/acc"] == pytest.approx(float((module(x).argmax(1) == y).float().mean()))


def test_the_callback_keeps_its_curves(fit, tmp_path):
    def callback(trainer) -> Callback:
        return next(c for c in trainer.callbacks if isinstance(c, LBGMCallback))

    trainer, _ = fit(LBGMFederated(num_clients=4, seed=0), val=True, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = fit(LBGMFederated(num_clients=4, seed=0), val=True, max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    unbroken, _ = fit(LBGMFederated(num_clients=4, seed=0), val=True, max_epochs=5)
    a, b = callback(resumed).state_dict(), callback(unbroken).state_dict()
    assert a.pop("metric") == b.pop("metric") == "val/acc"
    assert len(b["curve"]["points"]) == 5
    assert_same(a, b)
