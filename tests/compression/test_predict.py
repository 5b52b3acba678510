"""Prediction from the past: coefficients, a correction, and a past that both ends keep alike."""

import csv
import math

import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lbgm import LBGMCallback, LBGMFederated
from lightning_lbgm.compression import (
    ATOMO,
    QSGD,
    Context,
    ErrorFeedback,
    LookBack,
    PowerSGD,
    Predict,
    Predicted,
    SignSGD,
    TopK,
    as_chain,
)
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import Reader
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.protocol.message import Message, MessageError

seeds = st.integers(0, 2**32 - 1)
LAYOUT = Layout([(4, 5), 6, (3, 2, 2, 2), ()])
WIDTHS = 4 * [5] + [6] + 3 * [8] + [1]  # the rows
SIZE, ROWS = 51, 9
CORRECTIONS = {
    "topk": TopK(0.3),
    "all": TopK(1.0),
    "sign": SignSGD(),
    "topk, qsgd": [TopK(0.4), QSGD(7)],
    "atomo": ATOMO(1),
    "powersgd": PowerSGD(1),
    "ef(topk)": ErrorFeedback(TopK(0.2)),
}


def drifting(seed, rounds, size=SIZE, noise=0.3):
    """Updates near a plane that turns now and then."""
    rng = np.random.default_rng(seed)
    for index in range(rounds):
        if index % 6 == 0:
            plane = rng.normal(size=(2, size))
        yield rng.uniform(0.3, 3) * (rng.normal(size=2) @ plane + noise * rng.normal(size=size))


def dense(values, layout=LAYOUT, dtype=torch.float64):
    return Dense(torch.tensor(values, dtype=dtype), layout)


def context(index):
    return Context(index, {}, seed=0, path=(5,))


def largest(values, number):
    """The entries of the largest magnitudes, all others zero."""
    out = np.zeros_like(values)
    chosen = np.argsort(-np.abs(values))[:number]
    out[chosen] = values[chosen]
    return out


def least_squares(past, g):
    """The coefficients of the projection on the span of the past."""
    return np.linalg.lstsq(np.stack(past).T, g, rcond=1e-10)[0]


def remembered(state):
    return [payload["values"] for payload in state["basis"]["payloads"]]


def across(payload, layout=LAYOUT):
    """What the server receives."""
    return Message.from_bytes(Message(5, payload).to_bytes(), layout).payload


# By hand


def test_three_rounds_by_hand():
    # TopK(0.5) of 2 entries sends one. (4, 2): nothing is foretold, 4 is sent. (6, 4) on (4, 0): 1.5, and 4 is sent of
    # (0, 4). (3, -2) on (6, 4), of squared length 52: 10 / 52; of the remainder (3 - 60 / 52, -2 - 40 / 52) the larger,
    # -2 - 40 / 52, is sent.
    stage = Predict(1, TopK(0.5))
    state = stage.init()
    for g, coefficients, error, sent, seen in [
        ([4.0, 2.0], [], 1.0, [4.0, 0.0], [4.0, 0.0]),
        ([6.0, 4.0], [1.5], 16 / 52, [0.0, 4.0], [6.0, 4.0]),
        ([3.0, -2.0], [10 / 52], 1 - 100 / (13 * 52), [0.0, -2 - 40 / 52], [60 / 52, -2.0]),
    ]:
        encoded = stage.encode(dense(g, [2]), state)
        assert isinstance(encoded.payload, Predicted)
        assert encoded.payload.coefficients.tolist() == pytest.approx(coefficients, abs=1e-12)
        assert encoded.decision.errors == pytest.approx((error,), abs=1e-12)
        assert encoded.payload.correction.dense().tolist() == pytest.approx(sent, abs=1e-12)
        assert encoded.decoded.dense().tolist() == pytest.approx(seen, abs=1e-12)


