"""Participation: who is available in a round, who of them is chosen, and whose update arrives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from lightning_lbgm.data.availability import as_availability
from lightning_lbgm.data.chance import client_chances
from lightning_lbgm.data.cohort import sample_cohort
from lightning_lbgm.data.dropout import as_dropout
from lightning_lbgm.data.feed import Feed
from lightning_lbgm.data.samplers import Draw, SamplerState, UniformSampler, as_sampler
from lightning_lbgm.network import NetworkClock, Plan, parse_seconds

__all__ = ["Participation", "Turnout", "time_needed"]


@dataclass(frozen=True)
class Turnout:
    """Who takes part in a round, each in increasing order.

    Attributes:
        cohort: Clients whose updates are due: they are trained.
        dropped: Clients that get the model, and whose update does not count or never arrives.
        unreached: Clients that were chosen and do not get the model.
        num_available: Clients that could have been chosen; None if that was not asked, because nobody can be missing.
        waits_until: The deadline in seconds, if the server waits until then for somebody who got the model; else 0.
    """

    cohort: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    unreached: tuple[int, ...] = ()
    num_available: int | None = None
    waits_until: float = 0.0


def time_needed(feed: Feed, client_id: int, plan: Plan | None = None) -> float:
    """Return the time that a client needs for a round: planned seconds on a network, or without one local steps."""
    steps = feed.num_steps(client_id)
    return steps if plan is None else plan.seconds(client_id, steps)


class Participation:
    """The rules of who takes part; ``LBGMFederated`` documents the arguments.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        sampler: Any = None,
        availability: Any = None,
        over_select: float = 1.0,
        deadline: int | str | None = None,
        dropout: Any = None,
        network: NetworkClock | None = None,
    ) -> None:
        self.sampler = as_sampler(sampler)
        self.availability = as_availability(availability)
        self.over_select = _checked_factor(over_select)
        self.deadline = deadline
        self.dropout = as_dropout(dropout)
        self._most_steps, self._most_seconds = _checked_deadline(deadline, network)
        self._plans = network is not None and (self.over_select > 1 or self._most_seconds is not None)

    @property
    def is_whole(self) -> bool:
        """Whether all clients are available, and all that are chosen count."""
        return (self.availability, self.over_select, self.deadline, self.dropout) == (None, 1.0, None, None)

    @property
    def is_ahead(self) -> bool:
        """Whether a cohort is known before the round before it is over, and needs no function of the user's."""
        asks = any(rule is not None and rule.is_given for rule in (self.availability, self.dropout))
        return not asks and not self._plans and (self.sampler is None or self.sampler.is_ahead)

    def describe(self) -> dict[str, Any]:
        """Return the settings that are not the defaults as plain values."""
        described: dict[str, Any] = {}
        if self.sampler is not None:
            described["sampler"] = repr(self.sampler)
        if self.availability is not None:
            described["availability"] = getattr(self.availability, "value", repr(self.availability))
        if self.over_select != 1:
            described["over_select"] = self.over_select
        if self.deadline is not None:
            described["deadline"] = self.deadline
        if self.dropout is not None:
            described["dropout"] = repr(self.dropout)
        return described

    def num_chosen(self, cohort_size: int, num_clients: int) -> int:
        """Return how many clients are chosen so that ``cohort_size`` of them may count: at most all."""
        return min(num_clients, math.ceil(round(self.over_select * cohort_size, 9)))  # 1.1 * 10 is 11

    def check_size(self, cohort_size: int | None, num_clients: int | None) -> None:
        """Refuse settings that do not go with the size of a cohort.

        Args:
            cohort_size: Clients whose updates are wanted in a round; None: not known yet.
            num_clients: K; None: not known yet.

        Raises:
            ValueError: If there is nobody to choose beyond the cohort, or the sampler cannot draw so many.
        """
        if cohort_size is None or num_clients is None:
            return
        if self.over_select > 1 and cohort_size == num_clients:
            raise ValueError(
                f"`over_select={self.over_select}` chooses more clients than the cohort's size and waits for the"
                f" fastest, but a cohort is all {num_clients} clients already: pass a smaller `clients_per_round`, or"
                " `deadline=...` to drop the slowest."
            )
        if self.sampler is not None:
            self.sampler.check_size(self.num_chosen(cohort_size, num_clients))

    def check(self, feed: Feed, cohort_size: int) -> None:
        """Refuse settings that do not go with the clients' data, which must be prepared.

        Raises:
            ValueError: As ``check_size``; or a trace is of other clients, or nobody ever meets the deadline.
        """
        self.check_size(cohort_size, feed.num_clients)
        if self.availability is not None:
            self.availability.check(feed.num_clients, feed.client_names)
        if self._most_steps is not None:
            fastest = min(feed.num_steps(client_id) for client_id in range(feed.num_clients))
            if fastest > self._most_steps:
                raise ValueError(
                    f"`deadline={self.deadline}` local steps would drop every client in every round: the fastest needs"
                    f" {fastest}. Pass at least deadline={fastest}, or fewer `local_steps` or `local_epochs`."
                )

    def check_plan(self, feed: Feed, plan: Plan | None) -> None:
        """Refuse a deadline in seconds that cannot be told, or that nobody ever meets.

        Args:
            feed: The clients' data, which must be prepared.
            plan: The clients' times; None: there is no clock, or it measures.

        Raises:
            ValueError: If it does not go with the clients' times.
        """
        if self._most_seconds is None:
            return
        if plan is None:
            raise _measured_deadline(self.deadline)
        fastest = min(time_needed(feed, client_id, plan) for client_id in range(feed.num_clients))
        if fastest > self._most_seconds:
            raise ValueError(
                f"`deadline={self.deadline!r}` would drop every client in every round: the fastest is planned to need"
                f" {fastest:.4g} s, {plan.uplink_bits / 8:,.0f} bytes up and {plan.downlink_bits / 8:,.0f} down"
                " included. Pass a later deadline, or, if messages are smaller than that,"
                " `NetworkClock(planned_uplink=..., planned_downlink=...)`, shares of the whole model."
            )

    def draw(
        self, round_index: int, feed: Feed, cohort_size: int, state: SamplerState, plan: Plan | None = None
    ) -> Turnout:
        """Return who takes part in a round: a pure function of the settings, the feed's seed, and the arguments.

        Args:
            round_index: The round.
            feed: The clients' data.
            cohort_size: Clients whose updates are wanted.
            state: The sampler's.
            plan: The clients' times on a network; None: they are counted in local steps.

        Raises:
            ValueError: If the sampler, or a function of the user's, returns what it must not.
        """
        num_clients, seed = feed.num_clients, feed.seed
        if self.sampler is None and self.is_whole:
            return Turnout(sample_cohort(num_clients, cohort_size, seed, round_index))
        clients = tuple(range(num_clients))
        if self.availability is not None:
            clients = self.availability.clients(round_index, num_clients, seed, feed.client_names)
        num_available = None if self.is_whole else len(clients)
        if not clients:
            return Turnout((), num_available=num_available)
        sampler = self.sampler or UniformSampler()
        size = self.num_chosen(cohort_size, num_clients)
        draw = Draw(round_index, clients, size, num_clients, feed.num_examples, seed)
        chosen = _checked_cohort(sampler.sample(draw, state), draw, sampler)
        unreached: Collection[int] = ()
        lost: Collection[int] = ()
        if self.dropout is not None:
            unreached, lost = self.dropout.draw(round_index, chosen, num_clients, seed)
        arriving = [k for k in chosen if k not in {*unreached, *lost}]
        cohort = self._in_time(round_index, feed, arriving, cohort_size, plan)
        gone = {*cohort, *unreached}
        dropped = tuple(k for k in chosen if k not in gone)
        is_short = self._most_seconds is not None and bool(dropped) and len(cohort) < cohort_size
        waits_until = self._most_seconds if is_short and self._most_seconds is not None else 0.0
        return Turnout(cohort, dropped, tuple(unreached), num_available, waits_until)

    def _in_time(
        self, round_index: int, feed: Feed, clients: Sequence[int], cohort_size: int, plan: Plan | None
    ) -> tuple[int, ...]:
        """Return those who meet the deadline, and of them no more than wanted, the fastest."""
        if self._most_steps is not None:
            clients = [client_id for client_id in clients if feed.num_steps(client_id) <= self._most_steps]
        if self._most_seconds is not None:
            clients = [client_id for client_id in clients if time_needed(feed, client_id, plan) <= self._most_seconds]
        if len(clients) > cohort_size:
            ties = client_chances(feed.seed, "arrival", round_index, feed.num_clients)
            clients = sorted(clients, key=lambda k: (time_needed(feed, k, plan), feed.num_steps(k), ties[k]))
        return tuple(sorted(clients[:cohort_size]))


