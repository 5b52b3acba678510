"""Look-back gradients in half the size, and for so many clients only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Recorder, fit_tiny

from lightning_lbgm import ATOMO, DIANA, Cast, ErrorFeedback, LBGMFederated, LookBack, RandK, SignSGD, TopK
from lightning_lbgm.compression import Chain, Context, Stage
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.rounded import Rounded
from lightning_lbgm.protocol.endpoints import ClientEnd, Rejection, ServerEnd
from lightning_lbgm.protocol.recency import LeastRecentlyUsed


def vector(seed: int, size: int = 12) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def lbgs(state) -> list[dict]:
    return state["stages"][-1]["lbgs"][0]["payloads"]


# Half the size

TINY = 1 + 2**-10  # bfloat16 has 8 bits: it is kept as 1


def test_the_test_is_that_of_the_rounded_lbg_and_a_refreshed_update_is_applied_as_it_is():
    stage = LookBack(0.2, dtype=torch.bfloat16)
    state = stage.init()
    encoded = stage.encode(Dense(torch.tensor([TINY, 0.0])), state)
    assert encoded.decoded.dense().tolist() == [TINY, 0.0]
    assert state["lbgs"][0]["payloads"][0]["values"].dtype == torch.bfloat16
    assert state["lbgs"][0]["gram"] == [[1.0]]
    encoded = stage.encode(Dense(torch.tensor([3.0, 1.0])), state)
    assert encoded.decision.coefficients == (3.0,)  # <g, l> / |l|^2 with l = (1, 0)
    assert encoded.decision.errors == pytest.approx((0.1,))  # 1 - 9 / 10
    assert encoded.decoded.dense().tolist() == [3.0, 0.0]


def test_the_gram_matrix_is_that_of_the_rounded_lbgs():
    stage = LookBack(0.0, rank=3, dtype="bfloat16")
    state = stage.init()
    for seed in range(5):
        stage.encode(Dense(vector(seed)), state)
    kept = [vector(seed).bfloat16().double() for seed in (2, 3, 4)]
    wanted = torch.stack(kept) @ torch.stack(kept).T
    gram = state["lbgs"][0]["gram"]
    found = torch.tensor([[gram[max(i, j)][min(i, j)] for j in range(3)] for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(p["values"].double(), k) for p, k in zip(state["lbgs"][0]["payloads"], kept))


@pytest.mark.parametrize(
    "uplink",
    [
        [LookBack(0.5, rank=2, dtype=torch.bfloat16)],
        [LookBack(0.5, "layer", dtype=torch.float16)],
        [LookBack(0.5, rank=2, rowwise=True, dtype=torch.bfloat16)],
        [TopK(0.5), LookBack(0.6, rank=2, dtype=torch.bfloat16)],
        [RandK(0.5), LookBack(0.6, dtype=torch.bfloat16)],
        [SignSGD(), LookBack(0.6, dtype=torch.bfloat16)],
        [ATOMO(1), LookBack(0.6, dtype=torch.bfloat16)],
        [Cast(torch.float16), LookBack(0.6, dtype=torch.bfloat16)],
        [ErrorFeedback([TopK(0.5), LookBack(0.6, dtype=torch.bfloat16)])],
    ],
    ids=repr,
)
def test_both_ends_keep_the_same(uplink):
    layout = [(3, 4), (5,)]
    client, server, twin = ClientEnd(0, uplink), ServerEnd(uplink, layout), Chain(uplink)
    state = twin.init()
    direction = vector(99, 17)
    for index in range(8):
        update = Dense(direction + 0.7 * vector(index, 17), layout)
        context = Context(index, seed=1)
        received = server.receive(client.send(update, index, context).to_bytes(), index, context)
        encoded = twin.encode(update, state, replace(context, path=(0,)))  # the ends make it the client's
        assert torch.equal(received.dense(), encoded.decoded.dense())


def test_what_is_smaller_already_stays():
    chain = Chain([SignSGD(), LookBack(0.2, dtype=torch.bfloat16)])
    state = chain.init()
    chain.encode(Dense(vector(0)), state)
    plain = Chain([SignSGD(), LookBack(0.2)])
    plain_state = plain.init()
    plain.encode(Dense(vector(0)), plain_state)
    assert lbgs(state)[0]["kind"] == lbgs(plain_state)[0]["kind"]


def test_sparse_values_and_factors_are_rounded():
    for stage, kind in ((TopK(0.5), "Sparse"), (ATOMO(1), "LowRank")):
        chain = Chain([stage, LookBack(0.2, dtype=torch.bfloat16)])
        state = chain.init()
        chain.encode(Dense(vector(0), [(3, 4)]), state)
        kept = lbgs(state)[0]
        kept = kept if kept["kind"] == kind else kept["parts"][0]
        assert (kept["kind"], kept["body"]["kind"]) == (kind, "Rounded")
        assert kept["body"]["values"].dtype == torch.bfloat16


@pytest.mark.parametrize("size", [0, 1, 5, 2**15, 2**16 + 3])
def test_products_and_sums_a_chunk_at_a_time(size):
    values = vector(0, size)
    payload = Rounded(values.bfloat16(), "float32", (size,))
    exact, other = values.bfloat16().double(), vector(1, size)
    assert payload.dot(Dense(other)) == pytest.approx(float(exact @ other.double()), rel=1e-4, abs=1e-4)
    assert Dense(other).dot(payload) == payload.dot(Dense(other))
    assert payload.squared_norm() == pytest.approx(float(exact @ exact), rel=1e-5)
    out = other.clone()
    payload.add_to(out, 0.5)
    assert torch.equal(out, other + 0.5 * values.bfloat16().float())


def test_products_of_tiny_values_keep_their_digits():
    payload = Rounded(torch.full((4,), 2.0**-80).bfloat16(), "float32", (4,))
    assert payload.squared_norm() == 4 * 2.0**-160


# A capacity


def reference(capacity: int, cohorts: list[list[int]]) -> list[list[int]]:
    """Return the clients kept after each round: the latest `capacity` by (round, place) of their last cohort."""
    last: dict[int, tuple[int, int]] = {}
    kept = []
    for index, cohort in enumerate(cohorts):
        last.update({client: (index, place) for place, client in enumerate(cohort)})
        kept.append(sorted(last, key=last.__getitem__)[-capacity:])
    return kept


@pytest.mark.parametrize("capacity", [1, 3, 4, 7, 20])
def test_the_least_recently_used_is_forgotten_and_never_more_than_one_is_over(capacity):
    generator = torch.Generator().manual_seed(capacity)
    cohorts = [torch.randperm(10, generator=generator)[:4].tolist() for _ in range(30)]
    recency, held = LeastRecentlyUsed(capacity), set()
    for cohort, wanted in zip(cohorts, reference(capacity, cohorts)):
        held -= set(recency.begin(cohort))
        for client in cohort:
            held.add(client)
            assert len(held) <= capacity + 1
            held -= {client} if recency.is_forgotten_after_turn(client) else set()
        recency.finish()
        assert recency.order == wanted
        assert held == set(wanted)


def test_a_run_keeps_so_many_and_the_others_send_in_full(tmp_path):
    recorder = Recorder()
    strategy = LBGMFederated(6, uplink=[LookBack(1.0)], clients_per_round=4, seed=0, client_capacity=3)
    fit_tiny(tmp_path, strategy, max_epochs=8, callbacks=[recorder])
    cohorts = [[client.client_id for client in report.clients] for report in recorder.reports]
    kept = [[], *reference(3, cohorts)]
    clients = strategy._federation.clients
    assert {k for k, state in clients.items() if state["uplink"]["stages"][0]["lbgs"]} == set(kept[-1])
    # At threshold 1 a client recycles where it has an LBG, and only there.
    for report, known in zip(recorder.reports, kept):
        assert [c.outcome == "recycled" for c in report.clients] == [c.client_id in known for c in report.clients]


def test_an_aborted_round_leaves_the_order():
    recency = LeastRecentlyUsed(2, [1, 2])
    recency.begin([5, 6])
    assert recency.order == [1, 2]
    assert recency.begin([1, 7]) == [2]
    recency.finish()
    assert recency.order == [1, 7]


def test_the_server_forgets_too_and_asks_for_a_full_update():
    uplink = [LookBack(1.0)]
    server, clients = ServerEnd(uplink, [3], capacity=2), [ClientEnd(k, uplink) for k in range(3)]
    update = torch.tensor([1.0, 2.0, 3.0])
    for client in (0, 1, 2):
        server.receive(clients[client].send(update, 0, Context(0)), 0, Context(0))
    continued = ServerEnd(uplink, [3], capacity=2)
    continued.load_state_dict(server.state_dict())
    message = clients[0].send(update, 1, Context(1))
    assert message.payload.size == 3
    with pytest.raises(Rejection) as caught:
        continued.receive(message, 1, Context(1))
    assert caught.value.forgotten
    clients[0].rejected(caught.value)
    assert continued.receive(clients[0].send(update, 2, Context(2)), 2, Context(2)).dense().tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(Rejection):  # 1 was the least recently used now
        continued.receive(clients[1].send(update, 2, Context(2)), 2, Context(2))
    assert continued.receive(clients[2].send(2 * update, 2, Context(2)), 2, Context(2)).dense().tolist() == [
        2.0,
        4.0,
        6.0,
    ]


# Settings


@pytest.mark.filterwarnings("ignore:.LookBack.store=")
def test_arguments_are_shown_where_they_are_set():
    assert repr(LookBack()) == "LookBack(threshold=0.2, granularity='model')"
    shown = repr(LookBack(store="dir", dtype="bfloat16", capacity=5))
    assert shown == "LookBack(threshold=0.2, granularity='model', store='dir', dtype=torch.bfloat16, capacity=5)"


@pytest.mark.filterwarnings("ignore:.LookBack.store=")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"store": 3}, TypeError),
        ({"store": ""}, ValueError),
        ({"dtype": "int8"}, ValueError),
        ({"capacity": 0}, ValueError),
        ({"capacity": 2.0}, TypeError),
    ],
)
def test_wrong_arguments_are_named(arguments, error):
    name = next(iter(arguments))
    with pytest.raises(error, match=rf"LookBack\({name}="):
        LookBack(**arguments)


class Aside(Cast):
    """A stage of one's own that need not be the last, with another inside."""

    def __init__(self, inside: Stage) -> None:
        super().__init__()
        self.inside = [inside]


