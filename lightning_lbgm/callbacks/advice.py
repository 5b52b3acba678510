"""Advice in the run: stages whose memory of a client ages, and look-back tests that recycle nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.reports.reports import ClientReport, RoundReport

__all__ = ["Advice", "keeps_memory"]

_RARE = 0.3  # share of the clients in a cohort below which a client's memory is old when its turn comes
_ROUNDS = 20  # without a test that recycled
_ABSENT = "fl/rounds_absent_mean"
_MISSING = ("availability", "deadline", "dropout")  # settings with which a client may miss a round of all


class Advice:
    """Measure how long clients were away, and say once a fit what the uplink suffers from.

    What it sees are the settings and the reports, which are the same in every process; the first one speaks.

    Attributes:
        last_rounds: The last round of each client that took part.
    """

    def __init__(self) -> None:
        self.last_rounds: dict[int, int] = {}
        self._is_partial = self._keeps_memory = self._said_of_look_back = False
        self._rounds = self._tests = 0  # since a test recycled
        self._errors = 0.0

    def begin(self, uplink: Chain, settings: Mapping[str, Any], anew: bool) -> None:
        """Start a fit; warn if cohorts are small and the uplink keeps a memory of each client.

        Args:
            uplink: The stages.
            settings: The federation's, resolved.
            anew: Whether it starts from the first round.
        """
        if anew:
            self.last_rounds = {}
        self._said_of_look_back = False
        self._reset()
        cohort_size, num_clients = settings["clients_per_round"], settings["num_clients"]
        missing = any(name in settings for name in _MISSING)
        self._is_partial, self._keeps_memory = missing or cohort_size < num_clients, keeps_memory(uplink)
        available = settings.get("availability")
        if isinstance(available, float):  # else unknown how many are
            cohort_size = min(cohort_size, max(1, round(available * num_clients)))
        if self._keeps_memory and cohort_size < _RARE * num_clients:
            stages = ", ".join(repr(stage) for stage in uplink.stages if keeps_memory(stage))
            rank_zero_warn(
                f"Cohorts of {cohort_size} of {num_clients} clients: a client's turn comes every"
                f" {num_clients / cohort_size:.3g} rounds in the mean, and what {stages} keeps of it is as old then."
                " Such memories age: with cohorts of 10 % up to 5 points of accuracy were lost. A stage that keeps"
                " nothing of a client, such as `Ternary()` or `QSGD(2)`, loses less."
                f" `{_ABSENT}` shows the rounds between two turns. See docs/choosing.md."
            )

    def observe(self, report: RoundReport) -> dict[str, float]:
        """Take a round; return its metrics, and warn if nothing was recycled for long."""
        absent = [
            report.round_index - last
            for client in report.clients
            if (last := self.last_rounds.get(client.client_id, report.round_index)) < report.round_index
        ]
        self._look_at_tests(report)
        self.last_rounds.update((client.client_id, report.round_index) for client in report.clients)
        if not (self._is_partial and self._keeps_memory):
            return {}
        return {_ABSENT: sum(absent) / len(absent) if absent else math.nan}

    def state_dict(self) -> dict[str, Any]:
        """Return the clients' last rounds if they differ, for checkpoints."""
        return {"last_rounds": dict(self.last_rounds)} if self._is_partial and self._keeps_memory else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; checkpoints of earlier versions have nothing."""
        self.last_rounds = dict(state.get("last_rounds", {}))

    def _reset(self) -> None:
        self._rounds = self._tests = 0
        self._errors = 0.0

    def _look_at_tests(self, report: RoundReport) -> None:
        """Count the rounds in which clients with a look-back gradient were tested and none was recycled."""
        if report.recycled_fraction > 0 or report.threshold == 0:  # 0 asks for it
            self._reset()
            return
        errors = [error for client in report.clients if self._has_been_here(client) for error in _errors_of(client)]
        if not errors:
            return
        self._rounds += 1
        self._tests += len(errors)
        self._errors += sum(errors)
        if self._rounds < _ROUNDS or self._said_of_look_back:
            return
        self._said_of_look_back = True
        rank_zero_warn(
            f"Round {report.round_index}: `LookBack` has recycled nothing for {self._rounds} rounds. The LBP error"
            f" (squared sine of the angle to earlier updates) was {self._errors / self._tests:.2g} in the mean, the"
            f" threshold is {report.threshold:.2g}: every update goes in full. What helps: a higher threshold inside"
            " `ErrorFeedback`, with several look-back gradients by row, as `ErrorFeedback(LookBack(0.9, rank=8,"
            " rowwise=True))`; more local steps or larger batches, whose updates keep their direction; or another"
            " stage. See docs/choosing.md."
        )

    def _has_been_here(self, client: ClientReport) -> bool:
        return client.client_id in self.last_rounds


def keeps_memory(stage: Stage) -> bool:
    """Whether a stage, or one inside it, keeps something of each client between its turns.

    Examples:
        >>> from lightning_lbgm import ErrorFeedback, QSGD, TopK
        >>> keeps_memory(ErrorFeedback(TopK(0.1))), keeps_memory(QSGD(4))
        (True, False)
    """
    return _is_more_than_chains(stage.init())


def _is_more_than_chains(state: Mapping[str, Any]) -> bool:
    """Whether a state has anything else than the states of chains whose stages keep nothing."""
    if _is_of_chain(state):
        return any(map(_is_more_than_chains, state["stages"]))
    return any(not _is_of_chain(value) or _is_more_than_chains(value) for value in state.values())


def _is_of_chain(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"stages"}


def _errors_of(client: ClientReport) -> tuple[float, ...]:
    """Return the errors of a client's look-back tests; none if it was not tested."""
    decision = client.decision
    return decision.errors if decision is not None and decision.recycled else ()
