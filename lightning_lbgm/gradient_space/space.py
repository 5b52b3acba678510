"""Gradient space of a run: the gradients on disk, their inner products in memory.

The analysis is that of Section 2 of Azam et al., "Recycling Model Updates in Federated Learning: Are Gradient Subspaces
Low-Rank?", ICLR 2022, https://arxiv.org/abs/2202.00280.

T = gradients so far, M = entries of each, L = parameter tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.gradient_space import gram as grams
from lightning_lbgm.gradient_space.gram import Array, Centering

__all__ = ["GradientSpace"]

_MAPPED = 2**24  # float32 entries of earlier gradients that are mapped at once: 64 MiB
_BLOCK = 2**20  # entries of them that are float64 at once: 8 MiB


class GradientSpace:
    """Principal components of the gradients added so far, for the whole model and for each parameter tensor.

    A gradient is appended to a file and multiplied with all earlier ones, which are read from there block by block; so
    memory holds O(M + L T²) numbers, never ``(T, M)``. Everything else follows from the inner products (see
    ``lightning_lbgm.gram``). They are summed in float64; the file has float32.

    Results with a leading axis of length 1 + L have the whole model first, then the tensors in order.

    Args:
        folder: Where the file ``gradients.f32`` lies; the first gradient makes it or replaces what is there.
        layout: Shapes or sizes of the parameter tensors.
        center: What is subtracted before the principal components are sought. ``"entries"``: from each gradient the
            mean of its own entries (within the tensor, or the whole model), as the authors' published code does, whose
            PCA takes entries for examples and epochs for features. ``"epochs"``: from all gradients their mean, so that
            components tell how gradients differ. None: nothing, so that components span the gradients themselves.
        momentum: The components are those of v_t = momentum v_{t-1} + g_t, in [0, 1). The authors' code uses 0.9.

    Attributes:
        count: T, gradients so far.
        folder: The folder.
        layout: The layout.

    Raises:
        ValueError: If the layout is empty, or an argument is out of range.

    Examples:
        >>> import tempfile
        >>> space = GradientSpace(tempfile.mkdtemp(), [(2, 2), 2], center=None)
        >>> space.add(torch.tensor([1.0, 0, 0, 0, 1, 1]))
        >>> space.add(torch.tensor([0.0, 2, 0, 0, 2, 2]))
        >>> space.gram().tolist()
        [[3.0, 4.0], [4.0, 12.0]]
        >>> space.num_components(0.95), space.components(0.95)
        (2, [2, 2, 1])
        >>> space.discard()
    """

    def __init__(
        self, folder: str | Path, layout: LayoutLike, *, center: Centering = "entries", momentum: float = 0.0
    ) -> None:
        check_analysis(center, momentum)
        self.layout = Layout.of(layout)
        if self.layout.size == 0:
            raise ValueError("`layout` has no entries: give the shapes of the trainable parameters.")
        self.center = center
        self.momentum = momentum
        self.count = 0
        self.folder = Path(folder)
        self._path = self.folder / "gradients.f32"
        self._bounds = np.cumsum((0, *self.layout.sizes)).tolist()
        self._rows: list[Array] = []  # row t: inner products with the gradients 0 to t, (L, t + 1)
        self._sums: list[Array] = []  # of each gradient's entries, (L,)
        self._analysed: tuple[Array, Array, Array] | None = None
        self._explained: Array | None = None

    @property
    def gradients(self) -> NDArray[np.float32]:
        """The gradients, ``(T, M)``, mapped from the file and not to be written to."""
        return self._map(0, self.count)

    def add(self, gradient: Tensor) -> None:
        """Store a gradient of shape ``(M,)``, of any floating dtype and on any device.

        Raises:
            ValueError: If its shape is another, or an entry is not finite in float32.
        """
        if tuple(gradient.shape) != (self.layout.size,):
            raise ValueError(f"`gradient` must have the shape ({self.layout.size},), got {tuple(gradient.shape)}.")
        row: NDArray[np.float32] = gradient.detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(row).all():
            raise ValueError("`gradient` has entries that are not finite in float32. Leave it out.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("r+b" if self.count else "wb") as file:
            file.seek(self.count * row.nbytes)
            row.tofile(file)
            file.truncate()  # what a run that went on longer left behind
        self._rows.append(self._products(row, self.count + 1))
        segments = list(zip(self._bounds, self._bounds[1:]))
        self._sums.append(np.array([row[begin:end].sum(dtype=np.float64) for begin, end in segments]))
        self.count += 1
        self._analysed = self._explained = None

    def gram(self, layer: int | None = None) -> Tensor:
        """Return the inner products of the added gradients, ``(T, T)`` in float64, of all entries or of a tensor's."""
        layers = self._grams()
        return torch.from_numpy(layers.sum(0) if layer is None else layers[layer].copy())

    def num_components(self, share: float) -> int:
        """Return how many principal components explain ``share`` of the variance: 0.95 gives the paper's N95-PCA.

        The variance of a component is its eigenvalue, a squared singular value. 0 if the gradients do not vary.
        """
        return self.components(share)[0]

    def components(self, share: float) -> list[int]:
        """Return the same for the whole model and each parameter tensor, ``(1 + L,)``."""
        return [int(count) for count in grams.num_components(self._shares(), share)]

    def cosines(self, layer: int | None = None) -> Tensor:
        """Return the cosines between the gradients, ``(T, T)``; 0 with a gradient of zeros."""
        return torch.from_numpy(grams.cosines(self._analysis()[0][_index(layer)]))

    def last_cosines(self) -> Array:
        """Return the cosine between the last two gradients, ``(1 + L,)``; NaN if there is one only."""
        if self.count < 2:
            return np.full(1 + len(self.layout.sizes), np.nan)
        return grams.cosines(self._analysis()[0][:, -2:, -2:])[:, 0, 1]

    def last_norms(self) -> Array:
        """Return the L2 norm of the last gradient, ``(1 + L,)``."""
        return np.sqrt(self._analysis()[0][:, -1, -1])

    def principal_cosines(self, share: float, layer: int | None = None) -> Tensor:
        """Return the cosines between principal directions and gradients, ``(N, T)``, the largest variance first.

        N is the number of components that explain ``share``; the sign of a direction is arbitrary.
        """
        gram, centered, cross = (stack[_index(layer)] for stack in self._analysis())
        return torch.from_numpy(grams.principal_cosines(gram, centered, cross, share))

    def state_dict(self) -> dict[str, Any]:
        """Return the inner products, ``L T (T + 1) / 2`` numbers; the gradients stay in the file."""
        num_layers = len(self.layout.sizes)
        rows = np.concatenate(self._rows, 1) if self._rows else np.zeros((num_layers, 0))
        sums = np.stack(self._sums) if self._sums else np.zeros((0, num_layers))
        return {
            "sizes": list(self.layout.sizes),
            "count": self.count,
            "products": torch.from_numpy(rows),
            "sums": torch.from_numpy(sums),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, with the gradients that lie in the folder.

        Raises:
            ValueError: If the layout is another, or the file does not hold those gradients.
        """
        if state_dict["sizes"] != list(self.layout.sizes):
            raise ValueError("the trainable parameters have changed")
        count = state_dict["count"]
        held = self._path.stat().st_size // (4 * self.layout.size) if self._path.exists() else 0
        if held < count:
            raise ValueError(f"{self._path} holds {held} gradients of {count} earlier epochs")
        ends = np.cumsum(np.arange(1, count + 1))
        rows = np.split(state_dict["products"].numpy(), ends, 1)[:-1]
        if count:
            again = self._products(self._map(count - 1, 1)[0], 1, first=count - 1)[:, 0]
            if not np.allclose(again, rows[-1][:, -1], rtol=1e-6, atol=0):
                raise ValueError(f"{self._path} holds the gradients of another run")
        self.count, self._rows, self._sums = count, rows, list(state_dict["sums"].numpy())
        self._analysed = self._explained = None

    def discard(self) -> None:
        """Delete the file, and the folder if nothing else is in it. The inner products stay."""
        self._path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _map(self, first: int, count: int) -> NDArray[np.float32]:
        if count == 0:
            return np.zeros((0, self.layout.size), np.float32)
        offset = first * self.layout.size * 4
        return np.memmap(self._path, np.float32, "r", offset=offset, shape=(count, self.layout.size))

    def _products(self, row: NDArray[np.float32], count: int, first: int = 0) -> Array:
        """Return the inner products of ``row`` with ``count`` gradients of the file, ``(L, count)``."""
        products = np.zeros((len(self.layout.sizes), count))
        step = max(1, _MAPPED // self.layout.size)
        for start in range(0, count, step):
            stop = min(start + step, count)
            earlier = self._map(first + start, stop - start)
            width = max(1, _BLOCK // (stop - start))
            for layer, (begin, end) in enumerate(zip(self._bounds, self._bounds[1:])):
                for left in range(begin, end, width):
                    right = min(left + width, end)
                    block = earlier[:, left:right].astype(np.float64)
                    products[layer, start:stop] += block @ row[left:right].astype(np.float64)
        return products

    def _grams(self) -> Array:
        """Return the Gram matrix of each parameter tensor, ``(L, T, T)``."""
        stack = np.zeros((len(self.layout.sizes), self.count, self.count))
        for t, row in enumerate(self._rows):
            stack[:, t, : t + 1] = stack[:, : t + 1, t] = row
        return stack

    def _analysis(self) -> tuple[Array, Array, Array]:
        """Return the Gram matrices, centred ones and products between the two, each ``(1 + L, T, T)``."""
        if self.count == 0:
            raise ValueError("No gradient was added yet: call `add` with that of each epoch first.")
        if self._analysed is None:
            layers, sums = self._grams(), np.stack(self._sums, 1)
            stack = np.concatenate((layers.sum(0, keepdims=True), layers))
            sums = np.concatenate((sums.sum(0, keepdims=True), sums))
            stack, sums = grams.with_momentum(stack, sums, self.momentum)
            sizes = np.array((self.layout.size, *self.layout.sizes), np.float64)
            self._analysed = (stack, *grams.centered(stack, sums, sizes, self.center))
        return self._analysed

    def _shares(self) -> Array:
        if self._explained is None:
            gram, centered, _ = self._analysis()
            self._explained = grams.explained(centered, gram)
        return self._explained


def check_analysis(center: Centering, momentum: float) -> None:
    """Refuse what ``GradientSpace`` cannot analyse by."""
    if center not in ("entries", "epochs", None):
        raise ValueError(f"`center` must be 'entries', 'epochs' or None, got {center!r}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must lie in [0, 1), got {momentum}: 0 takes the gradients as they are.")


def _index(layer: int | None) -> int:
    return 0 if layer is None else layer + 1
