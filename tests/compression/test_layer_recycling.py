"""Layer recycling: which layers are left out, what the server uses instead, and what it saves."""

import itertools

import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lbgm import LBGMFederated
from lightning_lbgm.compression import (
    NO_CONTEXT,
    Context,
    ErrorFeedback,
    LayerRecycling,
    Omitted,
    RoundResult,
    TopK,
    as_chain,
)
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.protocol.message import Message, MessageError

LAYOUT = Layout([2, (1, 3), 1])


def end_round(stage, shared, params, update, seed=0, round_index=0, layout=LAYOUT):
    result = RoundResult(layout, torch.tensor(params), torch.tensor(update), (1,), (1,), (None,))
    stage.end_round(shared, result, Context(round_index, shared, seed, (-1,)))
    return shared["layers"]


# Two clients and three tensors


def test_two_clients_and_three_tensors_by_hand():
    stage = LayerRecycling(1)
    shared, states = stage.init_shared(), [stage.init(), stage.init()]

    def play(round_index, one, two):
        """One round with weights 1/4 and 3/4; return the payloads and the mean of what the server decodes."""
        mean, payloads = torch.zeros(6), []
        for client, (values, state, weight) in enumerate(zip((one, two), states, (0.25, 0.75))):
            context = Context(round_index, shared, seed=0, path=(client,))
            payload = stage.encode(Dense(torch.tensor(values), LAYOUT), state, context).payload
            received = Message.from_bytes(Message(client, payload).to_bytes(), LAYOUT).payload
            decoded = stage.decode(received, {}, context)
            decoded.add_to(mean, weight)
            payloads.append(payload)
        return payloads, mean

    # Round 0: everything is sent. The mean is (1, 1, 2, 0, 0, 4).
    payloads, mean = play(0, [4.0, 1.0, 8.0, 0.0, 0.0, 4.0], [0.0, 1.0, 0.0, 0.0, 0.0, 4.0])
    assert [payload.num_bits for payload in payloads] == [6 * 32] * 2
    assert mean.tolist() == [1.0, 1.0, 2.0, 0.0, 0.0, 4.0]
    # |theta| / |update| is about 1e-15, 1e15 / 2 and 1e-15: the second tensor is drawn.
    assert end_round(stage, shared, [1e-15, 0.0, 1e15, 0.0, 0.0, 4e-15], mean.tolist()) == [1]

    # Round 1: its three numbers are not sent, and the server repeats (2, 0, 0). The mean of the rest is (2, 3) and 5.
    payloads, mean = play(1, [2.0, 0.0, 9.0, 9.0, 9.0, 8.0], [2.0, 4.0, -7.0, 9.0, 9.0, 4.0])
    assert [type(part) for part in payloads[0].parts] == [Dense, Omitted, Dense]
    assert [payload.num_bits for payload in payloads] == [8 * 3 * 3 + 3 * 32] * 2  # three bytes of framing a tensor
    assert mean.tolist() == [2.0, 3.0, 2.0, 0.0, 0.0, 5.0]
    # Now the first tensor is longest, compared with what moved it.
    assert end_round(stage, shared, [1e15, 0.0, 1e-15, 0.0, 0.0, 1e-15], mean.tolist(), round_index=1) == [0]

    # Round 2: the first tensor repeats (2, 3), the second is sent again.
    payloads, mean = play(2, [7.0, 7.0, 4.0, 0.0, 4.0, 1.0], [7.0, 7.0, 0.0, 4.0, 0.0, 1.0])
    assert [type(part) for part in payloads[0].parts] == [Omitted, Dense, Dense]
    assert [payload.num_bits for payload in payloads] == [8 * 3 * 3 + 4 * 32] * 2
    assert mean.tolist() == [2.0, 3.0, 1.0, 3.0, 1.0, 1.0]
    assert states == [{}, {}]  # clients keep nothing


def test_the_update_that_is_repeated_is_a_copy():
    stage = LayerRecycling(1)
    shared = stage.init_shared()
    params, mean = torch.ones(6), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    stage.end_round(shared, RoundResult(LAYOUT, params, mean, (1,), (1,), (None,)), Context(0, shared, 0, (-1,)))
    mean.fill_(99.0)  # the server's sum, cleared at the start of a round
    assert shared["update"].tolist() == [1.0] * 6


