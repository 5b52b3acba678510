"""Relax: both ends apply a multiple of what was sent, and nothing more is sent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lbgm import ErrorFeedback, LookBack, Relax, SignSGD, TopK
from lightning_lbgm.compression import Chain, Context
from lightning_lbgm.payloads import Dense
from lightning_lbgm.protocol import DownlinkServer

UPDATE = torch.tensor([4.0, -1.0, 2.0, -3.0])


def test_what_is_sent_is_that_of_the_stages_before_and_what_is_seen_a_multiple():
    plain, relaxed = Chain([TopK(0.5)]), Chain([TopK(0.5), Relax(1.5)])
    sent, seen = plain.encode(Dense(UPDATE), plain.init()), relaxed.encode(Dense(UPDATE), relaxed.init())
    assert seen.payload.to_bytes() == sent.payload.to_bytes()
    assert seen.decoded.dense().tolist() == [6.0, 0.0, 0.0, -4.5]
    assert torch.equal(relaxed.decode(seen.payload, relaxed.init()).dense(), seen.decoded.dense())


def test_error_feedback_and_look_back_see_the_multiple():
    feedback = ErrorFeedback([TopK(0.25), Relax(0.5)])
    state = feedback.init()
    assert feedback.encode(Dense(UPDATE), state).decoded.dense().tolist() == [2.0, 0, 0, 0]
    assert feedback.encode(Dense(torch.zeros(4)), state).decoded.dense().tolist() == [0, 0, 0, -1.5]  # 2 is left of 4
    chain = Chain([Relax(1.5), LookBack(0.1)])
    state = chain.init()
    chain.encode(Dense(UPDATE), state)
    again = chain.encode(Dense(2 * UPDATE), state)
    assert again.decision.coefficients == (2.0,)
    assert again.decoded.dense().tolist() == (3 * UPDATE).tolist()


@given(st.floats(0.1, 1.9), st.integers(0, 50))
def test_the_share_that_is_left_is_the_formulas_and_below_all(factor, seed):
    params = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left = []
    for stages in ([TopK(0.2), SignSGD()], [TopK(0.2), SignSGD(), Relax(factor)]):
        server = DownlinkServer(stages, [60])
        server.begin_round(torch.zeros(60, dtype=torch.float64), Context(0))
        server.begin_round(params, Context(1))
        left.append(server.last.error)
    assert left[1] == pytest.approx(1 - (2 * factor - factor**2) * (1 - left[0]), abs=1e-6)
    assert left[1] < 1


@pytest.mark.parametrize("factor", [0, 2, -1.0, float("nan")])
def test_factors_out_of_range_are_refused(factor):
    with pytest.raises(ValueError, match=r"`Relax\(factor=...\)` must be above 0 and below 2"):
        Relax(factor)


@pytest.mark.parametrize("factor", [True, "1.5", None])
def test_what_is_no_number_is_refused(factor):
    with pytest.raises(TypeError, match=r"`Relax\(factor=...\)` must be a number"):
        Relax(factor)


def test_it_shows_its_call():
    assert repr(Relax()) == "Relax(factor=1.5)"
