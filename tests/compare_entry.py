"""A LightningCLI for test_compare.py, with a failure to order: ``python -m compare_entry fit --config ...``."""

from __future__ import annotations

import torch
from conftest import TinyModule, make_data
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

import lightning_lbgm  # noqa: F401  (registers the strategies by name)


class Module(TinyModule):
    def __init__(self, lr: float = 0.3, fail_at: int = -1) -> None:
        super().__init__(lr=lr)
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("ordered to fail")
        return super().training_step(batch, batch_idx)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(make_data(), batch_size=1000)

    def val_dataloader(self):
        return DataLoader(make_data(30, seed=1), batch_size=30)


def main(args: list[str] | None = None) -> LightningCLI:
    torch.set_num_threads(1)
    return LightningCLI(Module, Data, save_config_callback=None, args=args)


if __name__ == "__main__":
    main()
