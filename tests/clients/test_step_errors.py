"""An error in a client's training says whose it was."""

from __future__ import annotations

import logging

import pytest
from conftest import TinyModule
from torch import nn

from lightning_lbgm import LBGMFederated, NaturalPartitioner
from lightning_lbgm.clients.errors import add_client


class MyError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def test_an_error_in_training_step_keeps_its_type_and_names_client_and_step(fit):
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1 and batch_idx == 2:
                raise MyError(7)
            return super().training_step(batch, batch_idx)

    strategy = LBGMFederated(num_clients=4, seed=0, execution="sequential")
    with pytest.raises(MyError) as caught:
        fit(strategy, module=Failing(), batch_size=6)
    assert (str(caught.value), caught.value.code) == ("code 7", 7)
    assert caught.traceback[-1].name == "training_step"
    place = "Raised while a client was trained: client 0, round 1, local step 2, batch of 3."
    assert getattr(caught.value, "__notes__", [place]) == [place]


@pytest.mark.parametrize("execution", ["sequential", "auto"])
def test_batch_norm_on_one_example_names_client_and_remedy(fit, execution):
    ids = [0] * 20 + [1] * 20 + [2] * 20
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    strategy = LBGMFederated(num_clients=3, partitioner=NaturalPartitioner(ids), execution=execution)
    message = r"more than 1 value per.*client 0, round 0, local step 1, batch of 1\).*drop_last=True.*min_examples"
    with pytest.raises(ValueError, match=message):
        fit(strategy, module=module, batch_size=19)


def test_where_errors_take_no_notes_the_place_is_logged(caplog):
    class WithoutNotes:
        """Stands for an exception of Python 3.10."""

    with caplog.at_level(logging.ERROR):
        add_client(WithoutNotes(), 1, 2, 3, 4)  # type: ignore[arg-type]
    assert "client 2, round 1, local step 3, batch of 4" in caplog.text
