"""The downlink in whole fits: what clients train from, what is counted, and how a run goes on."""

from __future__ import annotations

import pytest
import torch
from conftest import Recorder, TinyModule, flat_params
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from states import assert_same
from torch import nn

from lightning_lbgm import DIANA, QSGD, Cast, ErrorFeedback, LBGMFederated, LookBack, Predict, RandK, SignSGD, TopK
from lightning_lbgm.protocol import HEADER_BYTES, DownlinkClient, DownlinkServer
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy import session

CHAINS = {
    "topk, sign": [TopK(0.3), SignSGD()],
    "qsgd": [QSGD(2, bucket_size=16)],
    "randk": [RandK(0.3)],
    "cast, lookback": [Cast(), LookBack(0.5)],
    "diana": [DIANA(TopK(0.3))],
    "predict": [Predict(2, TopK(0.3))],
}


def batch_norm_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return TinyModule(net=net)


def run(fit, downlink, rounds=9, callbacks=(), module=None, **settings):
    trainer_settings = {k: settings.pop(k) for k in ("ckpt_path", "enable_checkpointing", "val") if k in settings}
    recorder = Recorder()
    given = {"num_clients": 4, "clients_per_round": 2, "local_steps": 2, "uplink": [TopK(0.5)], **settings}
    strategy = LBGMFederated(**given, downlink=downlink, seed=0)
    trainer, module = fit(
        strategy,
        module=module or batch_norm_module(),
        batch_size=8,
        shuffle=True,
        max_epochs=rounds,
        callbacks=[recorder, *callbacks],
        **trainer_settings,
    )
    return trainer, module, recorder


class OverTheWire(DownlinkServer):
    """A downlink that sends its messages to a ``DownlinkClient`` for each client, and compares."""

    def __init__(self, downlink, layout) -> None:
        super().__init__(downlink, layout, keep_messages=True)
        self.clients, self.brought = {}, 0

    def deliver(self, client_id):
        client = self.clients.setdefault(
            client_id,
            DownlinkClient(self.downlink, self.layout, {n: torch.zeros_like(b) for n, b in self._buffers.items()}),
        )
        messages = self.messages(client.version)
        for message in messages:
            client.receive(message, self.context)
        delivery = super().deliver(client_id)
        assert torch.equal(client.held, self.held)
        for name, buffer in self._buffers.items():
            assert torch.equal(client.buffers[name], buffer)
        assert delivery.bits == sum(8 * (len(message) - HEADER_BYTES) for message in messages)
        self.brought += 1
        return delivery

    def begin_round(self, params, context, buffers=None):
        self.context = context
        return super().begin_round(params, context, buffers)


@pytest.mark.parametrize("name", CHAINS)
def test_a_fit_over_messages_is_the_simulation_to_the_bit(fit, monkeypatch, name):
    _, simulated, one = run(fit, CHAINS[name])
    wires = []

    def make(*args, downlink, **settings):
        wires.append(OverTheWire(downlink.downlink, downlink.layout))
        return Federation(*args, downlink=wires[-1], **settings)

    monkeypatch.setattr(session, "Federation", make)
    _, sent, other = run(fit, CHAINS[name])
    assert wires[0].brought == 18
    assert torch.equal(flat_params(sent), flat_params(simulated))
    assert repr(other.reports) == repr(one.reports)


class Starts(Callback):
    """The parameters and statistics with which clients begin, and those that validation has."""

    def __init__(self) -> None:
        self.clients, self.validated = [], []

    def on_validation_start(self, trainer, pl_module):
        self.validated.append(flat_params(pl_module))


class Watched(TinyModule):
    def __init__(self, starts) -> None:
        super().__init__()
        self.starts = starts

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.starts.clients.append(flat_params(self))
        return super().training_step(batch, batch_idx)


def test_clients_train_from_what_they_hold_and_validation_has_the_servers(fit):
    starts = Starts()
    torch.manual_seed(0)
    module = Watched(starts)
    first = flat_params(module)
    _, _, recorder = run(
        fit, [TopK(0.2)], rounds=4, callbacks=[starts], module=module, val=True, execution="sequential", uplink=[]
    )
    held = first
    for index in range(4):
        assert torch.equal(starts.clients[2 * index], starts.clients[2 * index + 1])
        assert torch.equal(starts.validated[index], recorder.params[index])
        if index:  # a fifth of 21 entries goes: the 4 largest of the difference
            difference = recorder.params[index - 1] - held
            kept = difference.abs().topk(4).indices
            held = held.index_add(0, kept, difference[kept])
        assert torch.allclose(starts.clients[2 * index], held, atol=1e-6)
    assert not torch.equal(held, recorder.params[2])


@pytest.mark.parametrize("uplink", [[], [ErrorFeedback(TopK(0.3))], [LookBack(0.5)]])
def test_no_stages_are_the_plain_downlink_to_the_bit(fit, uplink):
    _, one, plain = run(fit, None, uplink=uplink)
    _, two, empty = run(fit, [], uplink=uplink)
    assert torch.equal(flat_params(one), flat_params(two))
    assert repr(plain.reports) == repr(empty.reports)
    model = 32 * (6 * 8 + 8 + 8 + 8 + 8 * 3 + 3) + 32 * 16
    for report in plain.reports:
        assert report.broadcast is None
        assert all(c.downlink_bits == c.dense_downlink_bits == model and c.whole_model for c in report.clients)


