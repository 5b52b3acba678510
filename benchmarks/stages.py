"""What each uplink stage costs for one client's update, in milliseconds and in passes over the vector."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    SignSGD,
    Ternary,
    TopK,
)
from lightning_lbgm.compression import Context, Stage, as_chain
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense

Row = dict[str, Any]

FCN = Layout([(128, 784), 128, (10, 128), 10])
PARTS = ("encode", "decode", "add")


def resnet(width: int = 64) -> Layout:
    """Return the parameter tensors of a ResNet-18 for small images and 10 classes; 11.2 million with a width of 64."""
    shapes: list[tuple[int, ...]] = [(width, 3, 3, 3), (width,), (width,)]
    inside = width
    for level in range(4):
        outside = width * 2**level
        for block in range(2):
            for channels in (inside, outside):
                shapes += [(outside, channels, 3, 3), (outside,), (outside,)]
            if block == 0 and level:
                shapes += [(outside, inside, 1, 1), (outside,), (outside,)]
            inside = outside
    return Layout([*shapes, (10, inside), (10,)])


def stages() -> dict[str, Callable[[], Any]]:
    """Return uplinks by name."""

    def sparse_signs() -> list[Stage]:
        return [TopK(0.03), SignSGD()]

    return {
        "TopK(0.03)": lambda: TopK(0.03),
        "[TopK(0.03), SignSGD()]": sparse_signs,
        "SignSGD()": SignSGD,
        "Ternary()": Ternary,
        "QSGD(7)": lambda: QSGD(7),
        "QSGD(7, bucket_size=512)": lambda: QSGD(7, bucket_size=512),
        "RandK(0.1)": lambda: RandK(0.1),
        "RandK(0.01)": lambda: RandK(0.01),
        "Cast()": Cast,
        "ATOMO(2)": lambda: ATOMO(2),
        "PowerSGD(2)": lambda: PowerSGD(2),
        "EF([TopK(0.03), SignSGD()])": lambda: ErrorFeedback(sparse_signs()),
        "EF(DIANA([TopK(0.03), SignSGD()]))": lambda: ErrorFeedback(DIANA(sparse_signs())),
        "Predict(8, TopK(0.03))": lambda: Predict(8, TopK(0.03)),
        "LookBack(0.2)": lambda: LookBack(0.2),
        "LookBack(0.9, rank=8)": lambda: LookBack(0.9, rank=8),
        "LookBack(0.9, rank=8, rowwise=True)": lambda: LookBack(0.9, rank=8, rowwise=True),
    }


def stage_cost(quick: bool) -> Iterator[Row]:
    """Yield what encoding, decoding and adding one update costs; a pass is a ``torch.dot`` of the vector with itself.

    The seconds are those of the thread on its processor, so other work on the machine disturbs them less. A pass is
    timed right before each stage, and on the update itself, as ``Federation`` does to check that it is finite.
    """
    torch.set_num_threads(1)
    for label, layout in {"0.1 M": FCN, "11 M": resnet(16 if quick else 64)}.items():
        for name, make in stages().items():
            row = {"table": "stages", "what": name, "parameters": label, "size": layout.size}
            yield {**row, **_measure(make(), layout, 3 if quick else 9 if layout is not FCN else 60)}


def _measure(stage: Stage | list[Stage], layout: Layout, repeats: int) -> dict[str, float]:
    """Return median milliseconds of each part and of a pass, once the stage remembers as much as it can."""
    chain = as_chain(stage)
    state, total = chain.init(), torch.zeros(layout.size)
    noise = torch.randn(layout.size)
    # The first updates are at right angles, so that memories of rank 8 fill; the others keep two of these directions.
    kept = noise.roll(7919 * 5) + noise.roll(7919 * 6)
    update = torch.empty(layout.size)  # a client's update lies in the same memory each time
    taken: dict[str, list[float]] = {name: [] for name in ("pass", *PARTS)}
    warmup = 9
    for turn in range(warmup + repeats):
        torch.add(noise.roll(7919 * turn), kept, alpha=float(turn >= warmup), out=update)
        seconds = _turn(chain, update, layout, state, total, turn)
        if turn >= warmup:
            for part, value in seconds.items():
                taken[part].append(value)
    return {f"{part}_ms": 1e3 * statistics.median(values) for part, values in taken.items()}


@torch.no_grad()
def _turn(
    chain: Any, values: Tensor, layout: Layout, state: dict[str, Any], total: Tensor, turn: int
) -> dict[str, float]:
    update = Dense(values, layout)
    torch.dot(values, values)
    begin = time.thread_time()
    update.squared_norm()  # which is one pass, and known to every stage
    read = time.thread_time()
    encoded = chain.encode(update, state, Context(turn, chain.init_shared(), seed=0, path=(0,)))
    assert encoded.payload.num_bits > 0
    sent = time.thread_time()
    decoded = encoded.decoded
    received = time.thread_time()
    decoded.add_to(total, 0.01)
    end = time.thread_time()
    return {"pass": read - begin, "encode": sent - read, "decode": received - sent, "add": end - received}
