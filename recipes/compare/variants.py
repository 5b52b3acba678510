"""What is compared: names, and the arguments of a LightningCLI that train each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

__all__ = ["Variant", "make_variants", "with_seeds"]


@dataclass(frozen=True)
class Variant:
    """One of the runs to compare.

    Attributes:
        name: Its name in table, figures and MLflow.
        configs: Files of settings for a LightningCLI, each over the one before.
        changes: Settings over those of the files, nested as they are there.
        seed: The run's seed; None: that of the files.
    """

    name: str
    configs: tuple[Path, ...]
    changes: dict[str, object] | None = None
    seed: int | None = None

    @property
    def run_name(self) -> str:
        """Its name and, if it has one, its seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """The run's name as a part of file names: only letters, digits, dots, hyphens and underscores."""
        return re.sub(r"[^\w.-]+", "_", self.run_name)

    @property
    def options(self) -> tuple[str, ...]:
        """What it adds to the command line."""
        return () if self.seed is None else (f"--seed_everything={self.seed}",)

    def fingerprint(self, entry: str, options: Sequence[str]) -> str:
        """Return what changes where the run would: with the entry, an option, or what a file holds."""
        texts = [path.read_text() for path in self.configs]
        return hashlib.sha256(json.dumps([entry, texts, self.changes, *options, *self.options]).encode()).hexdigest()


def with_seeds(variants: Sequence[Variant], seeds: Sequence[int]) -> list[Variant]:
    """Return each variant once with each seed; as they are if there is none."""
    return [replace(variant, seed=seed) for variant in variants for seed in seeds] if seeds else list(variants)


def make_variants(base: Path | None, configs: Sequence[Path], methods: Path | None) -> list[Variant]:
    """Return what the command line names: methods first, then configs, each in the order given.

    Args:
        base: Config under all others.
        configs: A variant each, with the file's name.
        methods: YAML file that maps names to changes.

    Raises:
        ValueError: If there is nothing to compare, a file is missing, ``methods`` is no such file, or two names are the
            same.
    """
    for path in (base, *configs, methods):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is not a file.")
    if methods is not None and base is None:
        raise ValueError(f"--methods {methods} says what changes in a config: pass that one as --base.")
    under = () if base is None else (base,)
    variants = []
    if methods is not None:
        loaded = yaml.safe_load(methods.read_text())
        if not isinstance(loaded, dict) or not all(isinstance(c, (dict, type(None))) for c in loaded.values()):
            raise ValueError(
                f"{methods} must map names to changes of the base config, as recipes/compare/methods.yaml."
            )
        variants += [Variant(str(name), under, changes) for name, changes in loaded.items()]
    variants += [Variant(path.stem, (*under, path)) for path in configs]
    if not variants:
        raise ValueError("Nothing to compare: pass --config, several times, or --base.")
    names = [variant.file_name for variant in variants]
    for variant in variants:
        if names.count(variant.file_name) > 1:
            raise ValueError(f"Two runs would be named {variant.name!r}: rename a file, or a method.")
    return variants