def test_row_by_row_by_hand():
    # A matrix of rows (1, 2) and (0, 3), TopK(1) of it. Then (2, 4) and (0, -3), twice and minus once the rows.
    stage = Predict(1, TopK(1.0), rowwise=True)
    state, layout = stage.init(), [(2, 2)]
    stage.encode(dense([1.0, 2.0, 0.0, 3.0], layout), state)
    encoded = stage.encode(dense([2.0, 4.0, 0.0, -3.0], layout), state)
    assert encoded.payload.coefficients.tolist() == pytest.approx([2.0, -1.0], abs=1e-12)
    assert encoded.decision.errors == pytest.approx((0.0,), abs=1e-12)
    assert encoded.payload.correction.dense().tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert encoded.decoded.dense().tolist() == pytest.approx([2.0, 4.0, 0.0, -3.0])


def test_what_was_seen_joins_the_span_and_not_the_update():
    # The server sees (4, 0) of (4, 2), so (0, 2) is not foretold at all.
    stage = Predict(2, TopK(0.5))
    state = stage.init()
    stage.encode(dense([4.0, 2.0], [2]), state)
    encoded = stage.encode(dense([0.0, 2.0], [2]), state)
    assert encoded.payload.coefficients.tolist() == [0.0]
    assert encoded.decision.errors == (1.0,)


# Against NumPy


@pytest.mark.parametrize("rank", [1, 2, 4])
@given(seed=seeds)
@settings(deadline=None, max_examples=8)
def test_the_rounds_equal_a_reference_in_numpy(rank, seed):
    # Half the entries are corrected: 26 of 51.
    stage = Predict(rank, TopK(26 / 51))
    state, past = stage.init(), []
    for g in drifting(seed, 15):
        foretold = np.zeros_like(g)
        if past:
            # Dependent vectors leave coefficients open, not what they foretell.
            foretold = least_squares(past[-rank:], g) @ np.stack(past[-rank:])
        past.append(foretold + largest(g - foretold, 26))
        encoded = stage.encode(dense(g), state)
        expected = (g - foretold) @ (g - foretold) / (g @ g)
        assert encoded.decision.errors[0] == pytest.approx(expected, abs=1e-6)
        np.testing.assert_allclose(remembered(state)[-1].numpy(), past[-1], atol=1e-6 * np.linalg.norm(g))


@given(seed=seeds, rank=st.integers(1, 3))
@settings(deadline=None, max_examples=10)
def test_row_by_row_the_rounds_equal_a_reference_in_numpy(seed, rank):
    stage = Predict(rank, TopK(26 / 51), rowwise=True)
    state, past = stage.init(), []
    borders = np.cumsum(WIDTHS)[:-1]
    for g in drifting(seed, 10):
        # In rows of one entry, and of more look-backs than that, anything is foretold from anything but zero.
        foretold = np.zeros_like(g)
        if past:
            rows = zip(np.split(g, borders), np.split(np.stack(past[-rank:]), borders, axis=1))
            foretold = np.concatenate([least_squares(vectors, part) @ vectors for part, vectors in rows])
        encoded = stage.encode(dense(g), state)
        assert encoded.payload.coefficients.numel() == ROWS * min(len(past), rank)
        expected = (g - foretold) @ (g - foretold) / (g @ g)
        assert encoded.decision.errors[0] == pytest.approx(expected, abs=1e-5)
        past.append(remembered(state)[-1].numpy().copy())
        np.testing.assert_allclose(past[-1], foretold + largest(g - foretold, 26), atol=1e-4 * np.linalg.norm(g))


@pytest.mark.parametrize("rank", [1, 3])
def test_the_span_holds_the_last_vectors_that_were_seen_and_their_inner_products(rank):
    stage = Predict(rank, TopK(0.3))
    state, seen = stage.init(), []
    for g in drifting(0, 9):
        encoded = stage.encode(dense(g), state)
        seen.append(encoded.decoded.dense().clone())
        newest = torch.stack(seen[-rank:])
        assert torch.equal(torch.stack(remembered(state)), newest)
        np.testing.assert_allclose(state["basis"]["gram"], (newest @ newest.T).numpy(), rtol=1e-9, atol=1e-9)


@given(seed=seeds, rank=st.integers(1, 3), rowwise=st.booleans())
@settings(deadline=None, max_examples=10)
def test_a_correction_without_loss_reproduces_the_update(seed, rank, rowwise):
    stage = Predict(rank, TopK(1.0), rowwise)
    client, server = stage.init(), stage.init()
    for g in drifting(seed, 8):
        payload = stage.encode(dense(g), client).payload
        decoded = stage.decode(across(payload), server).dense()
        np.testing.assert_allclose(decoded.numpy(), g, atol=1e-9 * np.linalg.norm(g))


