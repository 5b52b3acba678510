"""A whole fit in which the server sees bytes only, against the simulation, in which both ends share one state."""

import pytest
import torch
from conftest import Recorder, TinyModule, flat_params
from torch import nn

from lightning_lbgm import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LBGMFederated,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    SignSGD,
    TargetSavings,
    TopK,
)
from lightning_lbgm.compression import Stage, as_chain
from lightning_lbgm.protocol.message import HEADER_BYTES, Message


class OverTheWire(Stage):
    """Encode on the client, send bytes, decode on a server that has a state of its own."""

    terminal = True

    def __init__(self, stages):
        self.stages = as_chain(stages)

    def init(self):
        return {"client": self.stages.init(), "server": self.stages.init(), "decoded": None}

    def init_shared(self):
        return self.stages.init_shared()

    def encode(self, update, state, context):
        encoded = self.stages.encode(update, state["client"], context)
        data = Message(0, encoded.payload).to_bytes()
        assert len(data) - HEADER_BYTES == encoded.payload.num_bits / 8
        received = Message.from_bytes(data, update.layout).payload
        state["decoded"] = self.stages.decode(received, state["server"], context)
        return encoded

    def reconstruct(self, payload, state, context):
        return state["decoded"]

    def end_round(self, shared, result, context):
        self.stages.end_round(shared, result, context)


@pytest.mark.parametrize(
    "uplink",
    [
        [],
        [LookBack(0.3)],
        [LookBack(0.3, "layer", rank=2, max_age=3)],
        [LookBack(0.2, rank=3, rowwise=True)],
        [Cast(torch.bfloat16), LookBack(lambda round_index: 0.3 if round_index < 4 else 0.1)],
        [TopK(0.5), QSGD(3), LookBack(0.5, "layer")],
        [TopK(0.4), SignSGD()],
        [ATOMO(1, "unbiased"), LookBack(0.4, rank=2)],
        [PowerSGD(1), Cast(torch.float16)],
        [RandK(0.5)],
        [LookBack(TargetSavings(0.6))],
        [Predict(2, [TopK(0.4), QSGD(4)])],
        [Predict(2, TopK(0.4), rowwise=True)],
        [DIANA(QSGD(4))],
        [QSGD(5), LayerRecycling(2)],
    ],
    ids=repr,
)
@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
def test_a_server_that_sees_bytes_only_trains_the_same_model(fit, uplink, feedback):
    reports, params = [], []
    for wire in (False, True):
        torch.manual_seed(0)
        # Random choices follow from a stage's place, so the simulation has a level around the uplink too.
        stages = [OverTheWire(uplink) if wire else as_chain(uplink)]
        stages = [ErrorFeedback(stages)] if feedback else stages
        strategy = LBGMFederated(num_clients=3, uplink=stages, local_steps=2, clients_per_round=2, seed=0)
        recorder = Recorder()
        module = build_module()
        fit(strategy, module=module, batch_size=8, shuffle=True, max_epochs=9, callbacks=[recorder])
        reports.append([client.uplink_bits for report in recorder.reports for client in report.clients])
        params.append(flat_params(module))
    assert reports[0] == reports[1]
    assert torch.equal(*params)


def build_module():
    return TinyModule(net=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
