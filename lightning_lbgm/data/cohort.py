"""Cohort sampling: which clients take part in a round."""

from __future__ import annotations

from collections.abc import Collection

import torch

from lightning_lbgm.core.rng import generator

__all__ = ["resolve_cohort_size", "sample_cohort"]


def resolve_cohort_size(num_clients: int | None, clients_per_round: int | float | None) -> int | None:
    """Turn ``clients_per_round`` into a count: None is all, an int a count, a float in (0, 1] a share (at least one).

    If the number of clients is not known yet, the setting is checked and the count is None.

    Raises:
        ValueError: If it is outside its range, or not a number.

    Examples:
        >>> resolve_cohort_size(50, None), resolve_cohort_size(50, 5), resolve_cohort_size(50, 0.3)
        (50, 5, 15)
    """
    if clients_per_round is None:
        return num_clients
    if isinstance(clients_per_round, bool) or not isinstance(clients_per_round, (int, float)):
        raise ValueError(f"`clients_per_round` must be an int, a float or None; got {clients_per_round!r}.")
    if isinstance(clients_per_round, int):
        if clients_per_round < 1 or (num_clients is not None and clients_per_round > num_clients):
            most = "the number of clients" if num_clients is None else f"`num_clients={num_clients}`"
            raise ValueError(
                f"`clients_per_round={clients_per_round}` must be between 1 and {most}, or a float in (0, 1] for a"
                " share of the clients, or None for all."
            )
        return None if num_clients is None else clients_per_round
    if not 0 < clients_per_round <= 1:
        raise ValueError(
            f"`clients_per_round={clients_per_round}` must be in (0, 1] as a float, a share of the clients. For a"
            " count, pass an int."
        )
    return None if num_clients is None else max(1, round(clients_per_round * num_clients))


def sample_cohort(
    num_clients: int, cohort_size: int, seed: int, round_index: int, clients: Collection[int] | None = None
) -> tuple[int, ...]:
    """Draw the cohort of a round without replacement, in increasing order: a pure function of its arguments.

    Args:
        num_clients: K.
        cohort_size: Clients wanted.
        seed: The run's seed.
        round_index: The round.
        clients: Those that can be drawn; if they are fewer than wanted, all of them are. None: all K.
    """
    if clients is None or len(clients) == num_clients:
        if cohort_size == num_clients:
            return tuple(range(num_clients))
        clients = None
    order = torch.randperm(num_clients, generator=generator(seed, "cohort", round_index)).tolist()
    if clients is not None:
        present = set(clients)
        order = [client_id for client_id in order if client_id in present]
    return tuple(sorted(order[:cohort_size]))