# Both ends


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_see_prediction_and_correction_bit_for_bit(name, rowwise, dtype):
    stage = Predict(3, CORRECTIONS[name], rowwise)
    client, server = stage.init(), stage.init()
    for index, g in enumerate(drifting(1, 9)):
        before = [vector.clone() for vector in remembered(client)]
        encoded = stage.encode(dense(g, dtype=dtype), client, context(index))
        decoded = stage.decode(across(encoded.payload), server, context(index))
        assert decoded.layout == LAYOUT
        assert decoded.dtype == dtype
        assert torch.equal(decoded.dense(), encoded.decoded.dense())
        for one, other in zip(remembered(client), remembered(server), strict=True):
            assert torch.equal(one, other)
        # Put together here from what crossed: the vectors of before, the coefficients, the correction.
        factors = encoded.payload.coefficients.double().view(ROWS if rowwise else 1, len(before), 1)
        expected = encoded.payload.correction.dense().double()
        for position, vector in enumerate(before):
            rows = factors[:, position].repeat(1 if rowwise else ROWS, 1).flatten()
            expected = expected + torch.repeat_interleave(rows, torch.tensor(WIDTHS)) * vector.double()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        np.testing.assert_allclose(decoded.dense().double().numpy(), expected.numpy(), atol=tolerance * g.max())


@pytest.mark.parametrize("rowwise", [False, True])
@given(seed=seeds)
@settings(deadline=None, max_examples=8)
def test_inside_error_feedback_what_was_seen_and_the_residual_sum_to_the_updates(rowwise, seed):
    stage = ErrorFeedback(Predict(2, TopK(0.2), rowwise))
    state, sent, total = stage.init(), np.zeros(SIZE), np.zeros(SIZE)
    for g in drifting(seed, 15):
        encoded = stage.encode(dense(g), state)
        sent += encoded.decoded.dense().numpy()
        total += g
        np.testing.assert_allclose(sent + state["residual"].numpy(), total, atol=1e-9)


def test_the_past_foretells_what_the_correction_alone_would_leave_out():
    # A constant update: a tenth of its entries in each round, and in the tenth round all of them.
    g = np.random.default_rng(0).normal(size=50)
    stage, alone = Predict(1, TopK(0.1)), TopK(0.1)
    state, lost = stage.init(), []
    for _ in range(12):
        encoded = stage.encode(dense(g, [50]), state)
        seen = encoded.decoded.dense().numpy()
        lost.append((g - seen) @ (g - seen) / (g @ g))
    plain = alone.encode(dense(g, [50]), {}).payload.dense().numpy()
    assert lost[0] == pytest.approx((g - plain) @ (g - plain) / (g @ g))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-3 < 0.3 < lost[0]


def test_a_zero_update_is_foretold_by_zeros_and_its_correction_is_nothing():
    stage = Predict(2, TopK(0.5))
    state = stage.init()
    for values in ([1.0, 2.0], [0.0, 0.0], [3.0, 1.0]):
        encoded = stage.encode(dense(values, [2]), state)
        if not any(values):
            assert encoded.payload.coefficients.tolist() == [0.0]
            assert not encoded.decoded.dense().any()
        assert math.isfinite(encoded.decision.errors[0])
        assert torch.isfinite(encoded.payload.coefficients).all()


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_past_of_zeros_foretells_nothing(rowwise):
    stage = Predict(2, TopK(1.0), rowwise)
    client, server = stage.init(), stage.init()
    for factor in (0.0, 0.0, 1.0):
        encoded = stage.encode(dense(factor * np.arange(SIZE)), client)
        decoded = stage.decode(across(encoded.payload), server).dense()
        assert decoded.tolist() == (factor * np.arange(SIZE)).tolist()


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_past_too_small_for_a_coefficient_of_float32_does_no_harm(rowwise):
    # 1e10 is 1e40 times the last update, more than float32 has.
    stage = Predict(1, TopK(0.5), rowwise)
    state = stage.init()
    for values in ([1e-30, 0.0], [1e10, 0.0], [2e10, 0.0]):
        encoded = stage.encode(dense(values, [2], torch.float32), state)
        assert torch.isfinite(encoded.payload.coefficients).all()
        assert encoded.decoded.dense().tolist() == pytest.approx(values)