def _checked_cohort(cohort: Any, draw: Draw, sampler: Any) -> list[int]:
    """Return a cohort in increasing order, if it is one."""
    where = f"`sampler={sampler!r}` in round {draw.round_index}"
    try:
        members: list[Any] = list(cohort)
    except TypeError:
        members = [None]
    if not all(isinstance(client_id, Integral) and not isinstance(client_id, bool) for client_id in members):
        raise ValueError(f"{where} must return a sequence of client ids, whole numbers; got {cohort!r}.")
    chosen = sorted(map(int, members))
    if len(set(chosen)) < len(chosen):
        twice = next(k for k, following in itertools.pairwise(chosen) if k == following)
        raise ValueError(f"{where} returned client {twice} more than once: return each client at most once.")
    missing = set(chosen) - set(draw.clients)
    if missing:
        raise ValueError(
            f"{where} returned client {min(missing)}, which is not available: return some of the {len(draw.clients)}"
            " clients that it is given."
        )
    if len(chosen) > draw.size:
        raise ValueError(
            f"{where} returned {len(chosen)} clients, but at most {draw.size} are chosen in a round: return fewer, or"
            " pass a larger `clients_per_round`."
        )
    return chosen


def _checked_factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`over_select` must be a number of at least 1, such as 1.3; got {value!r}.")
    if not 1 <= value < math.inf:
        raise ValueError(
            f"`over_select={value!r}` must be at least 1: 1.3 chooses 30 % more clients than the cohort's size, and the"
            " fastest count."
        )
    return float(value)


