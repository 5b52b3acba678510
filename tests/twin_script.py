"""Fits of mixed packages, for test_twin.py: ``python twin_script.py ORDER FOLDER``.

ORDER says what the script imports first, ``twin`` or ``ours``. It writes ``FOLDER/results.pt``: what came of each
combination of Trainer, module, callbacks and logger, by four letters, L for ``lightning.pytorch`` and T for the twin.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

if sys.argv[1] == "twin":
    import pytorch_lightning as twin
    from pytorch_lightning import LightningModule  # noqa: F401  (as at the top of a user's module)
    from pytorch_lightning.loggers import CSVLogger  # noqa: F401

    assert "lightning.pytorch" not in sys.modules
    import lightning_lbgm
else:
    import lightning_lbgm

    assert "pytorch_lightning" not in sys.modules
    assert "lightning_fabric" not in sys.modules
    import pytorch_lightning as twin

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PACKAGES = {"L": pl, "T": twin}


def make_data(num_examples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (num_examples,), generator=generator)
    return TensorDataset(torch.randn(num_examples, 6, generator=generator) + y[:, None], y)


def make_classes(package):
    class Module(package.LightningModule):
        def __init__(self, lr: float = 0.3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(6, 3)
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train/loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            output = self.net(batch[0])
            self.accuracy(output, batch[1])
            self.log("val/acc", self.accuracy)
            self.log("val/loss", nn.functional.cross_entropy(output, batch[1]))

        test_step = validation_step

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

        def configure_callbacks(self):
            return [package.callbacks.LearningRateMonitor()]

    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(make_data(60, 0), batch_size=8)

        def val_dataloader(self):
            return DataLoader(make_data(30, 1), batch_size=30)

        test_dataloader = val_dataloader

    return Module, Data


def run(trainers, modules, callbacks, loggers, folder: Path) -> dict:
    make_module, make_datamodule = make_classes(modules)
    checkpoint = callbacks.callbacks.ModelCheckpoint(folder, monitor="val/loss", save_last=True)
    stopping = callbacks.callbacks.EarlyStopping("val/loss")
    bar = callbacks.callbacks.TQDMProgressBar()

    def make_trainer(name: str, **settings):
        return trainers.Trainer(
            strategy=lightning_lbgm.LBGMFederated(num_clients=4, seed=0),
            accelerator="cpu",
            logger=loggers.loggers.CSVLogger(folder, name=name, version=0),
            default_root_dir=folder,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **settings,
        )

    torch.manual_seed(0)
    module = make_module()
    outputs = lightning_lbgm.LBGMCallback(figures=False)
    trainer = make_trainer("first", max_epochs=3, callbacks=[checkpoint, bar, outputs, stopping])
    trainer.fit(module, datamodule=make_datamodule())
    validated = trainer.validate(module, datamodule=make_datamodule(), verbose=False)
    tested = trainer.test(datamodule=make_datamodule(), ckpt_path="best", verbose=False)
    assert (trainer.checkpoint_callback, trainer.early_stopping_callback) == (checkpoint, stopping)
    assert trainer.progress_bar_callback is bar
    assert trainer.log_dir == str(folder / "first" / "version_0")

    resumed = make_module()
    again = make_trainer("resumed", max_epochs=5, enable_checkpointing=False, enable_progress_bar=False)
    again.fit(resumed, datamodule=make_datamodule(), ckpt_path=folder / "last.ckpt")
    best = make_module.load_from_checkpoint(checkpoint.best_model_path)
    return {
        "parameters": [p.detach() for m in (module, resumed, best) for p in m.parameters()],
        "metrics": [validated, tested, {k: float(v) for k, v in again.callback_metrics.items()}],
        "rounds": (trainer.global_step, again.global_step),
        "callbacks": sorted(type(callback).__name__ for callback in trainer.callbacks),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")),
        "logged": [(folder / name / "version_0" / "metrics.csv").read_text() for name in ("first", "resumed")],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for letters in itertools.product("LT", repeat=4):
        name = "".join(letters)
        if sys.argv[1] == "twin" and name not in ("LLTT", "LTLL", "TLLL", "TTTT"):
            continue  # the other order has them; here, each pair of a Trainer's, a module's and a callback's package
        results[name] = run(*(PACKAGES[letter] for letter in letters), folder / name)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
