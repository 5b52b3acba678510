"""Error feedback: the residual that a stage did not send is added to the client's next update.

Seide, Fu, Droppo, Li, Yu: "1-bit stochastic gradient descent and its application to data-parallel distributed training
of speech DNNs", Interspeech 2014; Karimireddy et al., ICML 2019 (arXiv 1901.09847).
"""

from __future__ import annotations

from lightning_lbgm.compression.chain import inner_chain
from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, RoundResult, Stage, State
from lightning_lbgm.payloads.base import Dense, Payload

__all__ = ["ErrorFeedback"]


class ErrorFeedback(Stage):
    """Keep the residual of a stage, or of a chain of stages, and add it to the client's next update.

    With residual ``e`` and update ``g``: ``p = g + e`` is encoded, and ``e <- p - decode(encode(p))``. Around
    ``LookBack`` the residual is ``p - rho * l`` if recycled and zero if refreshed.

    Args:
        stage: What to wrap, such as ``TopK(0.01)``, ``LookBack(0.7)`` or ``[TopK(0.1), LookBack(0.2)]``.

    Raises:
        TypeError: If it is not a stage or a list of stages.

    Examples:
        >>> import torch
        >>> from lightning_lbgm import TopK
        >>> stage = ErrorFeedback(TopK(0.5))
        >>> state = stage.init()
        >>> [stage.encode(Dense(torch.tensor([3.0, 2.0])), state).payload.dense().tolist() for _ in range(2)]
        [[3.0, 0.0], [0.0, 4.0]]
    """

    def __init__(self, stage: Stage | list[Stage]) -> None:
        self.stage = inner_chain("ErrorFeedback", "stage", stage, whole=True)
        self.terminal = self.stage.terminal
        self.uses_mean = self.stage.uses_mean

    def init(self) -> State:
        """Make the state of a client with nothing left to send: the residual ``(M,)`` is made at its first update."""
        return {"residual": None, "stage": self.stage.init()}

    def init_shared(self) -> State:
        return self.stage.init_shared()

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        residual = state["residual"]
        values = update.dense() if residual is None else update.dense() + residual
        encoded = self.stage.encode(Dense(values, update.layout), state["stage"], context)
        # A new tensor: a round that breaks off is taken back by putting the old one in its place. The sum is new too,
        # and becomes the residual unless what is sent lies in its memory.
        if residual is None or encoded.shares_memory(values):
            values = values.clone()
        encoded.decoded.add_to(values, -1.0)
        state["residual"] = values
        return encoded

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        return self.stage.decode(payload, state["stage"], context)

    @property
    def decodes(self) -> bool:
        return self.stage.decodes

    def forget(self, state: State) -> None:
        # The residual stays: it is the client's alone.
        self.stage.forget(state["stage"])

    def end_round(self, shared: State, result: RoundResult, context: Context = NO_CONTEXT) -> None:
        self.stage.end_round(shared, result, context)

    def __repr__(self) -> str:
        inner = self.stage.stages
        return f"ErrorFeedback({inner[0] if len(inner) == 1 else inner!r})"