def _checked_deadline(value: Any, network: NetworkClock | None) -> tuple[int | None, float | None]:
    """Return a deadline in local steps, and one in seconds; None if it is not that."""
    if value is None:
        return None, None
    if isinstance(value, str):
        seconds = parse_seconds("`deadline`", value)
        if seconds == 0 or value.strip()[-1].isdigit():
            raise ValueError(
                f"`deadline={value!r}` must be a time above 0 with a unit, such as '30 s' or '2 min'; local steps are a"
                " whole number, not text."
            )
        if network is None:
            raise ValueError(
                f"`deadline={value!r}` is a time, which needs a clock: pass `network=NetworkClock(...)`, or as the"
                " deadline a whole number of local steps."
            )
        if network.compute == "measured" and network.clients is None:
            raise _measured_deadline(value)
        return None, seconds
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            "`deadline` must be a positive whole number of local steps, a time such as '30 s' with a"
            f" `network=NetworkClock(...)`, or None; got {value!r}."
        )
    return value, None


def _measured_deadline(deadline: Any) -> ValueError:
    return ValueError(
        f"`deadline={deadline!r}` decides before training who will be in time, which `NetworkClock(compute='measured')`"
        " cannot tell, and a resumed run would decide otherwise: pass `compute='20 ms'`, seconds of a local step, or as"
        " the deadline a whole number of local steps."
    )
