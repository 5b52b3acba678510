"""Shares and least numbers of nodes, as Flower's ``FedAvg`` has them."""

from __future__ import annotations

__all__ = ["check_nodes", "num_nodes"]


def num_nodes(num_there: int, fraction: float, least: int) -> int:
    """Return how many of the nodes that are there are asked."""
    return max(int(num_there * fraction), least)


def check_nodes(num_clients: int, fractions: dict[str, float], least: dict[str, int]) -> None:
    """Check shares and least numbers of nodes, by the names of arguments.

    Args:
        num_clients: K.
        fractions: The shares; that of training must not be 0.
        least: The least numbers.

    Raises:
        ValueError: If one is out of range.
    """
    for name, fraction in fractions.items():
        is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not (is_number and 0 <= fraction <= 1 and (fraction > 0 or name == "fraction_evaluate")):
            interval = "[0, 1], 0 for none" if name == "fraction_evaluate" else "(0, 1]"
            raise ValueError(f"`{name}` must be in {interval}; got {fraction!r}.")
    for name, value in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
    if least["min_available_nodes"] > num_clients:
        raise ValueError(
            f"`min_available_nodes={least['min_available_nodes']}` is more than `num_clients={num_clients}`, so that no"
            " round would ever begin: raise `num_clients`."
        )
