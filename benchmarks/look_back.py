"""Time and memory bandwidth of one update's look-back test and reconstruction, with operands that no cache holds."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm import LookBack
from lightning_lbgm.payloads.base import Dense

Row = dict[str, Any]

SIZES = {"0.1 M": 101_770, "1 M": 1_000_000, "11 M": 11_000_000}
COLD_BYTES = 256 * 2**20  # of operands in rotation, several times a last-level cache


@functools.cache
def _large() -> tuple[Tensor, Tensor]:
    return torch.randn(32 * 2**20), torch.randn(32 * 2**20)


def bandwidth(repeats: int = 5) -> float:
    """Return the bytes a second that a plain ``torch.dot`` of two large vectors reads, the best of ``repeats``."""
    a, b = _large()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.dot(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * a.nbytes / min(seconds)


def look_back(quick: bool) -> Iterator[Row]:
    """Yield the cost of a test and of a reconstruction with aggregation, for a recycled and a refreshed update.

    The bytes are those that must move: a test reads update and look-back gradient once each, and where it refreshes,
    reads the update again and writes its copy; aggregation reads one vector and the sum, and writes the sum.
    """
    torch.set_num_threads(1)
    dtypes: dict[str, dict[str, Any]] = {"": {}, ", LBG in bfloat16": {"dtype": torch.bfloat16}}
    for label, size in SIZES.items():
        if quick and size > 1_000_000:
            continue
        for suffix, options in dtypes.items():
            width = 2 if options else 4
            for outcome, threshold in (("recycled", 1.0), ("refreshed", 1e-9)):
                stage = LookBack(threshold, **options)
                test, aggregate, plain = _measure(stage, size, 3 if quick else 7)
                refresh = outcome == "refreshed"
                test_bytes = size * (4 + width + (4 + width if refresh else 0))
                sum_bytes = size * ((4 if refresh else width) + 8)
                yield {
                    "table": "look_back",
                    "what": f"{label}, {outcome}{suffix}",
                    "size": size,
                    "outcome": outcome,
                    "dtype": "bfloat16" if options else "float32",
                    "test_us": 1e6 * test,
                    "aggregate_us": 1e6 * aggregate,
                    "test_share": test_bytes / test / plain,
                    "aggregate_share": sum_bytes / aggregate / plain,
                    "dot_gb_s": plain / 1e9,
                }


def _measure(stage: LookBack, size: int, passes: int) -> tuple[float, float, float]:
    """Return median seconds of ``encode``, and of ``add_to`` of what the server sees, and the bandwidth meanwhile."""
    slots = max(4, COLD_BYTES // (3 * 4 * size))
    base = torch.randn(size)
    # Distinct vectors, quickly made; neighbours are nearly orthogonal.
    updates: list[Tensor] = [base.roll(7 * (slot + 1)) for slot in range(slots)]
    sums = [torch.zeros(size) for _ in range(slots)]
    states = [stage.init() for _ in range(slots)]
    for slot in range(slots):
        stage.encode(Dense(updates[slot - 1].clone()), states[slot])
    tests, aggregations, bandwidths = [], [], []
    for _ in range(passes):
        decoded = []
        bandwidths.append(bandwidth(3))
        for slot in range(slots):
            begin = time.perf_counter()
            encoded = stage.encode(Dense(updates[slot]), states[slot])
            tests.append(time.perf_counter() - begin)
            decoded.append(encoded.decoded)
        for slot in range(slots):
            begin = time.perf_counter()
            decoded[slot].add_to(sums[slot], 0.01)
            aggregations.append(time.perf_counter() - begin)
        updates = updates[1:] + updates[:1]  # a refreshed look-back gradient is not the next update
    return statistics.median(tests), statistics.median(aggregations), statistics.median(bandwidths)
