"""The command line of the paper's experiments: a LightningCLI whose model and data the config names."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

import lightning_lbgm  # noqa: F401  (registers the strategies by name)
from recipes.mnist import LogConfig

__all__ = ["DEFAULTS", "main"]

DEFAULTS = Path(__file__).parent / "defaults.yaml"
"""What all experiments share; a config says what differs."""


def main(args: list[str] | None = None, run: bool = True) -> LightningCLI:
    """Run the command line, or ``args``; without ``run`` (and without a subcommand) only make what the config names."""
    defaults = {"default_config_files": [str(DEFAULTS)]}
    torch.set_num_threads(1)  # simulated clients use several cores better as processes: `--trainer.devices=2`
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=LogConfig,
        parser_kwargs={command: defaults for command in ("fit", "validate", "test")} if run else defaults,
        args=args,
        run=run,
    )