# What crosses


@pytest.mark.parametrize(("rowwise", "numbers"), [(False, 1), (True, ROWS)])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8)])
def test_a_message_costs_a_count_the_coefficients_a_kind_and_the_correction(rowwise, numbers, dtype, width):
    stage = Predict(3, TopK(0.3), rowwise)
    state = stage.init()
    for index, g in enumerate(drifting(0, 6)):
        payload = stage.encode(dense(g, dtype=dtype), state).payload
        assert isinstance(payload.correction, Sparse)
        count = numbers * min(index, 3)
        assert payload.num_bits == 8 * (1 + width * count + 1) + payload.correction.num_bits
        assert payload.num_bits == 8 * len(payload.to_bytes())


def test_a_count_above_127_takes_two_bytes():
    correction = Dense(torch.ones(3))
    for count, framing in [(0, 1), (127, 1), (128, 2), (16_383, 2), (16_384, 3)]:
        payload = Predicted(torch.ones(count), correction, [3])
        assert payload.num_bits == 8 * (framing + 4 * count + 1 + 12) == 8 * len(payload.to_bytes())


def test_the_bytes_by_hand():
    # Two coefficients; the correction is of kind 1, all values: 3.
    payload = Predicted(torch.tensor([1.0, -2.0]), Dense(torch.tensor([3.0])), [1])
    assert payload.to_bytes() == bytes([2]) + np.array([1, -2], "<f4").tobytes() + bytes([1]) + b"\x00\x00\x40\x40"


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("rowwise", [False, True])
def test_a_message_reads_back_as_it_was_written(name, rowwise):
    stage = Predict(2, CORRECTIONS[name], rowwise)
    state = stage.init()
    for index, g in enumerate(drifting(2, 4)):
        payload = stage.encode(dense(g, dtype=torch.float32), state, context(index)).payload
        data = Message(5, payload, {"mean": torch.ones(2)}, 3).to_bytes()
        message = Message.from_bytes(data, LAYOUT)
        assert message.to_bytes() == data
        assert isinstance(message.payload, Predicted)
        assert (message.payload.layout, message.payload.correction.layout) == (LAYOUT, LAYOUT)
        assert torch.equal(message.payload.coefficients, payload.coefficients)
        assert torch.equal(message.payload.correction.dense(), payload.correction.dense())
        assert message.buffers["mean"].tolist() == [1.0, 1.0]


def test_a_payload_survives_its_state():
    payload = Predicted(torch.tensor([1.0, -2.0]), TopK(0.5).encode(Dense(torch.arange(4.0)), {}).payload, [4])
    copy = Payload.from_state(payload.to_state())
    assert copy.to_bytes() == payload.to_bytes()


@pytest.mark.parametrize("cut", range(1, 14))
def test_bytes_that_end_too_soon_are_no_message(cut):
    body = Predicted(torch.tensor([1.0, -2.0]), Dense(torch.tensor([3.0])), [1]).to_bytes()
    assert len(body) == 14
    with pytest.raises(MessageError):
        read(body[:-cut])


@pytest.mark.parametrize("body", [bytes([0, 63]), bytes([0, 0]), bytes([255] * 12), bytes([2]), b""], ids=repr)
def test_bytes_of_no_correction_or_of_no_end_are_no_message(body):
    with pytest.raises(MessageError):
        read(body)


def test_predictions_too_deep_in_each_other_are_no_message():
    payload = Dense(torch.ones(1))
    for _ in range(8):
        payload = Predicted(torch.empty(0), payload, [1])
    with pytest.raises(MessageError, match="too deep"):
        read(payload.to_bytes())


def read(body):
    """Read a body of one entry."""
    return Payload.read_from(Reader(memoryview(body), torch.float32), Predicted.code, 1)


