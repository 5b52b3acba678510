"""Settings of a federation: validated, described for loggers, and identified for checkpoints, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_lbgm.clients.objectives import LocalObjective
from lightning_lbgm.clients.personal import Personal
from lightning_lbgm.compression.chain import Chain, as_chain
from lightning_lbgm.compression.methods.lookback import LookBack
from lightning_lbgm.core.describe import describe, describe_optimizer
from lightning_lbgm.core.validation import class_hint
from lightning_lbgm.data.cohort import resolve_cohort_size
from lightning_lbgm.data.feed import Feed
from lightning_lbgm.data.participation import Participation
from lightning_lbgm.data.partitioners import IIDPartitioner, Partitioner
from lightning_lbgm.network import NetworkClock
from lightning_lbgm.server.aggregation import Aggregator
from lightning_lbgm.server.presets import ServerPreset
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.identity import identify, identify_optimizer

__all__ = ["Settings", "describe_changes"]


@dataclass(frozen=True)
class Settings:
    """The arguments of ``LBGMFederated``, which documents them.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range, or two exclude each other.
    """

    num_clients: int | None
    uplink: Chain
    downlink: Chain
    partitioner: Partitioner | None = None
    clients_per_round: int | float | None = None
    local_epochs: int | None = None
    local_steps: int | None = None
    server_optimizer: Callable[[Iterable[Parameter]], Optimizer] | None = None
    weighting: Literal["examples", "uniform"] = "examples"
    buffers: Literal["average", "server", "client"] = "average"
    rounds_per_epoch: int = 1
    seed: int | None = None
    execution: Literal["sequential", "vectorized", "auto"] = "auto"
    vectorized_chunk: int | None = None
    aggregation: Aggregator | None = None
    objective: LocalObjective | None = None
    client_store: str = "memory"
    client_capacity: int | None = None
    personal: Personal | None = None
    participation: Participation = field(default_factory=Participation)
    network: NetworkClock | None = None

    def __post_init__(self) -> None:
        _check_clients(self)
        _check_local_work(self)
        _check_server(self)
        _check_execution(self)
        cohort_size = resolve_cohort_size(self.num_clients, self.clients_per_round)
        self.participation.check_size(cohort_size, self.num_clients)

    @property
    def epochs(self) -> int | None:
        """Passes of a client over its examples in a round; None if its steps are counted."""
        return self.local_epochs or (1 if self.local_steps is None else None)

    @property
    def store(self) -> str:
        """Where clients' states are kept; a stage may still name it."""
        return self.client_store if self.client_store != "memory" else self.uplink.store

    @property
    def capacity(self) -> int | None:
        """Clients of which both ends remember what was sent; a stage may still name it."""
        return self.client_capacity or self.uplink.capacity

    def split(self, feed: Feed | None = None) -> Partitioner | str:
        """Return the partitioner, or in words that each client has a loader of its own.

        Args:
            feed: The feed, once there is one: a list of loaders may be as long as ``num_clients``.
        """
        if self.num_clients is None or (feed is not None and feed.client_names is not None):
            return "a loader for each client"
        return self.partitioner or IIDPartitioner()

    def describe(self, feed: Feed | None, federation: Federation | None, seed: int) -> dict[str, Any]:
        """Return the resolved settings as plain values, for loggers."""
        num_clients = self.num_clients if feed is None else feed.num_clients
        described: dict[str, Any] = {
            "num_clients": num_clients,
            "partitioner": str(self.split(feed)),
            "uplink": repr(self.uplink),
            "clients_per_round": resolve_cohort_size(num_clients, self.clients_per_round),
            "local_epochs": self.epochs,
            "local_steps": self.local_steps,
            "server_optimizer": self._describe_server_optimizer(federation),
            "weighting": self.weighting,
            "buffers": self.buffers,
            "rounds_per_epoch": self.rounds_per_epoch,
            "seed": seed,
            "execution": self.execution,
            "vectorized_chunk": self.vectorized_chunk,
        }
        if self.downlink.stages:
            described["downlink"] = repr(self.downlink)
        if self.aggregation is not None:
            described["aggregation"] = repr(self.aggregation)
        if self.objective is not None:
            described["objective"] = describe(self.objective)
        if self.client_store != "memory":
            described["client_store"] = self.client_store
        if self.client_capacity is not None:
            described["client_capacity"] = self.client_capacity
        if self.personal is not None:
            described.update(self.personal.describe())
        described.update(self.participation.describe())
        if self.network is not None:
            described["network"] = repr(self.network)
        if federation is not None:
            described["num_parameters"] = federation.flat.num_parameters
        return described

    def _describe_server_optimizer(self, federation: Federation | None) -> str:
        if federation is not None:
            return describe_optimizer(federation.server.optimizer)
        return describe(self.server_optimizer) if self.server_optimizer else "SGD(lr=1.0)"

    def identify(self, federation: Federation, feed: Feed, version: int) -> dict[str, Any]:
        """Return what must agree for a checkpoint's clients to be this federation's, as values that can be compared.

        ``server_lr`` may differ: the new one holds. Call it before the first round: stages and optimizers are described
        as they were made.

        Args:
            federation: The federation.
            feed: Its clients' data.
            version: Format of the checkpoint; that of 0 had representations.
        """
        optimizer, partitioner = federation.server.optimizer, self.split(feed)
        identity: dict[str, Any] = {
            "num_clients": feed.num_clients,
            "seed": federation.seed,
            "num_parameters": federation.flat.num_parameters,
        }
        if version == 0:
            reprs = {"partitioner": repr(partitioner), "uplink": repr(self.uplink.without_store())}
            return {**identity, **reprs, "server_optimizer": type(optimizer).__name__, "partition": feed.fingerprint()}
        if self.objective is not None:  # no mark otherwise, as in the checkpoints of earlier versions
            identity["objective"] = identify(self.objective)
        if self.downlink.stages:
            identity["downlink"] = identify(self.downlink)
        if self.personal is not None:
            identity["personal"] = identify(self.personal.identity)
        return {
            **identity,
            "partitioner": identify(partitioner),
            "partition": feed.fingerprint(),
            "uplink": identify(self.uplink),
            "buffers": self.buffers,
            "server_optimizer": identify_optimizer(optimizer),
            "server_lr": [identify(group.get("lr")) for group in optimizer.param_groups],
        }