def test_without_a_context_everything_is_sent():
    stage = LayerRecycling(1)
    payload = stage.encode(Dense(torch.arange(6.0), LAYOUT), stage.init(), NO_CONTEXT).payload
    assert payload.num_bits == 6 * 32
    assert stage.decode(payload, stage.init(), NO_CONTEXT).dense().tolist() == list(range(6))


@pytest.mark.parametrize("omitted", [[], [0], [0, 1], [1, 2]])
def test_a_message_that_leaves_out_other_layers_is_refused(omitted):
    stage = LayerRecycling(1)
    shared = {"layers": [1], "update": torch.ones(6)}
    parts = Dense(torch.arange(6.0), LAYOUT).split()
    sent = Blocks([Omitted("float32", p.layout) if i in omitted else p for i, p in enumerate(parts)], LAYOUT)
    with pytest.raises(MessageError, match=r"\[1\]"):
        stage.decode(sent, {}, Context(3, shared))


def test_an_omitted_tensor_has_no_bit_and_no_body():
    omitted = Omitted("float64", [(2, 3)])
    assert (omitted.num_bits, omitted.to_bytes(), omitted.size, omitted.dtype) == (0, b"", 6, torch.float64)
    assert omitted.dense().tolist() == [0.0] * 6
    assert omitted.squared_norm() == 0.0


def test_what_comes_before_compresses_the_layers_that_are_sent():
    # TopK sends 5, 4 and 3; the second tensor, which is left out, has the last of them.
    chain = as_chain([TopK(0.5), LayerRecycling(1)])
    shared = chain.init_shared()
    shared["stages"][1].update(layers=[1], update=torch.full((6,), 7.0))
    context = Context(1, shared, 0, (0,))
    encoded = chain.encode(Dense(torch.tensor([5.0, 1.0, 1.0, 3.0, 1.0, -4.0]), LAYOUT), chain.init(), context)
    payload = encoded.payload
    assert [type(part) for part in payload.parts] == [Sparse, Omitted, Sparse]
    assert payload.num_bits == 8 * 3 * 3 + 2 * (8 * (4 + 1) + 32)
    assert encoded.decoded.dense().tolist() == [5.0, 0.0, 7.0, 7.0, 7.0, -4.0]


