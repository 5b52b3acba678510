"""``GradientSpaceCallback``: principal components of the epoch gradients of an ordinary, centralized training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lbgm._compat.lightning import handles_unscaling
from lightning_lbgm.callbacks.base import check_centralized
from lightning_lbgm.callbacks.gradient_space_report import GradientSpaceHistory
from lightning_lbgm.callbacks.outputs import MetricCurve, root_folder, writes_files
from lightning_lbgm.callbacks.run_outputs import after_an_error, outputs_of, start_outputs
from lightning_lbgm.gradient_space.epoch_gradient import EpochGradient, all_finite
from lightning_lbgm.gradient_space.gram import Centering
from lightning_lbgm.gradient_space.space import GradientSpace, check_analysis

__all__ = ["GradientSpaceCallback"]

_MAX_LOGGED_TENSORS = 10


class GradientSpaceCallback(Callback):
    """Measure how few directions the gradients of a training's epochs span, in any ordinary ``Trainer``.

    This is the analysis in Section 2 of Azam et al., "Recycling Model Updates in Federated Learning: Are Gradient
    Subspaces Low-Rank?", ICLR 2022 (arXiv 2202.00280), which LBGM rests on. It has no effect on training.

    The gradient of an epoch is the sum of the gradients of its optimizer steps, as ``on_before_optimizer_step`` sees
    them: averaged over accumulated batches and processes, unscaled, and before clipping, weight decay and momentum. A
    step that a gradient scaler skips does not count. The gradients go to a file, ``4 M T`` bytes for M trainable
    parameters and T epochs; from their inner products follow, each epoch, in every logger and in
    ``trainer.callback_metrics``:

    - ``gradient_space/n95``, ``gradient_space/n99``: the paper's N95-PCA and N99-PCA, the least number of principal
      components that explain 95 % and 99 % of the variance of all epochs' gradients so far. The variance of a
      component is a squared singular value of the matrix of gradients. ``.../<parameter>`` is that of one tensor.
    - ``gradient_space/cosine_previous``: cosine between this epoch's gradient and the one before it.

    At the end, also of a fit that fails: the table of all tensors, ``gradient_space/layers.json`` in MLflow and
    ``gradient_space_layers.csv`` in another logger's folder, and the figures ``figures/gradient_space_components.png``,
    ``..._principal.png`` and ``..._cosines.png`` in MLflow, another logger's folder or ``trainer.default_root_dir``.

    Args:
        monitor: Metric that is drawn below the components. None: that of ``ModelCheckpoint`` or ``EarlyStopping``, else
            the validation accuracy or loss, if one is logged.
        center: What is subtracted before the principal components are sought, see ``GradientSpace``: ``"entries"``
            as in the authors' code, ``"epochs"`` or None.
        momentum: Analyse v_t = momentum v_{t-1} + g_t in the place of the epochs' gradients g_t; the authors' code
            does, with 0.9. The file holds the g_t.
        layers: Whether each parameter tensor is analysed too.
        log_layers: Whether their components are logged as metrics. None: if there are at most ten tensors.
        folder: Where the gradients lie, one folder a run. None: a new one in ``trainer.default_root_dir``.
        keep_gradients: Whether they stay after a fit that ends well. A resumed fit needs them; after a fit that failed
            they stay anyway.
        figures: Whether to draw the figures.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import GradientSpaceCallback
        >>> trainer = Trainer(callbacks=[GradientSpaceCallback(monitor="val/acc")], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        monitor: str | None = None,
        center: Centering = "entries",
        momentum: float = 0.0,
        layers: bool = True,
        log_layers: bool | None = None,
        folder: str | Path | None = None,
        keep_gradients: bool = False,
        figures: bool = True,
    ) -> None:
        check_analysis(center, momentum)
        self.monitor = monitor
        self.center = center
        self.momentum = momentum
        self.layers = layers
        self.log_layers = log_layers
        self.folder = folder
        self.keep_gradients = keep_gradients
        self.figures = figures
        self._gradient: EpochGradient | None = None  # None before a fit, and on other ranks than 0
        self._active = False
        self._epoch = 0
        self._space: GradientSpace | None = None
        self._history = GradientSpaceHistory(())
        self._restored: dict[str, Any] | None = None
        self._curve = MetricCurve(monitor)  # over epochs
        self._first_row = 0  # of this fit
        self._warned: set[str] = set()

    @property
    def space(self) -> GradientSpace:
        """The gradients and their inner products, on the process of rank 0."""
        if self._space is None:
            raise RuntimeError("There are no gradients before a fit has begun: ask on rank 0, and after `fit`.")
        return self._space

    # Hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_centralized(trainer)
        if stage == "fit":
            start_outputs(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = self.state_dict() if trainer.global_step > 0 else {}
        self._restored = self._space = self._gradient = None
        self._curve, self._warned = MetricCurve(self.monitor), set()
        if not trainer.is_global_zero:
            return
        try:
            self._gradient = EpochGradient(pl_module)
        except ValueError as error:
            name = type(pl_module).__name__
            raise MisconfigurationException(f"`{name}` cannot be analysed by GradientSpaceCallback. {error}") from error
        self._history = GradientSpaceHistory(self._gradient.flat.names if self.layers else ())
        if state:
            self._restore(trainer, state)
        try:
            if self._space is None:
                self._space = self._make_space(self._new_folder(trainer))
        except OSError as error:
            self._gradient = None
            self._warn(
                "folder", f"`GradientSpaceCallback` measures nothing: {error}. Pass a `folder=` for the gradients."
            )
            return
        self._first_row = self._space.count
        self._active = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._gradient is not None and not self._gradient.flat.is_current(pl_module):
            self._warn(
                "changed",
                f"The trainable parameters changed by epoch {trainer.current_epoch}: `GradientSpaceCallback` goes on"
                " with those that could be trained at the start, and one without a gradient counts as zeros.",
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._gradient is None:
            return
        if trainer.current_epoch != self._epoch:
            # Resumed from an epoch's last batch or the validation after it, Lightning skips that epoch's end.
            self._end_epoch()
            self._epoch = trainer.current_epoch
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            self._gradient.add(optimizer)
        elif all_finite(optimizer):  # else the scaler skips this step
            self._gradient.add(optimizer, 1 / scaler.get_scale() if handles_unscaling(optimizer) else 1.0)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._gradient is not None and self.figures:
            self._curve.add(trainer, trainer.current_epoch)
        metrics = trainer.strategy.broadcast(self._end_epoch())
        if not trainer.barebones:
            for name, value in metrics.items():
                pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)
        if not self.keep_gradients:
            self._discard()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with after_an_error():
            if self._active:
                self._finish(trainer)
                if trainer.fast_dev_run or self.space.count == 0:  # type: ignore[attr-defined]
                    self._discard()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        outputs_of(trainer).finish()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._restored is not None or self._space is None:
            return self._restored or {}
        return {
            "settings": self._settings(),
            "folder": str(self._space.folder),
            "space": self._space.state_dict(),
            "history": self._history.state_dict(),
            **self._curve.state_dict(),
            "epoch": self._epoch,
            "gradient": self._gradient.state_dict() if self._gradient is not None else None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    # The epoch's gradient

    def _end_epoch(self) -> dict[str, float]:
        """Store the gradient of an epoch that has made steps, and return its metrics."""
        if self._gradient is None or self._gradient.num_steps == 0:
            return {}
        assert self._space is not None
        gradient = self._gradient.take()
        if not torch.isfinite(gradient).all():
            self._warn(
                "not finite",
                f"The gradient of epoch {self._epoch} is not finite and is left out of the gradient space, as will be"
                " others like it. A smaller learning rate usually helps.",
            )
            return {}
        try:
            self._space.add(gradient)
        except OSError as error:
            self._warn("not written", f"The gradient of epoch {self._epoch} is left out: writing it failed, {error}.")
            return {}
        self._history.append(self._epoch, self._space)
        num_tensors = len(self._history.names)
        return self._history.metrics(num_tensors <= _MAX_LOGGED_TENSORS if self.log_layers is None else self.log_layers)

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(message)

    def _make_space(self, folder: str | Path) -> GradientSpace:
        assert self._gradient is not None
        flat = self._gradient.flat
        layout = flat.layout if self.layers else [flat.num_parameters]
        return GradientSpace(folder, layout, center=self.center, momentum=self.momentum)

    def _new_folder(self, trainer: pl.Trainer) -> str | Path:
        if self.folder is not None:
            return self.folder
        root = root_folder(trainer)
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="gradient_space_", dir=root)

    def _settings(self) -> dict[str, Any]:
        return {"center": self.center, "momentum": self.momentum, "layers": self.layers}

    def _restore(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        """Go on with the gradients of earlier epochs, or warn that they are not there."""
        assert self._gradient is not None
        for name, value in self._settings().items():
            if state["settings"][name] != value:
                raise MisconfigurationException(
                    f"The checkpoint's gradient space has `{name}={state['settings'][name]!r}`, this callback"
                    f" `GradientSpaceCallback({name}={value!r})`. Resume with the same."
                )
        try:
            space = self._make_space(self.folder or state["folder"])
            space.load_state_dict(state["space"])
        except (OSError, ValueError) as error:
            rank_zero_warn(
                f"`GradientSpaceCallback` starts afresh at epoch {trainer.current_epoch}, for {error}. To go on it"
                " needs the earlier gradients: `keep_gradients=True`, and `folder=...` where they were moved."
            )
            return
        self._space = space
        self._history.load_state_dict(state["history"])
        if self.figures:
            self._curve.load_state_dict(state)
        self._epoch = state["epoch"]
        if state["gradient"] is not None:
            self._gradient.load_state_dict(state["gradient"])

    # Outputs

    def _finish(self, trainer: pl.Trainer) -> None:
        """Write the table and the figures, on rank 0."""
        active, self._active = self._active, False
        if not active or not writes_files(trainer) or self.space.count == 0:
            return
        self._history.write(trainer, self.space, self._curve if self.figures else None, self._first_row)

    def _discard(self) -> None:
        try:
            if self._space is not None:
                self._space.discard()
        except OSError as error:
            self._warn("discard", f"The epochs' gradients could not be deleted: {error}.")
