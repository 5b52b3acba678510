"""Server step: aggregation of decoded updates, and the server optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.payloads.base import Payload, inner
from lightning_lbgm.server.aggregation import Aggregator, Ranks, WeightedMean

__all__ = ["Server", "ServerOptimizer"]

ServerOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes the server optimizer from the parameters, such as ``functools.partial(torch.optim.Adam, lr=0.01)``."""


class Server:
    """Aggregate the clients' updates as they arrive, then step the global parameters along the aggregate.

    With the weighted mean it holds three vectors of shape ``(M,)``, whatever the number of clients: the global
    parameters (theta), those before the last step, and the running sum. The aggregate is the gradient of the server
    optimizer; ``SGD(lr=1)`` makes it FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629), another one FedOpt (Reddi
    et al., ICLR 2021, arXiv 2003.00295).

    Args:
        flat: The parameters.
        make_optimizer: Called with one ``nn.Parameter`` for each trainable tensor, in the module's order and shape.
            None: ``SGD(lr=1)``.
        aggregation: The aggregation rule, which is copied. None: ``WeightedMean()``.
    """

    def __init__(
        self,
        flat: FlatParameters,
        make_optimizer: ServerOptimizer | None = None,
        aggregation: Aggregator | None = None,
    ) -> None:
        self.flat = flat
        self.server_params = flat.read()
        self.aggregator = WeightedMean() if aggregation is None else copy.deepcopy(aggregation)
        self._mean_update: Tensor | None = None
        self._is_finished = False
        self._before = torch.empty_like(self.server_params)  # theta before the step, to take it back
        self._optimizer_before: dict[Any, Any] | None = None
        self._total_weight = 0.0
        self._parameters = [nn.Parameter(view) for view in flat.views(self.server_params)]
        self.optimizer = (make_optimizer or _fedavg)(self._parameters)
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`server_optimizer` must be a callable that takes parameters and returns a `torch.optim.Optimizer`,"
                f" such as `lambda params: torch.optim.Adam(params, lr=0.01)`; it returned {self.optimizer!r}."
            )

    @property
    def total_weight(self) -> float:
        """Weight of the updates received in this round, 1 if no client was left out."""
        return self._total_weight

    def begin_round(self, cohort_size: int) -> None:
        """Take the module's parameters as the global ones, for callbacks may have changed them, and start a round."""
        self.flat.read(self.server_params)
        self.aggregator.begin(self.server_params, cohort_size)
        self._optimizer_before = None
        self._total_weight = 0.0
        self._mean_update, self._is_finished = None, False

    def receive(self, update: Payload, weight: float) -> None:
        """Take a decoded update with its client's weight omega_k, which sum to 1 over the cohort."""
        self.aggregator.receive(update, weight)
        self._total_weight += weight

    def merge(self, ranks: Ranks, weights: Sequence[float]) -> None:
        """Put together what several processes have received.

        Args:
            ranks: The processes.
            weights: The weight of each update received anywhere, in the same order in each process.
        """
        self.aggregator.merge(ranks, weights)
        self._total_weight = sum(weights)

    @torch.no_grad()
    def finish(self) -> Tensor | None:
        """Return the aggregated update, shape ``(M,)``, valid until the next round; None if none was received.

        The first call in a round finishes the aggregation.
        """
        if not self._is_finished:
            self._mean_update, self._is_finished = self.aggregator.finish(), True
        return self._mean_update

    @torch.no_grad()
    def step(self) -> float:
        """Make the server's step along ``finish`` and write the global parameters into the module.

        If no update was received, the parameters stay.

        Returns:
            The L2 norm of the aggregated update.
        """
        norm, mean = 0.0, self.finish()
        if mean is not None:
            norm = inner(mean, mean) ** 0.5
            self._before.copy_(self.server_params)
            self._optimizer_before = {key: copy.deepcopy(entry) for key, entry in self.optimizer.state.items()}
            for parameter, gradient in zip(self._parameters, self.flat.views(mean)):
                parameter.grad = gradient
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