def test_inside_error_feedback_what_the_server_repeats_instead_of_the_update_is_made_up_for():
    stage = ErrorFeedback(LayerRecycling(1))
    shared, state = stage.init_shared(), stage.init()
    sent = total = torch.zeros(6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        update = torch.randn(6, generator=generator, dtype=torch.float64)
        context = Context(index, shared, 0, (0,))
        decoded = stage.encode(Dense(update, LAYOUT), state, context).decoded.dense()
        sent, total = sent + decoded, total + update
        np.testing.assert_allclose((sent + state["residual"]).numpy(), total.numpy(), atol=1e-12)
        result = RoundResult(LAYOUT, torch.ones(6).double(), decoded, (1,), (1,), (None,))
        stage.end_round(shared, result, Context(index, shared, 0, (-1,)))


# The draw


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_layers_that_moved_least_compared_with_their_size_are_drawn_where_the_ratios_are_extreme(num_layers):
    # |update| / |theta| falls by 1e9 from each tensor to the next one in a random order, whatever their sizes.
    layout = Layout([3, 1, 4, 2])
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(4)
        ratios = 10.0 ** (-9.0 * order)
        lengths = np.random.default_rng(seed).uniform(0.1, 10, size=4)
        params = np.concatenate([[length] + [0.0] * (n - 1) for length, n in zip(lengths, layout.sizes)])
        moves = np.concatenate([[0.0] * (n - 1) + [-r * x] for r, x, n in zip(ratios, lengths, layout.sizes)])
        stage = LayerRecycling(num_layers)
        drawn = end_round(stage, stage.init_shared(), params.tolist(), moves.tolist(), seed, layout=layout)
        assert drawn == sorted(np.argsort(ratios)[:num_layers].tolist())


def test_a_tensor_that_did_not_move_is_drawn_and_one_that_is_zero_is_not():
    stage = LayerRecycling(1)
    for seed in range(50):
        moved = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        assert end_round(stage, stage.init_shared(), [1.0] * 6, moved, seed) == [1]
        params = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
        assert end_round(stage, stage.init_shared(), params, [1.0] * 6, seed) == [1]


def draws(num_layers, params, update, layout, number=4000):
    stage = LayerRecycling(num_layers)
    return [tuple(end_round(stage, {}, params, update, seed, layout=layout)) for seed in range(number)]


def chi_square(counts, probabilities):
    expected = sum(counts) * np.array(probabilities)
    return float(((np.array(counts) - expected) ** 2 / expected).sum())


def test_one_layer_is_drawn_with_a_probability_proportional_to_its_inverse_ratio():
    # |theta| = 5, 2, 1, 6 and |update| = 1, 4, 1, 2: the inverse ratios are 5, 0.5, 1 and 3.
    layout = Layout([2, 1, 1, 3])
    params, update = [3.0, 4.0, -2.0, 1.0, 2.0, 4.0, 4.0], [0.6, -0.8, 4.0, -1.0, 0.0, 2.0, 0.0]
    drawn = draws(1, params, update, layout)
    counts = [drawn.count((layer,)) for layer in range(4)]
    assert sum(counts) == 4000
    # 3 degrees of freedom: above 21.1 once in 10,000 times.
    assert chi_square(counts, np.array([5, 0.5, 1, 3]) / 9.5) < 21.1
    assert chi_square(counts, np.array([1, 8, 4, 4 / 3]) / (43 / 3)) > 1000  # the ratios themselves


def test_two_layers_are_drawn_one_after_the_other_without_replacement():
    layout, weights = Layout([1, 1, 1, 1]), np.array([5, 0.5, 1, 3])
    drawn = draws(2, weights.tolist(), [1.0] * 4, layout)
    p = weights / weights.sum()
    pairs = list(itertools.combinations(range(4), 2))
    probabilities = [p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs]
    assert sum(probabilities) == pytest.approx(1)
    # 5 degrees of freedom: above 25.7 once in 10,000 times.
    assert chi_square([drawn.count(pair) for pair in pairs], probabilities) < 25.7


def test_the_draw_follows_from_seed_and_round_alone():
    stage, params, update = LayerRecycling(1), [1.0] * 6, [1.0] * 6

    def sequence(seed):
        return [end_round(stage, {}, params, update, seed, index)[0] for index in range(40)]

    torch.manual_seed(1)
    first = sequence(0)
    torch.manual_seed(2)
    assert sequence(0) == first
    assert sequence(1) != first
    assert set(first) == {0, 1, 2}


# Settings


@pytest.mark.parametrize("num_layers", [0, -1])
def test_a_number_that_is_not_positive_is_refused_by_name_and_value(num_layers):
    with pytest.raises(ValueError, match=r"LayerRecycling\(num_layers=") as info:
        LayerRecycling(num_layers)
    assert repr(num_layers) in str(info.value)


@pytest.mark.parametrize("num_layers", [1.0, "2", None, True, [1]])
def test_what_is_no_whole_number_is_refused_by_name_and_value(num_layers):
    with pytest.raises(TypeError, match=r"LayerRecycling\(num_layers=") as info:
        LayerRecycling(num_layers)
    assert repr(num_layers) in str(info.value)


@pytest.mark.parametrize("num_layers", [3, 4])
def test_a_number_that_leaves_nothing_to_send_is_refused_in_the_first_round(num_layers):
    stage = LayerRecycling(num_layers)
    with pytest.raises(ValueError, match=rf"LayerRecycling\(num_layers={num_layers}\).*3 trainable"):
        stage.encode(Dense(torch.zeros(6), LAYOUT), stage.init(), Context(0, stage.init_shared()))


def test_it_stands_last():
    with pytest.raises(ValueError, match="last stage"):
        as_chain([LayerRecycling(1), TopK(0.1)])
    assert repr(LayerRecycling(2)) == "LayerRecycling(num_layers=2)"


# Through the Trainer

SIZES = (48, 8, 24, 3)


class States(Recorder):
    """Also what the server keeps for all clients, as a checkpoint has it after each round."""

    def __init__(self, path):
        super().__init__()
        self.path, self.shared = path, []

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        trainer.save_checkpoint(self.path)
        state = torch.load(self.path, weights_only=True)["lightning_lbgm"]["uplink"]
        self.shared.append(state["stages"][-1])


def federate(fit, recorder, num_layers=2, seed=0, rounds=8, **kwargs):
    torch.manual_seed(0)
    module = TinyModule(lr=0.2, net=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    strategy = LBGMFederated(num_clients=3, uplink=[LayerRecycling(num_layers)], local_steps=2, seed=seed)
    callbacks = [recorder, *kwargs.pop("callbacks", [])]
    return fit(strategy, module=module, batch_size=8, shuffle=True, max_epochs=rounds, callbacks=callbacks, **kwargs)


def test_the_global_parameters_of_a_recycled_layer_move_by_the_last_mean_update_again(fit, tmp_path):
    recorder = States(tmp_path / "state.ckpt")
    federate(fit, recorder)
    moves = [(before - after).split(SIZES) for before, after in itertools.pairwise(recorder.params)]
    seen = set()
    for index, (last, now) in enumerate(itertools.pairwise(moves), start=1):
        recycled = recorder.shared[index]["layers"]  # drawn after round `index`; `now` is the move of the one after
        assert len(recycled) == 2
        seen |= set(recycled)
        for layer in range(4):
            same = torch.allclose(last[layer], now[layer], rtol=1e-4, atol=1e-6)
            assert same == (layer in recycled), (index, layer)
    assert len(seen) >= 3


def test_the_bits_of_recycled_layers_are_saved(fit, tmp_path):
    recorder = States(tmp_path / "state.ckpt")
    trainer, _ = federate(fit, recorder)
    total = 0
    for index, report in enumerate(recorder.reports):
        recycled = recorder.shared[index - 1]["layers"] if index else []
        sent = sum(size for layer, size in enumerate(SIZES) if layer not in recycled)
        # Kind, size and length of each tensor; the length of 48 floats, 192 bytes, takes two bytes.
        framing = 8 * (3 * 4 + (0 not in recycled)) if index else 0
        assert {client.uplink_bits for client in report.clients} == {32 * sent + framing}
        assert {client.dense_bits for client in report.clients} == {32 * 83}
        assert {client.decision for client in report.clients} == {None}
        total += 3 * (32 * sent + framing)
    savings = 1 - total / (8 * 3 * 32 * 83)
    assert float(trainer.callback_metrics["comm/savings"]) == pytest.approx(savings, abs=1e-6)
    assert savings > 0


def test_a_seed_fixes_which_layers_are_recycled_and_another_one_draws_others(fit, tmp_path):
    runs = [States(tmp_path / "state.ckpt") for _ in range(3)]
    for recorder, seed in zip(runs, (0, 0, 1)):
        federate(fit, recorder, num_layers=1, seed=seed, rounds=10)
    layers = [[shared["layers"] for shared in recorder.shared] for recorder in runs]
    assert layers[0] == layers[1] != layers[2]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].params, runs[1].params))


def test_resuming_equals_the_unbroken_run_bitwise(fit, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    unbroken, resumed = States(tmp_path / "a.ckpt"), States(tmp_path / "b.ckpt")
    one, _ = federate(fit, unbroken, callbacks=[checkpoint], enable_checkpointing=True)
    other, _ = federate(fit, resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert len(resumed.reports) == 5
    assert unbroken.reports[3:] == resumed.reports
    assert all(torch.equal(a, b) for a, b in zip(unbroken.params[3:], resumed.params, strict=True))
    for a, b in zip(unbroken.shared[3:], resumed.shared, strict=True):
        assert a["layers"] == b["layers"]
        assert torch.equal(a["update"], b["update"])
    assert one.strategy.ledger == other.strategy.ledger


def test_too_many_layers_end_the_fit_with_both_numbers(fit):
    strategy = LBGMFederated(num_clients=3, uplink=[LayerRecycling(2)], seed=0)
    with pytest.raises(ValueError, match=r"num_layers=2.*2 trainable parameter tensors"):
        fit(strategy)
