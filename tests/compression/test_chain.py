"""Chains of stages: order, composition, what is refused."""

import pytest
import torch
from conftest import flat_params

from lightning_lbgm import LBGMFederated
from lightning_lbgm.compression import (
    DIANA,
    NO_CONTEXT,
    QSGD,
    Chain,
    Context,
    Decision,
    Encoded,
    ErrorFeedback,
    LayerRecycling,
    LookBack,
    PowerSGD,
    Predict,
    SignSGD,
    Stage,
    TopK,
    as_chain,
)
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.protocol.endpoints import ClientEnd, ServerEnd

UPDATE = torch.tensor([4.0, -3.0, 0.5, 1.0])


def test_an_empty_chain_sends_the_update_as_it_is():
    chain = as_chain([])
    encoded = chain.encode(Dense(UPDATE, (1, 3)), chain.init())
    payload, decision = encoded
    assert torch.equal(payload.dense(), UPDATE)
    assert payload.sizes == (1, 3)
    assert payload.num_bits == 4 * 32
    assert decision is None
    assert (encoded.needs_state, encoded.updates_state) == (False, False)
    assert torch.equal(encoded.decoded.dense(), UPDATE)
    assert torch.equal(chain.decode(payload, chain.init()).dense(), UPDATE)


def test_stages_encode_in_order():
    # TopK first: 4 and -3 are kept, and their mean magnitude 7 / 2 with the signs (+, -) is sent.
    # SignSGD first: mean magnitude 8.5 / 4 on all, then the sparsifier sends 2 of them.
    first = as_chain([TopK(0.5), SignSGD()])
    assert first.encode(Dense(UPDATE), first.init()).payload.dense().tolist() == [3.5, -3.5, 0.0, 0.0]
    second = as_chain([SignSGD(), TopK(0.5)])
    payload = second.encode(Dense(UPDATE), second.init()).payload
    assert sorted(payload.dense().abs().tolist()) == [0.0, 0.0, 2.125, 2.125]


def test_look_back_tests_the_compressed_update():
    # Both compress to multiples of (1, 0, 0, 0), though the updates themselves are 82 degrees apart (cos = 3 / 21).
    chain = as_chain([TopK(0.25), LookBack(0.1)])
    state = chain.init()
    chain.encode(Dense(torch.tensor([2.0, 1.0, 1.0, 1.0])), state)
    encoded = chain.encode(Dense(torch.tensor([6.0, -3.0, -3.0, -3.0])), state)
    payload, decision = encoded
    assert isinstance(payload, Coefficients)
    assert decision.recycled == (True,)
    assert decision.coefficients == (3.0,)
    assert (encoded.needs_state, encoded.updates_state) == (True, False)
    assert encoded.decoded.dense().tolist() == [6.0, 0.0, 0.0, 0.0]


def test_the_decision_of_a_look_back_inside_error_feedback_reaches_the_outside():
    chain = as_chain([TopK(0.5), ErrorFeedback(LookBack(0.2))])
    state = chain.init()
    assert chain.encode(Dense(UPDATE), state).decision.recycled == (False,)
    assert chain.encode(Dense(UPDATE), state).decision.recycled == (True,)


def test_what_a_stage_before_the_last_decided_is_kept():
    class Deciding(Stage):
        def encode(self, update, state, context):
            return Encoded(update, Decision((False,), (0.5,), (float("nan"),)))

    chain = as_chain([Deciding(), TopK(0.5)])
    payload, decision = chain.encode(Dense(UPDATE), chain.init())
    assert decision.errors == (0.5,)
    assert payload.num_bits == 8 * (4 + 1) + 2 * 32  # framing, a byte of indices, two values


def test_each_stage_draws_from_a_seed_of_its_own_that_follows_from_run_round_and_client():
    class Drawing(Stage):
        def init(self):
            return {"seeds": []}

        def encode(self, update, state, context):
            state["seeds"].append(context.draw_seed())
            return Encoded(update)

    chain = as_chain([Drawing(), ErrorFeedback([Drawing(), Drawing()]), Drawing()])

    def seeds(*context):
        states = chain.init()
        chain.encode(Dense(UPDATE), states, Context(*context))
        first, second, third = states["stages"]
        return [state["seeds"][0] for state in (first, *second["stage"]["stages"], third)]

    drawn = seeds(3, {}, 0, (7,))
    assert drawn == seeds(3, {}, 0, (7,))
    others = [seeds(4, {}, 0, (7,)), seeds(3, {}, 1, (7,)), seeds(3, {}, 0, (8,))]
    everything = sum(others, drawn)
    assert len(set(everything)) == len(everything) == 16
    assert seeds(3) != seeds(3)  # without the run's seed: torch's global generator


