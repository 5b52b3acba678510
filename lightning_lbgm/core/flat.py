"""Flat parameter vector: the trainable parameters of a module as M numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_lbgm.core.layout import Layout

__all__ = ["FlatParameters"]

_MAX_CACHED_VIEWS = 4


class FlatParameters:
    """Read and write a module's trainable parameters as one vector of shape ``(M,)``.

    The module's tensors stay its own (no storage is shared or replaced), so compiled modules, tied weights,
    memory formats and checkpoints are as they were. Only parameters with ``requires_grad`` take part: adapters
    on a frozen backbone are all that is trained, sent and counted. The vector is ``float32``, or ``float64`` if
    a parameter is; it lives on the parameters' device.

    Args:
        module: The module. Its set of trainable parameters is fixed here; see ``is_current``.
        apart: Called with a parameter's name and the parameter; those for which it is true are left out. None: none.

    Raises:
        ValueError: If nothing is trainable, or nothing is left, or a parameter is uninitialised, complex or on another
            device.

    Examples:
        >>> module = nn.Linear(2, 1)
        >>> flat = FlatParameters(module)
        >>> flat.num_parameters, flat.sizes
        (3, (2, 1))
        >>> flat.write(torch.tensor([1.0, 2.0, 3.0]))
        >>> module.weight.tolist(), flat.read().tolist()
        ([[1.0, 2.0]], [1.0, 2.0, 3.0])
    """

    def __init__(self, module: nn.Module, apart: Callable[[str, Tensor], bool] | None = None) -> None:
        self._apart = apart
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for name, parameter in trainable:
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"Parameter {name!r} is not initialised yet. Run one forward pass of the lazy module before `fit`."
                )
            if parameter.is_complex():
                raise ValueError(
                    f"Parameter {name!r} is complex ({parameter.dtype}): only real ones can be federated. Keep its real"
                    " and imaginary part in a real parameter, and take `torch.view_as_complex` of it."
                )
        if not trainable:
            raise ValueError("The module has no trainable parameter: set `requires_grad=True` on what is to be learnt.")
        named = trainable if apart is None else [(name, p) for name, p in trainable if not apart(name, p)]
        if not named:
            raise ValueError(
                f"All of its {len(trainable)} trainable parameters are personal, so nothing is left for clients to"
                " share: let `personal` match fewer of them."
            )
        self.names = tuple(name for name, _ in named)
        self.parameters = [parameter for _, parameter in named]
        self.layout = Layout(parameter.shape for parameter in self.parameters)
        self.sizes = self.layout.sizes
        self.num_parameters = sum(self.sizes)
        self.dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        devices = {parameter.device for parameter in self.parameters}
        if len(devices) > 1:
            raise ValueError(
                f"The trainable parameters lie on several devices: {sorted(map(str, devices))}. Leave the whole module"
                " to the Trainer, which moves it to one: a client is trained on one device."
            )
        self.device = devices.pop()
        self._dtypes = tuple(parameter.dtype for parameter in self.parameters)
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def is_current(self, module: nn.Module) -> bool:
        """Whether the module's trainable parameters are still the ones seen at construction, in dtype too."""
        if self._apart is None:
            trainable = [p for p in module.parameters() if p.requires_grad]
        else:
            trainable = [p for n, p in module.named_parameters() if p.requires_grad and not self._apart(n, p)]
        return len(trainable) == len(self.parameters) and all(
            new is old and new.dtype == dtype for new, old, dtype in zip(trainable, self.parameters, self._dtypes)
        )

    def empty(self) -> Tensor:
        """Allocate an uninitialised vector of shape ``(M,)``."""
        return torch.empty(self.num_parameters, dtype=self.dtype, device=self.device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector of shape ``(M,)`` into views with the parameters' shapes."""
        # The same few vectors come back for every client: theta, the update and the sum.
        known = self._views.get(id(vector))
        if known is None or known[0] is not vector:
            views = [part.view(p.shape) for part, p in zip(vector.split(self.sizes), self.parameters)]
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            known = self._views[id(vector)] = (vector, views)
        return known[1]

    @torch.no_grad()
    def read(self, out: Tensor | None = None) -> Tensor:
        """Copy the parameters into ``out``, or into a new vector."""
        out = self.empty() if out is None else out
        for view, parameter in zip(self.views(out), self.parameters):
            view.copy_(parameter)
        return out

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy a vector of shape ``(M,)`` into the parameters, in place."""
        for view, parameter in zip(self.views(vector), self.parameters):
            parameter.copy_(view)

    @torch.no_grad()
    def update_from(self, start_params: Tensor, out: Tensor) -> Tensor:
        """Write the client update ``start_params - local_params`` into ``out`` and return it.

        The sign makes the update a descent direction (a pseudo-gradient): with plain SGD it is the client learning
        rate times the sum of the local gradients.
        """
        for server, parameter, view in zip(self.views(start_params), self.parameters, self.views(out)):
            torch.sub(server, parameter, out=view)
        return out
