"""Layer recycling by the server (FedLUAR), a method to compare with.

Kim, Kang, Lee: "Layer-wise Update Aggregation with Recycling for Communication-Efficient Federated Learning" (FedLUAR),
NeurIPS 2025 (arXiv 2503.11146).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, RoundResult, Stage, State
from lightning_lbgm.core.layout import LayoutLike
from lightning_lbgm.core.numerics import is_safe
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, dtype_name, dtype_named

__all__ = ["LayerRecycling", "Omitted"]

_ALMOST_ZERO = 1e-100  # far from any ratio of norms of numbers between 1e-38 and 1e38


class Omitted(Payload):
    """A parameter tensor that is not sent: no bits. The server has a use for it of its own; it decodes to zeros.

    Args:
        decoded: Name of the dtype of the update, such as ``"float32"``.
        layout: The parameter tensor.
    """

    fields = ("decoded",)
    code = 10

    def __init__(self, decoded: str, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.decoded = decoded

    @property
    def dtype(self) -> torch.dtype:
        return dtype_named(self.decoded)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def dense(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype)

    def write(self, out: Writer) -> None:
        pass

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        return cls(dtype_name(data.dtype), (size,))


class LayerRecycling(Stage):
    """Leave out some layers, the same for all clients, for which the server repeats its last aggregated update.

    After each round the server draws ``num_layers`` parameter tensors without replacement, each with a probability
    proportional to ``|theta_l| / |update_l|``: those that the round moved least, compared with their size. In the next
    round no client sends them. Which ones is told with the global parameters (not counted).

    It stands last; what comes before it compresses the layers that are sent.

    Args:
        num_layers: Parameter tensors to leave out in each round after the first; fewer than there are.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is not positive; and in the first round, if there are no more tensors than that.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=20, uplink=[LayerRecycling(num_layers=2)])
    """

    terminal = True
    uses_mean = True

    def __init__(self, num_layers: int) -> None:
        self.num_layers = check_count("LayerRecycling", "num_layers", num_layers)

    def init_shared(self) -> State:
        """Make the state of a server that recycles nothing yet: the layers, and the last aggregated update."""
        return {"layers": [], "update": None}

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        self._check(update)
        recycled = context.shared.get("layers", [])
        if not recycled:
            return Encoded(update)
        decoded = dtype_name(update.dtype)
        parts = [
            Omitted(decoded, part.layout) if index in recycled else part for index, part in enumerate(update.split())
        ]
        return Encoded(Blocks(parts, update.layout))

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        recycled = context.shared.get("layers", [])
        if not recycled:
            return payload
        parts = payload.split()
        last = context.shared["update"].split([part.size for part in parts])
        if [index for index, part in enumerate(parts) if isinstance(part, Omitted)] != recycled:
            raise MessageError(f"The message leaves out other layers than {recycled}, which this round recycles.")
        repeated = [
            Dense(values, part.layout) if isinstance(part, Omitted) else part for part, values in zip(parts, last)
        ]
        return Blocks(repeated, payload.layout)

    def end_round(self, shared: State, result: RoundResult, context: Context = NO_CONTEXT) -> None:
        sizes = result.layout.sizes
        moved = torch.stack([_norm(part) for part in result.mean_update.split(sizes)])
        length = torch.stack([_norm(part) for part in result.server_params.split(sizes)])
        # A tensor that did not move is recycled for sure; one that is zero itself, as new biases are, last of all.
        weights = (length / moved.clamp(min=_ALMOST_ZERO)).clamp(_ALMOST_ZERO, 1 / _ALMOST_ZERO).cpu()
        drawn = torch.multinomial(weights, self.num_layers, generator=context.generator(weights.device))
        shared["layers"] = sorted(drawn.tolist())
        shared["update"] = result.mean_update.clone()

    def _check(self, update: Payload) -> None:
        if self.num_layers >= len(update.sizes):
            raise ValueError(
                f"`LayerRecycling(num_layers={self.num_layers})` must leave something to send: the module has"
                f" {len(update.sizes)} trainable parameter tensors."
            )


def _norm(part: Tensor) -> Tensor:
    """Return the L2 norm in ``float64``, shape ``()``."""
    norm = torch.linalg.vector_norm(part)
    size = float(norm)
    return norm.double() if is_safe(size * size) else torch.linalg.vector_norm(part, dtype=torch.float64)
