"""The server: a streamed weighted mean of decoded updates, and the server optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.payloads.base import Payload, inner

__all__ = ["Server", "ServerOptimizer"]

ServerOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes the server optimizer from the parameters, such as ``functools.partial(torch.optim.Adam, lr=0.01)``."""


class Server:
    """Average the clients' updates as they arrive, then step the global parameters along the average.

    It holds three vectors of shape ``(M,)``, whatever the number of clients: the global parameters (theta), those
    before the last step, and the running sum. The average is the gradient of the server optimizer; ``SGD(lr=1)`` makes
    it FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629), another one FedOpt (Reddi et al., ICLR 2021, arXiv
    2003.00295).

    Args:
        flat: The parameters.
        make_optimizer: Called with one ``nn.Parameter`` for each trainable tensor, in the module's order and shape.
            None: ``SGD(lr=1)``.
    """

    def __init__(self, flat: FlatParameters, make_optimizer: ServerOptimizer | None = None) -> None:
        self.flat = flat
        self.server_params = flat.read()
        self._sum = torch.zeros_like(self.server_params)
        self._before = torch.empty_like(self.server_params)  # theta before the step, to take it back
        self._optimizer_before: dict[Any, Any] | None = None
        self._total_weight = 0.0
        self._num_received = 0
        parameters = [nn.Parameter(view) for view in flat.views(self.server_params)]
        for parameter, gradient in zip(parameters, flat.views(self._sum)):
            parameter.grad = gradient
        self.optimizer = (make_optimizer or _fedavg)(parameters)
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`server_optimizer` must be a callable that takes parameters and returns a `torch.optim.Optimizer`,"
                f" such as `lambda params: torch.optim.Adam(params, lr=0.01)`; it returned {self.optimizer!r}."
            )

    @property
    def total_weight(self) -> float:
        """Weight of the updates received in this round, 1 where no client was left out."""
        return self._total_weight

    def begin_round(self) -> None:
        """Take the module's parameters as the global ones, for callbacks may have changed them, and clear the sum."""
        self.flat.read(self.server_params)
        self._sum.zero_()
        self._optimizer_before = None
        self._total_weight = 0.0
        self._num_received = 0

    def receive(self, update: Payload, weight: float) -> None:
        """Add a decoded update with its client's weight omega_k, which sum to 1 over the cohort."""
        update.add_to(self._sum, weight)
        self._total_weight += weight
        self._num_received += 1

    def combine(self, weights: Iterable[float], all_reduce_sum: Callable[[Tensor], None]) -> None:
        """Add up what several processes have received.

        Args:
            weights: The weight of each update received anywhere, in the same order in each process.
            all_reduce_sum: Replaces a tensor by its sum over the processes.
        """
        weights = list(weights)
        all_reduce_sum(self._sum)
        self._total_weight, self._num_received = sum(weights), len(weights)

    @torch.no_grad()
    def mean_update(self, cohort_size: int) -> Tensor | None:
        """Finish the average and return it, shape ``(M,)``, valid until the next round; None where none was received.

        Weights renormalise where fewer than ``cohort_size`` updates were received.
        """
        if self._total_weight <= 0:
            return None
        if self._num_received < cohort_size:
            self._sum.div_(self._total_weight)
            self._num_received = cohort_size
        return self._sum

    @torch.no_grad()
    def step(self, cohort_size: int) -> float:
        """Make the server's step along ``mean_update`` and write the global parameters into the module.

        Where no update was received, the parameters stay.

        Returns:
            The L2 norm of the average update.
        """
        norm = 0.0
        mean = self.mean_update(cohort_size)
        if mean is not None:
            norm = inner(mean, mean) ** 0.5
            self._before.copy_(self.server_params)
            self._optimizer_before = {key: copy.deepcopy(entry) for key, entry in self.optimizer.state.items()}
            self.optimizer.step()
        self.flat.write(self.server_params)
        return norm

    @torch.no_grad()
    def undo(self) -> None:
        """Take the round back: the global parameters are as before it, here and in the module."""
        if self._optimizer_before is not None:
            self.server_params.copy_(self._before)
            self.optimizer.state.clear()
            self.optimizer.state.update(self._optimizer_before)
            self._optimizer_before = None
        self.flat.write(self.server_params)

    def state_dict(self) -> dict[str, Any]:
        """Return the server optimizer's state; the parameters are the module's."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the server optimizer's state."""
        self.optimizer.load_state_dict(state["optimizer"])


def _fedavg(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)
