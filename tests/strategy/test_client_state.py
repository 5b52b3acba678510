"""What a step changes besides trainable parameters is the client's for its turn, and follows ``buffers=``."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated, NaturalPartitioner

QUEUE = 16  # two rounds of two steps of four


class Contrastive(TinyModule):
    """A momentum encoder, and a queue of its outputs with a pointer, as in momentum contrast."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(lr=0.1)
        self.encoder = nn.Linear(6, 3).requires_grad_(False)
        self.encoder.load_state_dict(self.net.state_dict())
        self.register_buffer("queue", torch.zeros(QUEUE, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.starts = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.starts.append((self.encoder.weight.clone(), self.queue.clone(), int(self.pointer)))
        with torch.no_grad():
            for slow, fast in zip(self.encoder.parameters(), self.net.parameters()):
                slow.data = 0.9 * slow.data + 0.1 * fast.data
            keys = self.encoder(batch[0])
            place = int(self.pointer)
            self.queue[place : place + len(keys)] = keys
            self.pointer[0] = (place + len(keys)) % QUEUE
        return self.loss(batch) + (self.net(batch[0]) @ self.queue.T).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


def train(root, buffers, rounds=3, ckpt_path=None, module=None, num_clients=3, **kwargs):
    module = module or Contrastive()
    ids = [i * num_clients // 24 for i in range(24)]
    strategy = LBGMFederated(
        num_clients, NaturalPartitioner(ids), uplink=[], buffers=buffers, local_steps=2, seed=0, weighting="uniform"
    )
    trainer = build_trainer(root, strategy, max_epochs=rounds, **kwargs)
    trainer.fit(module, DataLoader(make_data(24), batch_size=4), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("buffers", ["average", "server"])
@pytest.mark.filterwarnings("ignore:Training changes")
def test_every_client_of_a_round_starts_from_the_same(tmp_path, buffers):
    _, module = train(tmp_path, buffers)
    for begin in (0, 3, 6):
        first, *others = module.starts[begin : begin + 3]
        for other in others:
            assert torch.equal(first[0], other[0])
            assert torch.equal(first[1], other[1])
            assert first[2] == other[2]
    moved = not torch.equal(module.starts[0][0], module.starts[3][0])
    assert moved == (buffers == "average")


@pytest.mark.filterwarnings("ignore:.*buffers='client'")
def test_a_client_that_keeps_its_own_goes_on_where_it_was(tmp_path):
    _, module = train(tmp_path, "client")
    reference = Contrastive()
    data = make_data(24)
    state = {k: {n: t.clone() for n, t in reference.state_dict().items() if n[:3] != "net"} for k in range(3)}
    theta = {n: t.clone() for n, t in reference.net.state_dict().items()}
    for _ in range(3):
        ends = []
        for k in range(3):
            reference.load_state_dict({**{f"net.{n}": t for n, t in theta.items()}, **state[k]})
            optimizer = reference.configure_optimizers()
            for step in range(2):
                begin = 8 * k + 4 * step
                optimizer.zero_grad()
                reference.training_step([t[begin : begin + 4] for t in data.tensors], step).backward()
                optimizer.step()
            state[k] = {n: t.clone() for n, t in reference.state_dict().items() if n[:3] != "net"}
            ends.append({n: t.clone() for n, t in reference.net.state_dict().items()})
        theta = {n: torch.stack([end[n] for end in ends]).mean(0) for n in theta}
    for name, value in theta.items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for (weight, queue, pointer), (weight_too, queue_too, pointer_too) in zip(module.starts, reference.starts):
        torch.testing.assert_close((weight, queue), (weight_too, queue_too), rtol=1e-5, atol=1e-6)
        assert pointer == pointer_too


def test_what_cannot_be_averaged_is_said_once_with_the_remedy(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, "average")
    told = [str(w.message) for w in caught if "cannot be averaged" in str(w.message)]
    assert len(told) == 1
    assert "'pointer' (of dtype int64)" in told[0]
    assert "buffers='client'" in told[0]


def test_batch_norms_counter_is_no_matter(tmp_path):
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, "average", module=module)
    assert not [w for w in caught if "averaged" in str(w.message)]
    assert module.net[1].num_batches_tracked == 0


@pytest.mark.parametrize("buffers", ["average", "server", "client"])
@pytest.mark.filterwarnings("ignore:Training changes", "ignore:.*buffers='client'")
def test_what_is_sent_is_counted(tmp_path, buffers):
    trainer, _ = train(tmp_path, buffers, rounds=2)
    parameters, encoder, queue = 21, 21, QUEUE * 3
    ledger = trainer.strategy.ledger
    values = 2 * 3 * 32 * (parameters + (encoder + queue if buffers == "average" else 0))
    framing = ledger.uplink_bits - values  # names, dtypes and shapes of three tensors a message
    assert framing == 0 if buffers != "average" else 0 < framing < 2 * 3 * 3 * 8 * 24
    # The queue is a buffer, sent from the start; the encoder once it has been averaged.
    down = parameters * 2 + (0 if buffers == "client" else 2 * queue) + (encoder if buffers == "average" else 0)
    assert ledger.downlink_bits == 3 * 32 * down


@pytest.mark.parametrize("buffers", ["average", "server", "client"])
@pytest.mark.filterwarnings("ignore:Training changes", "ignore:.*buffers='client'")
def test_resuming_goes_on_bit_for_bit(tmp_path, buffers):
    class Hidden(Contrastive):
        def __init__(self):
            super().__init__()
            self.register_buffer("hidden", torch.zeros(6), persistent=False)

        def training_step(self, batch, batch_idx):
            self.hidden += batch[0].mean(0)
            return super().training_step(batch, batch_idx) + self.net(self.hidden).square().sum()

    trainer, _ = train(tmp_path, buffers, rounds=2, module=Hidden())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    broken, module = train(tmp_path, buffers, rounds=4, module=Hidden(), ckpt_path=tmp_path / "a.ckpt")
    whole, reference = train(tmp_path, buffers, rounds=4, module=Hidden())
    assert torch.equal(flat_params(module), flat_params(reference))
    for name, value in dict(reference.named_buffers()).items():
        assert torch.equal(dict(module.named_buffers())[name], value), name
    assert torch.equal(module.encoder.weight, reference.encoder.weight)
    assert broken.strategy.ledger == whole.strategy.ledger


@pytest.mark.parametrize("owner", ["module", "callback", "lambda"])
@pytest.mark.parametrize("changes", [True, False])
def test_a_batch_hook_that_moves_the_model_is_told_that_it_runs_once_a_round(tmp_path, owner, changes):
    def move(module):
        module.calls += 1
        if changes:
            module.encoder.weight.data.mul_(0.5)

    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.calls = nn.Linear(6, 3).requires_grad_(False), 0

    class Own(Module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            move(self)

    class Callback(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            move(pl_module)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Own() if owner == "module" else Module()
        own = pl.callbacks.LambdaCallback(on_train_batch_end=lambda trainer, pl_module, *rest: move(pl_module))
        train(tmp_path, "average", module=module, callbacks={"module": [], "callback": [Callback()]}.get(owner, [own]))
    told = [str(w.message) for w in caught if "once a round" in str(w.message)]
    assert len(told) == changes
    if changes:
        assert ".on_train_batch_end` changes 'encoder.weight'" in told[0]
        assert "`on_before_zero_grad`" in told[0]
    assert module.calls == 3
    assert "on_train_batch_end" not in vars(module)


def test_a_client_whose_buffer_becomes_nan_is_left_out(tmp_path):
    class Diverging(TinyModule):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def training_step(self, batch, batch_idx):
            self.mean += batch[0].mean(0) / (0 if 0 < float(batch[0][0, 0]) < 0.01 else 1)
            return self.loss(batch)

    data = make_data(24)
    data.tensors[0][8, 0] = 0.005  # of the second client
    strategy = LBGMFederated(3, NaturalPartitioner([i // 8 for i in range(24)]), uplink=[], seed=0)
    trainer = build_trainer(tmp_path, strategy, max_epochs=1)
    module = Diverging()
    with pytest.warns(UserWarning, match="client 1 is not finite"):
        trainer.fit(module, DataLoader(data, batch_size=8))
    assert torch.isfinite(module.mean).all()
