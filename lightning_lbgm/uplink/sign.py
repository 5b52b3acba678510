"""Sign compression.

Bernstein, Wang, Azizzadenesheli, Anandkumar: "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018
(arXiv 1802.04434); the scale is that of Karimireddy, Rebjock, Stich, Jaggi: "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", ICML 2019 (arXiv 1901.09847).
"""

from __future__ import annotations

from lightning_lbgm.uplink.payload import Payload, Signs
from lightning_lbgm.uplink.stage import Encoded, Stage, State

__all__ = ["SignSGD"]


class SignSGD(Stage):
    """Send one bit for each entry, its sign, and one scale: the mean magnitude of the update.

    The update decodes to ``(|g|_1 / M) * sign(g)``, with zero counted as positive; so the server needs no step size of
    its own. ``8 * ceil(M / 8)`` bits and the scale's 32 are sent. It is biased: wrap it in
    ``ErrorFeedback``.

    Examples:
        >>> import torch
        >>> from lightning_lbgm.uplink import Dense
        >>> payload, _ = SignSGD().encode(Dense(torch.tensor([1.0, -2.0, 6.0])), {})
        >>> payload.dense().tolist(), payload.num_bits
        ([3.0, -3.0, 3.0], 40)
    """

    def encode(self, update: Payload, state: State) -> Encoded:
        values = update.dense()
        return Encoded(Signs.pack(values, values.abs().mean(), update.sizes))
