"""The progress bar: savings and recycled fraction, and the clients done in a long round."""

from __future__ import annotations

import re
import time

import pytest
from conftest import TinyModule
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

from lightning_lbgm import LBGMFederated


class Slow(TinyModule):
    def training_step(self, batch, batch_idx):
        time.sleep(0.09)  # the bar is written to every 0.2 seconds at most
        return super().training_step(batch, batch_idx)


class Descriptions(Callback):
    """Read the bar's description after each client and after each round."""

    def __init__(self, read) -> None:
        self.read, self.within, self.after = read, [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.within.append(self.read(trainer.progress_bar_callback))

    def on_train_batch_end(self, trainer, *args) -> None:
        self.after.append(self.read(trainer.progress_bar_callback))


@pytest.mark.parametrize(
    ("bar", "read"),
    [
        (TQDMProgressBar, lambda bar: bar.train_progress_bar.desc),
        (RichProgressBar, lambda bar: bar.train_progress_bar.description.replace("\\[", "[")),
    ],
)
def test_a_long_round_shows_the_clients_done(fit, bar, read, capsys):
    watch = Descriptions(read)
    fit(LBGMFederated(num_clients=6), module=Slow(), callbacks=[bar(), watch], enable_progress_bar=True, max_epochs=2)
    assert any(re.search(r"\[[2-5]/6 clients\]", text) for text in watch.within)  # which ones, a busy machine says
    assert all("clients]" not in text for text in watch.after)
    assert all("Epoch" in text for text in watch.within + watch.after)
    capsys.readouterr()


def test_the_bar_shows_savings_and_recycled_fraction(fit, capsys):
    trainer, _ = fit(callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    assert {"comm/savings", "lbgm/recycled_fraction"} <= set(trainer.progress_bar_metrics)
    out = capsys.readouterr()
    assert "comm/savings=" in out.out + out.err