def test_vectorised_clients_train_from_what_they_hold_too(fit):
    trained = []
    for execution in ("sequential", "vectorized"):
        torch.manual_seed(0)
        trained.append(flat_params(run(fit, [TopK(0.3)], module=TinyModule(), execution=execution)[1]))
    assert torch.allclose(*trained, atol=1e-5)


def test_the_metrics_are_those_of_both_directions(fit):
    trainer, _, recorder = run(fit, [TopK(0.3), LookBack(0.9)], rounds=6)
    ledger, metrics = trainer.strategy.ledger, trainer.callback_metrics
    reports = recorder.reports
    up = sum(c.uplink_bits for r in reports for c in r.clients)
    down = sum(c.downlink_bits for r in reports for c in r.clients)
    dense = sum(c.dense_bits + c.dense_downlink_bits for r in reports for c in r.clients)
    assert float(metrics["comm/total_bytes_total"]) == (up + down) / 8
    assert float(metrics["comm/downlink_bytes"]) == sum(c.downlink_bits for c in reports[-1].clients) / 8
    assert (
        float(metrics["comm/total_savings"])
        == pytest.approx(1 - (up + down) / dense)
        == pytest.approx(ledger.total_savings)
    )
    assert float(metrics["comm/downlink_error"]) == pytest.approx(reports[-1].broadcast.error)
    assert float(metrics["comm/whole_models"]) == sum(c.whole_model for c in reports[-1].clients)
    assert float(metrics["lbgm/downlink_recycled_fraction"]) in (0.0, 1.0)
    assert reports[0].num_whole_models == 2
    assert "comm/downlink_error" not in run(fit, [], rounds=1)[0].callback_metrics
    assert trainer.strategy.settings()["downlink"] == repr(trainer.strategy.downlink)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_resumed_run_makes_the_rounds_of_the_unbroken_one(fit, tmp_path, name):
    _, whole, all_rounds = run(fit, CHAINS[name], rounds=6)
    checkpoint = ModelCheckpoint(tmp_path / "half", every_n_epochs=3, save_top_k=-1, filename="{step}")
    run(fit, CHAINS[name], rounds=3, callbacks=[checkpoint], enable_checkpointing=True)
    path = str(tmp_path / "half" / "step=3.ckpt")
    _, resumed, rest = run(fit, CHAINS[name], rounds=6, ckpt_path=path)
    assert torch.equal(flat_params(resumed), flat_params(whole))
    assert repr(rest.reports) == repr(all_rounds.reports[3:])


class Breaks(Callback):
    """Breaks the fourth round off once its first client is done."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.index == 3:
            inside = trainer.strategy.session.require()
            self.before = inside.downlink.state_dict()


class BreaksOff(TinyModule):
    broken = False

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 and batch_idx == 1:
            self.broken = True
            raise RuntimeError("power cut")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_round_that_breaks_off_leaves_the_downlink_as_it_was(fit, tmp_path):
    torch.manual_seed(0)
    _, whole, _ = run(fit, [TopK(0.3), LookBack(0.8)], rounds=6, module=TinyModule(), execution="sequential")
    torch.manual_seed(0)
    breaks, checkpoint = Breaks(), OnExceptionCheckpoint(tmp_path, "broken")
    module = BreaksOff()
    with pytest.raises(RuntimeError, match="power cut"):
        run(
            fit,
            [TopK(0.3), LookBack(0.8)],
            rounds=6,
            module=module,
            callbacks=[breaks, checkpoint],
            execution="sequential",
            enable_checkpointing=True,
        )
    assert module.broken
    saved = torch.load(tmp_path / "broken.ckpt", weights_only=True)["lightning_lbgm"]
    assert_same(saved["downlink"], breaks.before)
    torch.manual_seed(1)
    _, resumed, _ = run(
        fit,
        [TopK(0.3), LookBack(0.8)],
        rounds=6,
        module=TinyModule(),
        execution="sequential",
        ckpt_path=str(tmp_path / "broken.ckpt"),
    )
    assert torch.equal(flat_params(resumed), flat_params(whole))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_says_what_its_clients_hold(fit, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{step}")
    run(fit, [TopK(0.3)], rounds=2, callbacks=[checkpoint], enable_checkpointing=True)
    path = str(tmp_path / "step=2.ckpt")
    for other in ([], [TopK(0.2)], [TopK(0.3), SignSGD()]):
        with pytest.raises(MisconfigurationException, match="`downlink="):
            run(fit, other, rounds=3, ckpt_path=path)
    # Clients that held the model itself can go on with stages: they get the whole model once.
    plain = ModelCheckpoint(tmp_path / "plain", every_n_epochs=1, save_top_k=-1, filename="{step}")
    run(fit, [], rounds=2, callbacks=[plain], enable_checkpointing=True)
    _, _, recorder = run(fit, [TopK(0.3)], rounds=4, ckpt_path=str(tmp_path / "plain" / "step=2.ckpt"))
    assert [c.whole_model for c in recorder.reports[0].clients] == [True, True]


def test_a_stage_without_a_place_in_a_downlink_is_refused_at_once():
    with pytest.raises(ValueError, match=r"`downlink=.*ErrorFeedback"):
        LBGMFederated(downlink=[ErrorFeedback(TopK(0.1))])
    with pytest.raises(TypeError, match="`downlink` takes stages"):
        LBGMFederated(downlink=["TopK"])
