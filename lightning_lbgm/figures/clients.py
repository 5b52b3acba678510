"""Clients figure: a metric of each client, sorted, and against the bytes that it sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_lbgm.figures.base import byte_formatter, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_clients"]


def draw_clients(
    metric: str, models: Mapping[str, Mapping[int, float]], uplink_bytes: Mapping[int, float], *, lower_is_better: bool
) -> Figure:
    """Draw a metric of each client: sorted from the worst to the best, and against what the client sent.

    Args:
        metric: Its name.
        models: Values by client, of each model that was evaluated, by the model's name; the first is the global one.
        uplink_bytes: Bytes that each client sent so far.
        lower_is_better: Whether the worst has the highest value.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, values) in enumerate(models.items()):
        ranked = sorted(values.values(), reverse=lower_is_better)
        left.plot(range(1, len(ranked) + 1), ranked, marker=".", markersize=4, linewidth=1.0, label=name)
        if number == 0:
            sent = [uplink_bytes.get(client_id, 0.0) for client_id in values]
            right.scatter(sent, list(values.values()), s=12)
    left.set_xlabel("clients, the worst first")
    left.set_ylabel(metric)
    left.legend(fontsize=8)
    right.set_xlabel("sent by the client")
    right.xaxis.set_major_formatter(byte_formatter())
    right.xaxis.set_major_locator(_few_ticks())
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{metric} of each client", fontsize=11)
    return figure


def _few_ticks() -> object:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
