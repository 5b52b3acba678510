"""Uplinks of every kind, and updates of a client that keep their direction now and then, for several tests."""

import numpy as np
import torch

from lightning_lbgm.compression import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    Relax,
    SignSGD,
    TargetSavings,
    Ternary,
    TopK,
)
from lightning_lbgm.core.layout import Layout

# 37 entries: no whole number of bytes of signs. Rank 1 makes factors of the first tensor, 10 for 21 numbers, and of the
# last one, taken as (2, 6), 8 for 12.
LAYOUT = Layout([(7, 3), 3, 1, (2, 2, 3)])
SIZE, SIZES = 37, (21, 3, 1, 12)
CLIENT = 5
COMPRESSORS = {
    "all": [],
    "topk": [TopK(0.3)],
    "sign": [SignSGD()],
    "topk, sign": [TopK(0.5), SignSGD()],
    "ef(topk)": [ErrorFeedback(TopK(0.2))],
    "ef(sign)": [ErrorFeedback(SignSGD())],
    "ef(topk, sign)": [ErrorFeedback([TopK(0.3), SignSGD()])],
    "atomo": [ATOMO(1)],
    "atomo, unbiased": [ATOMO(1, "unbiased")],
    "powersgd": [PowerSGD(1)],
    "ternary": [Ternary()],
    "topk, ternary": [TopK(0.4), Ternary()],
    "qsgd": [QSGD(7, bucket_size=8)],
    "randk": [RandK(0.3)],
    "cast": [Cast()],
    "ef(atomo)": [ErrorFeedback(ATOMO(1))],
    "ef(powersgd)": [ErrorFeedback(PowerSGD(1))],
    "ef(qsgd)": [ErrorFeedback(QSGD(3, bucket_size=16))],
    "ef(randk)": [ErrorFeedback(RandK(0.3, unbiased=False))],
    "ef(cast)": [ErrorFeedback(Cast("float16"))],
    "topk, qsgd": [TopK(0.4), QSGD(7)],
    "topk, cast": [TopK(0.4), Cast()],
    "randk, sign": [RandK(0.5), SignSGD()],
    "randk, qsgd": [RandK(0.5), QSGD(7)],
    "powersgd, cast": [PowerSGD(1), Cast()],
    "atomo, qsgd": [ATOMO(1), QSGD(127)],
    "atomo, sign": [ATOMO(1), SignSGD()],
    "atomo, topk": [ATOMO(1), TopK(0.3)],
    "topk, sign, relax": [TopK(0.4), SignSGD(), Relax(1.5)],
    "ef(topk, relax)": [ErrorFeedback([TopK(0.3), Relax(0.5)])],
    "layer recycling": [LayerRecycling(2)],
    "topk, layer recycling": [TopK(0.5), LayerRecycling(1)],
    "ef(layer recycling)": [ErrorFeedback(LayerRecycling(2))],
}
LOOKING_BACK = {
    "lookback": [LookBack(0.4)],
    "lookback by layer": [LookBack(0.4, "layer")],
    "topk, lookback": [TopK(0.4), LookBack(0.6)],
    "topk, lookback by layer": [TopK(0.4), LookBack(0.6, "layer")],
    "topk, relax, lookback": [TopK(0.4), Relax(1.25), LookBack(0.6)],
    "sign, lookback": [SignSGD(), LookBack(0.6)],
    "sign, lookback by layer": [SignSGD(), LookBack(0.6, "layer")],
    "ef(lookback)": [ErrorFeedback(LookBack(0.5))],
    "ef(lookback by layer)": [ErrorFeedback(LookBack(0.5, "layer"))],
    "ef(topk, lookback)": [ErrorFeedback([TopK(0.4), LookBack(0.7)])],
    "ef(topk), lookback": [ErrorFeedback(TopK(0.4)), LookBack(0.8)],
    "topk, ef(lookback)": [TopK(0.4), ErrorFeedback(LookBack(0.7))],
    "ef(ef(lookback))": [ErrorFeedback(ErrorFeedback(LookBack(0.5)))],
    "rank 3": [LookBack(0.3, rank=3)],
    "rank 3 by layer": [LookBack(0.3, "layer", rank=3)],
    "max_age": [LookBack(0.6, max_age=2)],
    "rank 3 by layer, max_age": [LookBack(0.5, "layer", rank=3, max_age=3)],
    "function of the round": [LookBack(lambda round_index: 0.1 if round_index % 5 < 2 else 0.9)],
    "target": [LookBack(TargetSavings(0.6))],
    "target by layer": [LookBack(TargetSavings(0.5), "layer", rank=2)],
    "ef(topk, target)": [ErrorFeedback([TopK(0.4), LookBack(TargetSavings(0.8), rank=3)])],
    "atomo, lookback": [ATOMO(1), LookBack(0.5)],
    "atomo, rank 3 by layer": [ATOMO(1), LookBack(0.4, "layer", rank=3)],
    "unbiased atomo, lookback": [ATOMO(1, "unbiased"), LookBack(0.75)],
    "powersgd, lookback": [PowerSGD(1), LookBack(0.5)],
    "powersgd, lookback by layer": [PowerSGD(1), LookBack(0.5, "layer")],
    "ternary, lookback by layer": [Ternary(), LookBack(0.43, "layer")],
    "qsgd, lookback": [QSGD(7, bucket_size=8), LookBack(0.5)],
    "qsgd, rank 3 by layer": [QSGD(7, bucket_size=8), LookBack(0.4, "layer", rank=3)],
    "randk, lookback": [RandK(0.8), LookBack(0.7)],
    "randk, lookback by layer": [RandK(0.8), LookBack(0.7, "layer")],
    "cast, lookback": [Cast(), LookBack(0.4)],
    "cast, lookback by layer": [Cast(), LookBack(0.4, "layer")],
    "topk, cast, lookback": [TopK(0.4), Cast(), LookBack(0.6)],
    "topk, qsgd, lookback by layer": [TopK(0.4), QSGD(7), LookBack(0.6, "layer")],
    "topk, sign, rank 3": [TopK(0.5), SignSGD(), LookBack(0.5, rank=3)],
    "atomo, cast, rank 3": [ATOMO(1), Cast(), LookBack(0.4, rank=3)],
    "ef(powersgd, lookback by layer)": [ErrorFeedback([PowerSGD(1), LookBack(0.5, "layer")])],
    "ef(atomo, qsgd, rank 3)": [ErrorFeedback([ATOMO(1), QSGD(31), LookBack(0.5, rank=3)])],
    "rowwise": [LookBack(0.3, rowwise=True)],
    "rowwise, rank 3": [LookBack(0.12, rank=3, rowwise=True)],
    "rowwise by layer": [LookBack(0.3, "layer", rowwise=True)],
    "rowwise by layer, rank 3": [LookBack(0.12, "layer", rank=3, rowwise=True)],
    "topk, rowwise": [TopK(0.4), LookBack(0.5, rowwise=True)],
    "cast, rowwise, rank 3 by layer": [Cast(), LookBack(0.12, "layer", rank=3, rowwise=True)],
    "atomo, rowwise, rank 3": [ATOMO(1), LookBack(0.12, rank=3, rowwise=True)],
    "ef(rowwise, rank 3)": [ErrorFeedback(LookBack(0.2, rank=3, rowwise=True))],
    "ef(topk, rowwise)": [ErrorFeedback([TopK(0.4), LookBack(0.6, rowwise=True)])],
}
FORETELLING = {
    "predict": [Predict(2, TopK(0.3))],
    "predict rowwise": [Predict(3, [TopK(0.4), QSGD(7)], rowwise=True)],
    "predict, powersgd": [Predict(2, PowerSGD(1))],
    "ef(predict)": [ErrorFeedback(Predict(2, TopK(0.3)))],
    "ef(predict rowwise)": [ErrorFeedback(Predict(3, [TopK(0.4), QSGD(7)], rowwise=True))],
    "diana": [DIANA(TopK(0.3))],
    "diana, sign": [DIANA([TopK(0.4), SignSGD()])],
    "ef(diana)": [ErrorFeedback(DIANA(TopK(0.3)))],
    "ef(diana, sign)": [ErrorFeedback(DIANA([TopK(0.4), SignSGD()]))],
}
UPLINKS = {**COMPRESSORS, **LOOKING_BACK, **FORETELLING}


def updates(seed, rounds, dtype=torch.float32):
    """Updates that keep a direction for five rounds; some are zero, in all or in one tensor."""
    rng = np.random.default_rng(seed)
    for index in range(rounds):
        if index % 5 == 0:
            direction = rng.normal(size=SIZE)
        values = direction + rng.uniform(0, 0.5) * rng.normal(size=SIZE)
        if index % 7 == 3:
            values[: SIZES[0]] = 0.0
        if index % 11 == 6:
            values[:] = 0.0
        yield torch.tensor(values, dtype=dtype)
