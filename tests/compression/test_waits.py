"""How often one client's update waits for an accelerator: numbers that Python asks for stop the queue of operations."""

from unittest import mock

import pytest
import torch
from far_device import FAR, FarTensor, far_device
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lbgm.compression import (
    ATOMO,
    DIANA,
    ErrorFeedback,
    LookBack,
    PowerSGD,
    Predict,
    SignSGD,
    Ternary,
    TopK,
    as_chain,
)
from lightning_lbgm.compression.context import Context
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense

LAYOUT = Layout([(16, 20), 16, (10, 16), 10])


class Waits(TorchDispatchMode):
    """Counts what cannot go on before the device has answered."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        if isinstance(args[0] if args else None, FarTensor) and (name in ("_local_scalar_dense", "nonzero") or to_host):
            self.count += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "waits"),
    [
        (lambda: TopK(0.1), 2),  # the update's norm, the gaps
        (lambda: [TopK(0.1), SignSGD()], 3),  # and the scale of the signs
        (lambda: ErrorFeedback([TopK(0.1), SignSGD()]), 3),
        (lambda: DIANA([TopK(0.1)]), 2),
        (lambda: Ternary(), 2),
        (lambda: LookBack(0.9, rank=4), 3),
        (lambda: LookBack(0.9, rank=4, rowwise=True), 3),
        (lambda: Predict(4, TopK(0.1)), 5),
        (lambda: PowerSGD(2), 5),
        (lambda: ATOMO(2), 3),
    ],
)
def test_an_update_waits_a_few_times_however_many_vectors_are_kept(make, waits):
    chain = as_chain(make())
    with far_device(), Waits() as mode, mock.patch.object(FarTensor, "tolist", lambda far: _answer(far, mode)):
        state, total = chain.init(), torch.zeros(LAYOUT.size).to(FAR)
        for round_index in range(7):
            generators = [torch.Generator().manual_seed(seed) for seed in (round_index, 99)]
            values = sum(torch.randn(LAYOUT.size, generator=generator) for generator in generators).to(FAR)
            mode.count = 0
            update = Dense(values, LAYOUT)
            update.squared_norm()
            encoded = chain.encode(update, state, Context(round_index, chain.init_shared(), seed=0, path=(0,)))
            assert encoded.payload.num_bits > 0
            encoded.decoded.add_to(total, 0.1)
            assert mode.count <= waits


def _answer(far, mode):
    mode.count += 1
    return far.near.tolist()