def test_a_chain_of_compressors_makes_no_decision():
    chain = as_chain([ErrorFeedback(TopK(0.5)), SignSGD()])
    assert chain.encode(Dense(UPDATE), chain.init()).decision is None


def test_a_stage_a_list_and_a_chain_make_the_same_chain():
    stage = TopK(0.5)
    assert as_chain(stage).stages == as_chain([stage]).stages == as_chain((stage,)).stages == [stage]
    chain = Chain([stage])
    assert as_chain(chain) is chain
    assert repr(chain) == "[TopK(fraction=0.5)]"


def test_the_chain_does_not_follow_later_changes_of_the_list():
    stages = [TopK(0.5)]
    chains = [Chain(stages), as_chain(stages)]
    stages.append(SignSGD())
    assert [len(chain.stages) for chain in chains] == [1, 1]


@pytest.mark.parametrize(
    ("stages", "terminal"),
    [([], False), ([TopK(0.1)], False), ([TopK(0.1), LookBack()], True), ([ErrorFeedback(LookBack())], True)],
)
def test_a_chain_is_terminal_where_its_last_stage_is(stages, terminal):
    assert as_chain(stages).terminal is terminal


@pytest.mark.parametrize(
    ("stages", "first", "second"),
    [
        ([LookBack(0.3), TopK(0.1)], "LookBack(threshold=0.3, granularity='model')", "TopK(fraction=0.1)"),
        ([SignSGD(), LookBack(0.3), SignSGD()], "LookBack(threshold=0.3, granularity='model')", "SignSGD()"),
        (
            [ErrorFeedback(LookBack(0.3)), TopK(0.1)],
            "ErrorFeedback(LookBack(threshold=0.3, granularity='model'))",
            "TopK(fraction=0.1)",
        ),
        (
            [LookBack(0.3), LookBack(0.4)],
            "LookBack(threshold=0.3, granularity='model')",
            "LookBack(threshold=0.4, granularity='model')",
        ),
    ],
)
@pytest.mark.parametrize("make", [Chain, as_chain, ErrorFeedback])
def test_look_back_must_be_last_and_the_error_names_both(make, stages, first, second):
    with pytest.raises(ValueError, match="last stage") as info:
        make(stages)
    assert first in str(info.value)
    assert second in str(info.value)


@pytest.mark.parametrize("wrong", [0.2, "TopK", None, TopK, torch.zeros(2)])
def test_what_is_no_stage_is_refused_by_name_and_value(wrong):
    with pytest.raises(TypeError, match="`uplink`") as info:
        as_chain([TopK(0.1), wrong])
    assert repr(wrong) in str(info.value)
    assert type(wrong).__name__ in str(info.value)


@pytest.mark.parametrize("wrong", [0.2, 3])
def test_what_is_no_sequence_is_refused(wrong):
    with pytest.raises(TypeError):
        as_chain(wrong)


# Decoding in reverse order


class Shift(Stage):
    """Send ``factor * update + offset``: nothing is lost, but it has to be undone."""

    def __init__(self, factor, offset):
        self.factor, self.offset = factor, offset

    def encode(self, update, state, context=NO_CONTEXT):
        return Encoded(Dense(self.factor * update.dense() + self.offset, update.layout))

    def decode(self, payload, state, context=NO_CONTEXT):
        return Dense((payload.dense() - self.offset) / self.factor, payload.layout)


class FromLast(Stage):
    """Send the difference to the last update: both ends remember what was decoded."""

    def init(self):
        return {"last": None}

    def encode(self, update, state, context=NO_CONTEXT):
        last, state["last"] = state["last"], update.dense().clone()
        return Encoded(
            Dense(state["last"] - (0 if last is None else last), update.layout),
            decode=lambda payload: payload if last is None else Dense(payload.dense() + last, payload.layout),
            needs_state=last is not None,
            updates_state=True,
        )

    def decode(self, payload, state, context=NO_CONTEXT):
        state["last"] = payload.dense() + (0 if state["last"] is None else state["last"])
        return Dense(state["last"].clone(), payload.layout)


