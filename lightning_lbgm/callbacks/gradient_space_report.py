"""Gradient space over a run: its metrics, the rows of its table, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_lbgm.callbacks.outputs import MetricCurve
from lightning_lbgm.callbacks.run_outputs import outputs_of
from lightning_lbgm.figures.gradient_space import draw_components, draw_cosines, draw_principal_cosines
from lightning_lbgm.gradient_space.space import GradientSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientSpaceHistory"]

_WHOLE_MODEL = "(model)"
_MAX_PANELS = 9
_SHARES = {"n95": 0.95, "n99": 0.99}


class GradientSpaceHistory:
    """Remember, for each epoch, what the gradients up to it say.

    Args:
        names: Names of the parameter tensors that are told apart; none if only the whole model is.

    Attributes:
        epochs: The epoch of each gradient.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.epochs: list[int] = []
        self._values: dict[str, list[list[float]]] = {}  # by epoch: the whole model, then each tensor

    def append(self, epoch: int, space: GradientSpace) -> None:
        """Note the state of ``space``, to which the epoch's gradient was added last."""
        self.epochs.append(epoch)
        new = {name: list(map(float, space.components(share))) for name, share in _SHARES.items()}
        new["cosine_previous"] = space.last_cosines().tolist()
        new["norm"] = space.last_norms().tolist()
        for name, row in new.items():
            self._values.setdefault(name, []).append(row)

    def metrics(self, with_layers: bool) -> dict[str, float]:
        """Return the metrics of the last epoch; docs/gradient-space.md says what each means."""
        last = {name: rows[-1] for name, rows in self._values.items()}
        metrics = {f"gradient_space/{name}": last[name][0] for name in _SHARES}
        if len(self.epochs) > 1:
            metrics["gradient_space/cosine_previous"] = last["cosine_previous"][0]
        if with_layers:
            for name in _SHARES:
                metrics.update({f"gradient_space/{name}/{layer}": v for layer, v in zip(self.names, last[name][1:])})
        return metrics

    def rows(self, space: GradientSpace, first: int = 0) -> Iterator[dict[str, Any]]:
        """Yield a row of the table for the whole model and each tensor in each epoch, from gradient ``first`` on."""
        layers = list(zip((_WHOLE_MODEL, *self.names), (space.layout.size, *space.layout.sizes)))
        for t, epoch in list(enumerate(self.epochs))[first:]:
            for i, (name, size) in enumerate(layers):
                yield {
                    "epoch": epoch,
                    "layer": name,
                    "num_parameters": size,
                    "n95": int(self._values["n95"][t][i]),
                    "n99": int(self._values["n99"][t][i]),
                    "cosine_previous": self._values["cosine_previous"][t][i],
                    "norm": self._values["norm"][t][i],
                }

    def figures(
        self, space: GradientSpace, metric: str | None, curve: Sequence[tuple[float, float]]
    ) -> dict[str, Callable[[], Figure]]:
        """Return what draws the figures, by file name; the heat maps show the whole model and the largest tensors.

        Args:
            space: The gradients.
            metric: Name of the metric below the components.
            curve: Its points ``(epoch, value)``.
        """
        counts = {name.upper(): np.array(self._values[name]) for name in _SHARES}
        several = len(self.names) > 1
        sizes = space.layout.sizes
        largest = sorted(range(len(self.names)), key=lambda i: -sizes[i])[: _MAX_PANELS - 1] if several else []
        panels: dict[str, int | None] = {"whole model": None, **{self.names[i]: i for i in sorted(largest)}}
        components = partial(
            draw_components,
            self.epochs,
            {name: values[:, 0] for name, values in counts.items()},
            {name: values[:, 1:] for name, values in counts.items()} if several else None,
            metric,
            curve,
        )

        def principal() -> Figure:
            cosines = {name: space.principal_cosines(0.99, layer).numpy() for name, layer in panels.items()}
            return draw_principal_cosines(self.epochs, cosines, 0.99)

        def cosines() -> Figure:
            return draw_cosines(self.epochs, {name: space.cosines(layer).numpy() for name, layer in panels.items()})

        return {
            "gradient_space_components.png": components,
            "gradient_space_principal.png": principal,
            "gradient_space_cosines.png": cosines,
        }

    def write(self, trainer: pl.Trainer, space: GradientSpace, curve: MetricCurve | None, first_row: int) -> None:
        """Write the table from gradient ``first_row`` on, if there is a logger, and with a ``curve`` the figures."""
        outputs = outputs_of(trainer)
        try:
            if trainer.loggers:
                rows = list(self.rows(space, first_row))
                artifact, file_name = "gradient_space/layers.json", "gradient_space_layers.csv"
                outputs.add_rows(trainer, rows, artifact, file_name, starts=first_row == 0)
            if curve is not None:
                outputs.write_figures(trainer, self.figures(space, curve.metric, curve.points()))
        finally:
            outputs.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return the history as built-ins and tensors."""
        values = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in self._values.items()}
        return {"epochs": list(self.epochs), "values": values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.epochs = list(state_dict["epochs"])
        self._values = {name: rows.tolist() for name, rows in state_dict["values"].items()}