def test_a_prediction_does_not_decode_alone():
    payload = Predicted(torch.ones(1), Dense(torch.ones(3)), [3])
    with pytest.raises(TypeError, match="decode"):
        payload.dense()


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("change", [-1, 1, "none"])
def test_a_wrong_number_of_coefficients_is_refused_and_changes_nothing(rowwise, change):
    stage = Predict(3, TopK(0.3), rowwise)
    client, server = stage.init(), stage.init()
    for g in drifting(0, 2):
        stage.decode(stage.encode(dense(g), client).payload, server)
    wanted = 2 * (ROWS if rowwise else 1)
    count = 0 if change == "none" else wanted + change
    bad = Predicted(torch.ones(count, dtype=torch.float64), Dense(torch.ones(SIZE, dtype=torch.float64)), LAYOUT)
    before = [vector.clone() for vector in remembered(server)]
    with pytest.raises(MessageError, match=rf"\b{wanted} coefficients"):
        stage.decode(bad, server)
    assert all(torch.equal(one, other) for one, other in zip(before, remembered(server), strict=True))


def test_coefficients_before_any_past_and_payloads_without_a_prediction_are_refused():
    stage = Predict(2, TopK(0.3))
    for payload in (
        Predicted(torch.ones(1), Dense(torch.ones(3)), [3]),
        Dense(torch.ones(3)),
        Coefficients(torch.ones(1), [3]),
    ):
        state = stage.init()
        with pytest.raises(MessageError, match=r"\b0 coefficients"):
            stage.decode(payload, state)
        assert state == stage.init()


# Decisions, and what is forgotten


def test_there_is_one_error_and_nothing_that_is_recycled():
    stage = Predict(2, TopK(0.3))
    state = stage.init()
    for index, g in enumerate(drifting(0, 4)):
        encoded = stage.encode(dense(g), state)
        payload, decision = encoded
        assert (decision.recycled, decision.coefficients, decision.threshold) == ((), (), None)
        assert len(decision.errors) == 1
        assert (decision.errors[0] == 1.0) == (index == 0)
        assert (encoded.needs_state, encoded.updates_state) == (index > 0, True)
        assert payload.coefficients.numel() == min(index, 2)


def test_a_forgotten_past_is_empty_and_the_corrections_is_forgotten_with_it():
    stage = Predict(2, LookBack(0.0))
    client, fresh = stage.init(), stage.init()
    updates = list(drifting(0, 4))
    for g in updates[:3]:
        stage.encode(dense(g), client)
    assert client != fresh
    stage.forget(client)
    assert client == fresh
    one, other = stage.encode(dense(updates[3]), client), stage.encode(dense(updates[3]), fresh)
    assert not one.needs_state
    assert one.payload.to_bytes() == other.payload.to_bytes()


def test_what_the_correction_keeps_back_survives_what_is_forgotten():
    stage = Predict(1, ErrorFeedback(TopK(0.5)))
    state = stage.init()
    stage.encode(dense([4.0, 2.0], [2]), state)  # 2 is kept back
    stage.forget(state)
    payload = stage.encode(dense([1.0, 1.0], [2]), state).payload
    assert payload.correction.dense().tolist() == [0.0, 3.0]


# Settings


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (-2, ValueError), ("2", TypeError), (1.5, TypeError)])
def test_a_rank_that_is_no_count_is_refused_by_name_and_value(rank, error):
    with pytest.raises(error, match=r"Predict\(rank=") as info:
        Predict(rank, TopK(0.1))
    assert repr(rank) in str(info.value)


@pytest.mark.parametrize("rank", [True, None])
def test_a_rank_that_is_no_number_is_refused(rank):
    with pytest.raises(TypeError, match=r"Predict\(rank="):
        Predict(rank, TopK(0.1))


@pytest.mark.parametrize("correction", [None, "TopK", [], (), 0.1, {}, TopK], ids=repr)
def test_a_correction_that_is_no_stage_is_refused_by_name_and_value(correction):
    with pytest.raises(TypeError, match=r"Predict\(correction=") as info:
        Predict(1, correction)
    assert repr(correction) in str(info.value)


def test_a_list_with_something_else_is_refused_by_value():
    with pytest.raises(TypeError, match="'topk'"):
        Predict(1, [TopK(0.1), "topk"])


