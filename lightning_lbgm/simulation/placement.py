"""Placement of clients on processes: which rank trains which client of a round."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from lightning_lbgm.data.rounds import Round
from lightning_lbgm.simulation.world import World

__all__ = ["deal", "take_share"]

_LEAST_GAIN = 0.05  # of the longest rank's work: for less, a client's state is not sent to another process


def deal(cohort: Sequence[int], work: Sequence[int], placement: Mapping[int, int], num_ranks: int) -> tuple[int, ...]:
    """Deal a round's clients to ranks: a pure function, so that every rank computes the same.

    A client stays at its place, the rank that holds its state. A client without one goes to the rank with the least
    work, the largest first. Where that leaves the ranks unequal, clients move from the one with the most to the one
    with the least work, each time the client that equals them best, as long as a move makes the longer one at least a
    twentieth shorter.

    Args:
        cohort: Clients, without repeats.
        work: Each one's local work, in any unit, positive.
        placement: Ranks of the clients that have one, of any clients.
        num_ranks: Number of ranks.

    Returns:
        The rank of each client of the cohort.

    Examples:
        >>> deal([3, 5, 8], [10, 20, 10], {}, 2)
        (1, 0, 1)
        >>> deal([3, 5, 8], [10, 10, 10], {3: 0, 5: 0, 8: 0}, 2)
        (1, 0, 0)
    """
    work_of = dict(zip(cohort, work))
    rank_of = {client_id: placement[client_id] for client_id in cohort if client_id in placement}
    loads = [0] * num_ranks
    for client_id, rank in rank_of.items():
        loads[rank] += work_of[client_id]
    for client_id in sorted(work_of.keys() - rank_of.keys(), key=lambda k: (-work_of[k], k)):
        rank_of[client_id] = loads.index(min(loads))
        loads[rank_of[client_id]] += work_of[client_id]
    while True:
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        # The longer of the two is shortest after moving half the gap. Clients without a place go before others.
        movable = [k for k in cohort if rank_of[k] == most and work_of[k] < gap]
        best = min(movable, key=lambda k: (abs(2 * work_of[k] - gap), k in placement, k), default=None)
        if best is None or min(work_of[best], gap - work_of[best]) < _LEAST_GAIN * loads[most]:
            return tuple(rank_of[client_id] for client_id in cohort)
        rank_of[best] = least
        loads[most] -= work_of[best]
        loads[least] += work_of[best]


def take_share(
    round_: Round, placement: dict[int, int], clients: MutableMapping[int, Any], world: World, device: torch.device
) -> Round:
    """Return the round of the clients that are trained on this rank, with their state brought here.

    Args:
        round_: The whole round.
        placement: The rank that holds a client's state, of all clients; changed in place.
        clients: The states that this rank holds, changed in place.
        world: The ranks.
        device: Where states go.
    """
    if world.size == 1:
        return round_
    ranks = dict(zip(round_.cohort, deal(round_.cohort, round_.work, placement, world.size)))
    moves = [(k, placement[k], rank) for k, rank in ranks.items() if placement.get(k, rank) != rank]
    world.move(moves, clients, device)
    placement.update(ranks)
    return round_.part([client_id for client_id, rank in ranks.items() if rank == world.rank])
