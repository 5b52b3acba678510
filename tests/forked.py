"""Processes for scripts of tests: forks of one that has imported everything, which takes longer than what they do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def one_process_each(cases: Sequence[T], codes: Path) -> T:
    """Return each of the cases in a process of its own, all at once, which then ends as a script does.

    The process that calls does not return: it waits for the others, and writes their exit codes to a JSON file, that
    of a killed one negative.
    """
    children = []
    for case in cases:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            return case
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    codes.write_text(json.dumps(ended))
    sys.exit(0)


def is_rank(rank: int, port: int) -> None:
    """Make this process one of two that something else than Lightning has started."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