def describe_changes(settings: dict[str, Any]) -> str:
    """Show M and the resolved settings that are not the defaults, in the way of the constructor call."""
    defaults = {
        "partitioner": repr(IIDPartitioner()),
        "uplink": repr(as_chain(LookBack(threshold=0.2))),
        "clients_per_round": settings["num_clients"],
        "local_epochs": 1,
        "server_optimizer": "SGD(lr=1.0)",
        "weighting": "examples",
        "buffers": "average",
        "rounds_per_epoch": 1,
        "execution": "auto",
        "num_parameters": settings["num_parameters"],
    }
    shown = {name: v for name, v in settings.items() if v is not None and v != defaults.get(name)}
    call = ", ".join(f"{name}={value}" for name, value in shown.items())
    return f"{settings['num_parameters']:,} parameters, {call}"


def _check_clients(settings: Settings) -> None:
    num_clients, partitioner = settings.num_clients, settings.partitioner
    if num_clients is not None:
        _check_positive("num_clients", num_clients)
    elif partitioner is not None:
        raise ValueError(
            f"`num_clients=None` takes each training loader as one client, so that nothing is dealt, but"
            f" `partitioner={partitioner!r}` deals the examples of one loader. Pass one of them: `num_clients=...` with"
            " the partitioner, or no partitioner."
        )
    if partitioner is not None and not isinstance(partitioner, Partitioner):
        raise TypeError(
            f"`partitioner` must be a `Partitioner` such as `PathologicalPartitioner(3)`; got {partitioner!r}."
        )
    _check_positive("client_capacity", settings.client_capacity, optional=True)
    if not isinstance(settings.client_store, str) or not settings.client_store:
        raise TypeError(f"`client_store` must be 'memory' or a directory; got {settings.client_store!r}.")


def _check_local_work(settings: Settings) -> None:
    local_epochs, local_steps, seed = settings.local_epochs, settings.local_steps, settings.seed
    _check_positive("rounds_per_epoch", settings.rounds_per_epoch)
    _check_positive("local_epochs", local_epochs, optional=True)
    _check_positive("local_steps", local_steps, optional=True)
    if local_epochs is not None and local_steps is not None:
        raise ValueError(
            f"`local_epochs={local_epochs}` and `local_steps={local_steps}` both say how long a client trains in a"
            " round: pass one of them."
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"`seed` must be an int or None; got {seed!r}.")


def _check_server(settings: Settings) -> None:
    optimizer, aggregation = settings.server_optimizer, settings.aggregation
    hint = class_hint(optimizer, ServerPreset)
    if optimizer is not None and (isinstance(optimizer, Optimizer) or not callable(optimizer) or hint):
        raise TypeError(
            "`server_optimizer` must be a callable that takes parameters and returns a `torch.optim.Optimizer`,"
            f" such as `lambda params: torch.optim.Adam(params, lr=0.01)`; got {optimizer!r}.{hint}"
        )
    if aggregation is not None and not isinstance(aggregation, Aggregator):
        raise TypeError(
            f"`aggregation` must be an `Aggregator` such as `WeightedMean()`; got {aggregation!r}."
            f"{class_hint(aggregation, Aggregator)}"
        )
    if settings.objective is not None and not isinstance(settings.objective, LocalObjective):
        raise TypeError(
            f"`objective` must be a `LocalObjective` such as `FedProx(mu=0.1)`, or None; got {settings.objective!r}."
            f"{class_hint(settings.objective, LocalObjective)}"
        )
    _check_choice("weighting", settings.weighting, ("examples", "uniform"))
    _check_choice("buffers", settings.buffers, ("average", "server", "client"))


def _check_execution(settings: Settings) -> None:
    _check_choice("execution", settings.execution, ("sequential", "vectorized", "auto"))
    _check_positive("vectorized_chunk", settings.vectorized_chunk, optional=True)


def _check_positive(name: str, value: Any, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"`{name}` must be {', '.join(others)} or {last}; got {value!r}.")
