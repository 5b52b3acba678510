"""DIANA: compressed differences to a running mean of what the client has sent.

Mishchenko, Gorbunov, Takac, Richtarik: "Distributed Learning with Compressed Gradient Differences" (DIANA), 2019
(arXiv 1901.09269); inside ``ErrorFeedback`` it is EC-DIANA of Gorbunov, Kovalev, Makarenko, Richtarik: "Linearly
Converging Error Compensated SGD", NeurIPS 2020 (arXiv 2010.12292).
"""

from __future__ import annotations

import torch

from lightning_lbgm.compression.chain import inner_chain
from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, RoundResult, Stage, State
from lightning_lbgm.core.validation import check_fraction
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.coefficients import Combination

__all__ = ["DIANA"]


class DIANA(Stage):
    """Compress the difference between the update and a running mean of what the server has reconstructed of the client.

    Both ends keep the mean ``h``, one vector of M numbers. For a new update ``g`` the client sends
    ``c = correction(g - h)``; the server uses ``h + c``, and both set ``h <- h + rate * c``. It costs no bit more than
    the correction alone. Where clients differ, their updates have a mean that lasts, and the correction need not send
    it again and again. Wrap it in ``ErrorFeedback`` unless the correction is unbiased.

    Args:
        correction: Stage, or list of stages, for the difference, such as ``TopK(0.02)``.
        rate: How much of the difference the mean takes in, in (0, 1]: about one over the rounds that it remembers.
            Inside ``ErrorFeedback`` keep it small: what was kept back and is sent now should not be foretold again.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``rate`` is outside (0, 1].

    Examples:
        >>> from lightning_lbgm import TopK
        >>> stage = DIANA(TopK(0.5), rate=0.5)
        >>> state = stage.init()
        >>> updates = [torch.tensor([4.0, 2.0])] * 3
        >>> [stage.encode(Dense(g), state).decoded.dense().tolist() for g in updates]
        [[4.0, 0.0], [4.0, 2.0], [4.0, 2.0]]
    """

    terminal = True

    def __init__(self, correction: Stage | list[Stage], rate: float = 0.05) -> None:
        self.correction = inner_chain("DIANA", "correction", correction)
        self.rate = check_fraction("DIANA", "rate", rate)

    def init(self) -> State:
        """Make the state of a client that has sent nothing: the mean ``(M,)`` is made at its first update."""
        return {"mean": None, "rate": 1.0, "correction": self.correction.init()}

    def init_shared(self) -> State:
        return self.correction.init_shared()

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        mean = state["mean"]
        difference = update.dense() if mean is None else update.dense() - mean
        step = self.correction.encode(Dense(difference, update.layout), state["correction"], context)
        # The difference is not needed any more, unless what is sent lies in its memory.
        used = mean is None or step.shares_memory(difference)
        self._advance(step.decoded, state, None if used else difference)
        total = self._total(step.decoded, state)
        return Encoded(step.payload, step.decision, lambda _: total, needs_state=mean is not None, updates_state=True)

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        correction = self.correction.decode(payload, state["correction"], context)
        self._advance(correction, state)
        return self._total(correction, state)

    def forget(self, state: State) -> None:
        state["mean"], state["rate"] = None, 1.0
        self.correction.forget(state["correction"])

    def end_round(self, shared: State, result: RoundResult, context: Context = NO_CONTEXT) -> None:
        self.correction.end_round(shared, result, context)

    def _advance(self, correction: Payload, state: State, memory: torch.Tensor | None = None) -> None:
        """Move the mean, into ``memory`` if it is given; the first message is the mean."""
        if state["mean"] is None:
            state["mean"] = correction.dense().clone()
            state["rate"] = 1.0
        else:
            # A new tensor: a round that breaks off puts the old one in its place.
            mean = state["mean"].clone() if memory is None else memory.copy_(state["mean"])
            correction.add_to(mean, self.rate)
            state["mean"] = mean
            state["rate"] = self.rate

    @staticmethod
    def _total(correction: Payload, state: State) -> Payload:
        """Return what the mean was, plus the correction, from what the mean is now."""
        mean: torch.Tensor = state["mean"]
        return Combination([Dense(mean, correction.layout), correction], [1.0, 1.0 - state["rate"]])
