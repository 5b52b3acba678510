"""Local objectives: what a client minimises besides the loss of its training step."""

from lightning_lbgm.clients.objectives.base import LocalObjective, ObjectiveState, SharedObjective
from lightning_lbgm.clients.objectives.feddyn import FedDyn
from lightning_lbgm.clients.objectives.fedprox import FedProx
from lightning_lbgm.clients.objectives.scaffold import SCAFFOLD

__all__ = ["SCAFFOLD", "FedDyn", "FedProx", "LocalObjective", "ObjectiveState", "SharedObjective"]
