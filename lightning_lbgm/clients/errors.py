"""Error notes that name the client, round and local step; the error keeps its type and traceback."""

from __future__ import annotations

import logging

__all__ = ["add_client"]

log = logging.getLogger(__name__)

_ONE_VALUE = "Expected more than 1 value per channel when training"


def add_client(error: Exception, round_index: int, client_id: int, step: int, batch_size: int) -> None:
    """Add client, round, local step and batch size to an error as a note, which Python 3.11 shows with the traceback.

    BatchNorm's error about a batch of one example gets them, and the remedy, in its message.

    Args:
        error: The error, changed in place.
        round_index: The round.
        client_id: The client.
        step: Local steps made before.
        batch_size: Examples in the local batch at hand.
    """
    place = f"client {client_id}, round {round_index}, local step {step}, batch of {batch_size}"
    if isinstance(error, ValueError) and str(error).startswith(_ONE_VALUE):
        error.args = (
            f"{error} ({place}). A client's last batch can be a single example, which BatchNorm cannot train on: use"
            " `DataLoader(drop_last=True)` or another batch size. A client with one example only, which is never"
            " dropped, needs more: fewer clients, or a partitioner with a minimum such as"
            " `DirichletPartitioner(alpha, min_examples=2)`.",
        )
        return
    note = f"Raised while a client was trained: {place}."
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        log.error(note)