@pytest.mark.parametrize(
    "behind",
    [[], [TopK(1.0)], [TopK(1.0), Shift(4.0, -1.0)], [LookBack(0.0)], [ErrorFeedback(LookBack(0.0))]],
    ids=repr,
)
@pytest.mark.parametrize("front", [[Shift(2.0, 1.0)], [Shift(2.0, 1.0), Shift(-0.5, 3.0)], [FromLast()]], ids=repr)
def test_each_stage_of_a_chain_decodes_what_the_ones_behind_it_have_decoded(front, behind):
    # All of these lose nothing, so the server must get the updates themselves, whole numbers that stay exact.
    chain = as_chain([*front, *behind])
    client, server = chain.init(), chain.init()
    for round_index in range(3):
        update = UPDATE * (round_index + 1)
        encoded = chain.encode(Dense(update), client, Context(round_index))
        payload = encoded.payload
        assert not torch.equal(payload.dense(), update) or (front[0].__class__ is FromLast and round_index == 0)
        assert encoded.decoded.dense().tolist() == update.tolist()
        assert chain.decode(payload, server, Context(round_index)).dense().tolist() == update.tolist()


def test_stages_before_the_last_say_what_the_message_refers_to():
    chain = as_chain([FromLast(), TopK(1.0)])
    state = chain.init()
    encoded = [chain.encode(Dense(UPDATE), state) for _ in range(2)]
    assert [(one.needs_state, one.updates_state) for one in encoded] == [(False, True), (True, True)]


def test_the_ends_keep_in_step_by_what_a_stage_before_the_last_remembers():
    uplink = [FromLast(), TopK(1.0)]
    client, server = ClientEnd(0, uplink), ServerEnd(uplink, [4])
    for round_index in range(3):
        message = client.send(UPDATE * 2**round_index, round_index, Context(round_index))
        received = server.receive(message.to_bytes(), round_index, Context(round_index))
        assert received.dense().tolist() == (UPDATE * 2**round_index).tolist()


def test_a_stage_that_decodes_from_a_state_must_say_what_the_server_sees():
    class Forgetful(FromLast):
        def encode(self, update, state, context=NO_CONTEXT):
            return Encoded(update)

    for stages in ([Forgetful()], [Forgetful(), TopK(1.0)], [ErrorFeedback(Forgetful())]):
        chain = as_chain(stages)
        with pytest.raises(TypeError, match=r"Forgetful has a state.*return `Encoded\(payload, decode=function\)`"):
            chain.encode(Dense(UPDATE), chain.init())


def test_a_stage_must_not_decode_on_the_client_alone():
    class OneSided(FromLast):
        decode = Stage.decode

    chain = as_chain([OneSided(), TopK(1.0)])
    with pytest.raises(TypeError, match=r"OneSided returns `Encoded\(decode=...\)`.*override `decode` too"):
        chain.encode(Dense(UPDATE), chain.init())


def test_layers_that_the_server_repeats_are_not_decoded_once_more():
    for front in (Shift(2.0, 1.0), ErrorFeedback(Shift(2.0, 1.0))):
        with pytest.raises(ValueError, match=r"LayerRecycling\(num_layers=1\).*Shift"):
            as_chain([front, TopK(0.5), LayerRecycling(1)])
        with pytest.raises(ValueError, match="LayerRecycling"):
            as_chain([front, ErrorFeedback(LayerRecycling(1))])
    for make in (lambda: DIANA(LayerRecycling(1)), lambda: Predict(1, [TopK(0.5), ErrorFeedback(LayerRecycling(1))])):
        with pytest.raises(ValueError, match="correction=.*LayerRecycling"):
            make()
    assert as_chain([ErrorFeedback(TopK(0.5)), ErrorFeedback(LayerRecycling(1))]).terminal


def test_a_fit_decodes_every_stage(fit):
    torch.manual_seed(0)
    plain = flat_params(fit(LBGMFederated(num_clients=2, uplink=[]))[1])
    found = flat_params(fit(LBGMFederated(num_clients=2, uplink=[Shift(2.0, 0.0), TopK(1.0)]))[1])
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: as_chain([LookBack]), r"write LookBack\(threshold=0.2\)"),
        (lambda: as_chain(LookBack), r"write LookBack\(threshold=0.2\)"),
        (lambda: as_chain([TopK(0.1), SignSGD]), r"write SignSGD\(\)"),
        (lambda: as_chain([PowerSGD]), r"write PowerSGD\(rank=2\)"),
        (lambda: ErrorFeedback(TopK), r"ErrorFeedback\(stage=.*write TopK\(fraction=0.1\)"),
        (lambda: ErrorFeedback([QSGD, TopK(0.1)]), r"write QSGD\(levels=7\)"),
        (lambda: Predict(2, TopK), r"Predict\(correction=.*write TopK\(fraction=0.1\)"),
        (lambda: LBGMFederated(num_clients=2, uplink=[LookBack]), r"write LookBack\(threshold=0.2\)"),
    ],
)
def test_a_class_in_the_place_of_a_stage_gets_the_remedy(make, remedy):
    with pytest.raises(TypeError, match=remedy):
        make()
