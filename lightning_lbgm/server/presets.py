"""Server optimizers by their names in the literature: FedAvgM, FedAdam and FedYogi."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from lightning_lbgm.core.describe import describe_call

__all__ = ["AdaptiveServer", "FedAdam", "FedAvgM", "FedYogi", "ServerAdam", "ServerPreset", "ServerYogi"]


class ServerPreset(ABC):
    """A server optimizer by name and arguments, for ``server_optimizer`` and for configs of a LightningCLI."""

    @abstractmethod
    def __call__(self, params: Iterable[Parameter]) -> Optimizer:
        """Make the optimizer of the global parameters."""

    def __repr__(self) -> str:
        """Show the constructor call."""
        return describe_call(self)


class FedAvgM(ServerPreset):
    """SGD with momentum on the server, for ``server_optimizer``.

    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
    arXiv 1909.06335: ``v = momentum * v + update``, ``w = w - lr * v``. It makes a ``torch.optim.SGD``.

    Args:
        lr: Learning rate of the server, 1 as in FedAvg.
        momentum: In [0, 1), 0.9 as in the paper, which tries 0 to 0.997.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=100, server_optimizer=FedAvgM(momentum=0.9))
        >>> FedAvgM(momentum=0.5)
        FedAvgM(lr=1.0, momentum=0.5)
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.9) -> None:
        self.lr = _positive("FedAvgM", "lr", lr)
        self.momentum = _share("FedAvgM", "momentum", momentum)

    def __call__(self, params: Iterable[Parameter]) -> Optimizer:
        return SGD(params, lr=self.lr, momentum=self.momentum)


class _Adaptive(ServerPreset):
    """Arguments of FedAdam and FedYogi, and the optimizer of them."""

    _make: Callable[..., Optimizer]

    def __init__(self, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3) -> None:
        name = type(self).__name__
        self.lr = _positive(name, "lr", lr)
        self.eps = _positive(name, "eps", eps)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"`{name}(betas=...)` must be two numbers such as (0.9, 0.99); got {betas!r}.")
        self.betas = (_share(name, "betas", betas[0]), _share(name, "betas", betas[1]))

    def __call__(self, params: Iterable[Parameter]) -> Optimizer:
        return type(self)._make(params, lr=self.lr, betas=self.betas, eps=self.eps)


class AdaptiveServer(Optimizer, ABC):
    """What the adaptive server optimizers of Reddi et al. have in common.

    Args:
        params: The parameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: The paper's tau.
    """

    def __init__(
        self, params: Iterable[Parameter], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make a step along the parameters' ``grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta, decay), eps = group["betas"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["first"] = torch.zeros_like(parameter)
                    state["second"] = torch.full_like(parameter, eps * eps)
                first, second = state["first"], state["second"]
                first.lerp_(parameter.grad, 1 - beta)
                self._update_second(second, parameter.grad.square(), decay)
                parameter.addcdiv_(first, second.sqrt().add_(eps), value=-float(group["lr"]))
        return loss

    @abstractmethod
    def _update_second(self, second: Tensor, square: Tensor, decay: float) -> None:
        """Bring the second moment up to date, in place."""


class ServerAdam(AdaptiveServer):
    """The optimizer of ``FedAdam``."""

    def _update_second(self, second: Tensor, square: Tensor, decay: float) -> None:
        second.lerp_(square, 1 - decay)


class ServerYogi(AdaptiveServer):
    """The optimizer of ``FedYogi``."""

    def _update_second(self, second: Tensor, square: Tensor, decay: float) -> None:
        second.addcmul_(square, torch.sign(second - square), value=decay - 1)


class FedAdam(_Adaptive):
    """Adam on the server, as its paper has it, for ``server_optimizer``.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2:
    ``m = beta_1 m + (1 - beta_1) update``, ``v = beta_2 v + (1 - beta_2) update^2``,
    ``w = w - lr m / (sqrt(v) + eps)``, with ``v = eps^2`` before the first round. Unlike ``torch.optim.Adam`` it does
    not correct the bias of ``m`` and ``v``, ``v`` does not start at 0, and the defaults are others.

    Args:
        lr: Learning rate of the server, about how far a parameter moves in a round. The paper tunes it for each task,
            in powers of ten and their halves; so should you.
        betas: Decay of ``m`` and ``v``, each in [0, 1); the default is the paper's.
        eps: The paper's tau, how adaptive it is: large for less. The default is the paper's.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=100, server_optimizer=FedAdam(lr=0.01))
        >>> FedAdam()
        FedAdam(lr=0.01, betas=(0.9, 0.99), eps=0.001)
    """

    _make = ServerAdam


class FedYogi(_Adaptive):
    """Yogi on the server, for ``server_optimizer``: like ``FedAdam``, but ``v`` changes by steps of bounded size.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2:
    ``v = v - (1 - beta_2) update^2 sign(v - update^2)``; all else is as in ``FedAdam``. So rare large updates are not
    forgotten as fast.

    Args:
        lr: Learning rate of the server, see ``FedAdam``.
        betas: Decay of ``m`` and ``v``, each in [0, 1); the default is the paper's.
        eps: The paper's tau. The default is the paper's.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=100, server_optimizer=FedYogi(lr=0.01))
    """

    _make = ServerYogi


def _positive(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{owner}({name}=...)` must be a finite number above 0; got {value!r}.")
    return float(value)


def _share(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"`{owner}({name}=...)` must be in [0, 1), such as 0.9; got {value!r}.")
    return float(value)
