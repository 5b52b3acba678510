"""Lazy modules are initialised from a batch before the first round."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyModule, flat_params
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lbgm import LBGMFederated


class Lazy(TinyModule):
    def __init__(self) -> None:
        layers = [nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.LazyLinear(3)]
        super().__init__(net=nn.Sequential(*layers))
        self.calls = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.calls.append(batch_idx)
        return loss


def initialized(fit, seed=0, **kwargs):
    """Return the module as it is when the first round starts."""
    module, begin = Lazy(), {}

    class Begin(Lazy):
        def on_train_batch_start(self, batch, batch_idx):
            if batch.index == 0:
                begin.update({name: value.clone() for name, value in self.state_dict().items()})
                begin["calls"] = list(self.calls)

    module = Begin()
    fit(LBGMFederated(num_clients=4, seed=seed, execution="sequential"), module=module, max_epochs=2, **kwargs)
    return module, begin


def test_a_lazy_module_trains_without_a_validation_loader(fit):
    generators = []

    class Watching(Lazy):
        def on_train_batch_start(self, batch, batch_idx):
            generators.append(torch.get_rng_state())

    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer, module = fit(module=Watching(), max_epochs=1)
    assert trainer.strategy.settings()["num_parameters"] == 6 * 5 + 5 + 2 * 5 + 2 * 5 + 5 * 3 + 3
    assert torch.isfinite(flat_params(module)).all()
    assert torch.equal(generators[0], before)


def test_the_dry_pass_leaves_nothing_but_shapes(fit):
    module, begin = initialized(fit)
    assert begin.pop("calls") == []  # it ends before the loss
    for layer in (1, 3):
        assert torch.equal(begin[f"net.{layer}.running_mean"], torch.zeros(5))
        assert torch.equal(begin[f"net.{layer}.running_var"], torch.ones(5))
        assert int(begin[f"net.{layer}.num_batches_tracked"]) == 0
    assert not any(layer._forward_pre_hooks for layer in module.net)


def test_the_initial_values_are_a_function_of_the_seed(fit):
    (_, one), (_, same), (_, other) = (initialized(fit, seed) for seed in (0, 0, 1))
    assert torch.equal(one["net.0.weight"], same["net.0.weight"])
    assert not torch.equal(one["net.0.weight"], other["net.0.weight"])


def test_a_lazy_part_that_is_never_used_is_an_error_in_words(fit):
    module = Lazy()
    module.unused = nn.LazyLinear(3)
    with pytest.raises(MisconfigurationException, match=r"unused.*not initialised"):
        fit(module=module)


def test_a_lazy_module_resumes(fit, tmp_path):
    trainer, _ = fit(module=Lazy(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, resumed = fit(module=Lazy(), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    _, unbroken = fit(module=Lazy(), max_epochs=4)
    assert torch.equal(flat_params(resumed), flat_params(unbroken))