def test_nothing_can_follow_a_prediction():
    assert Predict(1, TopK(0.1)).terminal
    assert ErrorFeedback(Predict(1, TopK(0.1))).terminal
    with pytest.raises(ValueError, match="last stage"):
        as_chain([Predict(1, TopK(0.1)), TopK(0.1)])


def test_the_representation_is_the_call_and_shows_rowwise_where_set():
    assert repr(Predict(2, [TopK(0.1)])) == "Predict(rank=2, correction=[TopK(fraction=0.1)])"
    assert repr(Predict(2, [TopK(0.1)], True)) == "Predict(rank=2, correction=[TopK(fraction=0.1)], rowwise=True)"


# Whole runs


def run(fit, uplink, rounds=12, **kwargs):
    torch.manual_seed(0)
    recorder = Recorder()
    strategy = LBGMFederated(num_clients=4, uplink=uplink, seed=0)
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    callbacks = [recorder, *kwargs.pop("callbacks", [])]
    trainer, module = fit(strategy, module=module, max_epochs=rounds, callbacks=callbacks, **kwargs)
    return trainer, module, recorder


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_run_foretells_logs_its_error_and_draws_it(fit, tmp_path, rowwise):
    uplink = [ErrorFeedback(Predict(2, TopK(0.1), rowwise))]
    logger = CSVLogger(tmp_path, name="run", version=0)
    *_, recorder = run(
        fit, uplink, val=True, logger=logger, callbacks=[LBGMCallback(monitor="val/acc")], log_every_n_steps=1
    )
    outcomes = {client.outcome for report in recorder.reports for client in report.clients}
    assert outcomes == {"predicted"}
    folder = tmp_path / "run" / "version_0"
    with open(folder / "metrics.csv") as file:
        logged = [row["lbgm/lbp_error_mean"] for row in csv.DictReader(file) if row.get("lbgm/lbp_error_mean")]
    means = [np.mean([client.decision.errors[0] for client in report.clients]) for report in recorder.reports]
    assert [float(value) for value in logged] == pytest.approx(means, rel=1e-5)
    assert means[0] == 1.0
    assert 0 < means[-1] < 0.9
    (table,) = folder.rglob("clients.csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 12
    assert {row["decision"] for row in rows} == {"predicted"}
    for row, client in zip(rows, [client for report in recorder.reports for client in report.clients]):
        assert int(row["client"]) == client.client_id
        assert float(row["lbp_error"]) == pytest.approx(client.decision.errors[0])
    for name in ("lbp_error.png", "metric_vs_uplink.png"):
        (figure,) = folder.rglob(name)
        assert figure.read_bytes().startswith(b"\x89PNG")
    # 83 numbers; of a tenth of them, 8, values and places; 2 or 26 coefficients.
    assert max(client.uplink_bits for r in recorder.reports for client in r.clients) < (0.8 if rowwise else 0.4) * 2656
    losses = [np.mean([client.loss for client in report.clients]) for report in recorder.reports]
    assert losses[-1] < 0.8 * losses[0]


def test_resuming_equals_the_unbroken_run_bitwise(fit, tmp_path):
    def started(**kwargs):
        return run(fit, [ErrorFeedback(Predict(2, [TopK(0.4), QSGD(7)]))], 6, **kwargs)

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    unbroken, _, recorder = started(callbacks=[checkpoint], enable_checkpointing=True)
    resumed, _, resumed_recorder = started(ckpt_path=tmp_path / "step=3.ckpt")
    assert len(resumed_recorder.params) == 3
    assert all(torch.equal(a, b) for a, b in zip(recorder.params[3:], resumed_recorder.params, strict=True))
    errors = [[[c.decision.errors for c in r.clients] for r in rec.reports] for rec in (recorder, resumed_recorder)]
    assert errors[0][3:] == errors[1]
    assert unbroken.strategy.ledger == resumed.strategy.ledger


def test_a_zero_update_is_foretold_by_any_past():
    stage = Predict(1, TopK(0.5))
    state = stage.init()
    updates = [torch.zeros(2), torch.tensor([1.0, 2.0]), torch.zeros(2)]
    assert [stage.encode(Dense(update), state).decision.errors for update in updates] == [(1.0,), (1.0,), (0.0,)]