def test_a_stage_that_names_store_or_capacity_warns_and_is_heard():
    with pytest.warns(FutureWarning, match=r"client_store=.*client_capacity="):
        strategy = LBGMFederated(2, uplink=[LookBack(store="a", capacity=4)])
    assert (strategy.session.settings.store, strategy.session.settings.capacity) == ("a", 4)
    with pytest.warns(FutureWarning):
        strategy = LBGMFederated(2, uplink=[LookBack(store="a", capacity=4)], client_store="b", client_capacity=1)
    assert (strategy.session.settings.store, strategy.session.settings.capacity) == ("b", 1)


@pytest.mark.parametrize(("name", "value"), [("client_store", ""), ("client_store", 3), ("client_capacity", 0)])
def test_a_wrong_store_or_capacity_is_named(name, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        LBGMFederated(2, **{name: value})


@pytest.mark.filterwarnings("ignore:.LookBack.store=")
def test_the_store_is_found_inside_and_must_be_one():
    inside = ErrorFeedback([TopK(0.1), DIANA(LookBack(store="a", capacity=4))])
    assert (Chain([inside]).store, Chain([inside]).capacity) == ("a", 4)
    assert Chain([TopK(0.1)]).store == "memory"
    with pytest.raises(ValueError, match="different values of `store`: 'a', 'b'"):
        LBGMFederated(2, uplink=[Aside(LookBack(store="a")), LookBack(store="b")])
    assert repr(Chain([LookBack(store="a")]).without_store()) == repr([LookBack()])
