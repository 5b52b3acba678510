"""A hostile or broken node is refused, counted and named; one that is killed comes back; a stranger stays out."""

from __future__ import annotations

import json
import logging
import math
import struct
import time
import zlib
from dataclasses import fields

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from in_process import TRAIN, Data, MemoryGrid, make_apps, make_net, parts, same, serve, subset

from lightning_lbgm import LookBack, TopK
from lightning_lbgm.flower import LBGMStrategy, federated_client_app
from lightning_lbgm.flower.logged import unpack
from lightning_lbgm.flower.records import Greeting, RecordError, Refusal, Task, Work, read, write
from lightning_lbgm.payloads import Dense
from lightning_lbgm.protocol.message import Message as OurMessage
from recipes.flower.certificates import make_node_key
from recipes.flower.federation import Federation
from recipes.flower.simulate import simulate

SETTINGS = {"uplink": [LookBack(1.0)], "local_steps": 1}
EVIL = 101


def changed(**values):
    """A reply of which fields are replaced."""
    return lambda reply: [
        with_content(reply, RecordDict({"lbgm": ConfigRecord({**dict(reply.content["lbgm"]), **values})}))
    ]


def with_content(reply, content):
    fresh = Message(content, 1, "train")
    fresh.metadata.__dict__.update(reply.metadata.__dict__)
    return fresh


def message_of(reply):
    return reply.content["lbgm"]["message"]


def rewritten(change):
    """A reply whose message is written anew, with a checksum that fits."""

    def tamper(reply):
        data = bytearray(message_of(reply))
        change(data)
        data[32:36] = struct.pack("<I", zlib.crc32(bytes(data[36:]), zlib.crc32(bytes(data[:32]))))
        return changed(message=bytes(data))(reply)

    return tamper


def giant(data):
    data[24:32] = struct.pack("<Q", 2**39)


def not_a_number(data):
    data[36:40] = struct.pack("<f", math.nan)


def of_client_0(data):
    data[4:8] = struct.pack("<I", 0)


def of_round_99(data):
    data[8:12] = struct.pack("<I", 99)


def another_size(reply):
    return changed(message=OurMessage(1, Dense(torch.zeros(7)), {}, 1, 2, 0, 1).to_bytes())(reply)


def foreign_buffer(reply):
    size = 195
    data = OurMessage(1, Dense(torch.zeros(size)), {"mine": torch.zeros(3)}, 1, 2, 0, 1).to_bytes()
    return changed(message=data)(reply)


CASES = {
    "garbage": (changed(message=b"\x00garbage" * 20), "format version"),
    "nothing": (changed(message=b""), "truncated"),
    "truncated": (lambda reply: changed(message=message_of(reply)[:-1])(reply), "checksum"),
    "giant": (rewritten(giant), "not 195"),
    "another size": (another_size, "holds an update of 7 entries"),
    "not a number": (rewritten(not_a_number), "not finite"),
    "another client": (rewritten(of_client_0), "is of client 0"),
    "another round": (rewritten(of_round_99), "round 99"),
    "foreign buffer": (foreign_buffer, "buffer 'mine'"),
    "says it is another": (changed(client_id=0), "answer is of client 0"),
    "another ticket": (changed(ticket="0" * 16), "another ticket"),
    "says another round": (changed(round_index=0), "round 0"),
    "negative": (changed(local_steps=-5), "out of range"),
    "wrong type": (changed(message="text"), "a str, not bytes"),
    "errors": (changed(tested=True, recycled=[True], errors=[7.0], coefficients=[1.0]), "not in [0, 1]"),
    "unknown field": (changed(more=1), "has the fields"),
    "version": (changed(version=99), "same version of lightning_lbgm"),
    "arrays": (
        lambda reply: [with_content(reply, RecordDict({"lbgm": ArrayRecord({"a": Array(torch.zeros(3).numpy())})}))],
        "one `ConfigRecord`",
    ),
    "metrics": (
        lambda reply: [with_content(reply, RecordDict({**dict(reply.content), "more": MetricRecord({"a": 1.0})}))],
        "nothing else",
    ),
    "nothing at all": (lambda reply: [with_content(reply, RecordDict())], "one `ConfigRecord`"),
    "crash": (lambda reply: [Message(Error(0, "out of memory"), reply_to=_asked(reply))], "out of memory"),
    "silence": (lambda reply: [], "No answer"),
}


def _asked(reply):
    asked = Message(RecordDict(), reply.metadata.src_node_id, "train")
    asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return asked


@pytest.fixture
def flower_log(caplog, monkeypatch):
    """What is told to Flower's logger, which may keep it from the root."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    return caplog


def test_replies_that_are_none_are_refused_and_each_round_goes_on(tmp_path, flower_log):
    names = list(CASES)  # one a round, after the first

    def meddle(reply, message):
        server_round, node = int(message.metadata.group_id or 1), message.metadata.dst_node_id
        return CASES[names[server_round - 2]][0](reply) if node == EVIL and server_round > 1 else [reply]

    grid = MemoryGrid(make_apps(num_clients=2, **SETTINGS), tamper=meddle)
    module, seen, strategy, _ = serve(tmp_path, grid, rounds=len(CASES) + 1, num_clients=2, **SETTINGS)
    lines = [record.getMessage() for record in flower_log.records if "is left out" in record.getMessage()]
    assert len(lines) == len(CASES)
    for number, (name, line) in enumerate(zip(names, lines), start=1):
        assert line.startswith(f"Round {number}: client 1 (node {EVIL}) is left out: "), name
        assert CASES[name][1] in line, name
    for report in seen.reports[1:]:
        assert [client.rejected for client in report.clients] == [False, True]
        assert report.update_norm > 0
    assert strategy.refusals == {1: len(CASES)}
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert seen.metrics[-1]["fl/rejected_clients"] == 1


def test_a_message_that_is_sent_again_is_refused(tmp_path, caplog):
    old = []

    def meddle(reply, message):
        if message.metadata.dst_node_id != EVIL:
            return [reply]
        old.append(reply)
        fresh = {"round_index": int(message.metadata.group_id or 1) - 1, "ticket": message.content["lbgm"]["ticket"]}
        record = {**dict(old[0].content["lbgm"]), **fresh}
        fresh = with_content(reply, RecordDict({"lbgm": ConfigRecord(record)}))
        return [fresh] if message.metadata.group_id == "2" else [reply, reply]

    old_query = []

    def tamper(reply, message):
        return (
            old_query.append(reply) or [reply] if message.metadata.message_type == "query" else meddle(reply, message)
        )

    grid = MemoryGrid(make_apps(**SETTINGS), tamper=tamper)
    _, seen, strategy, _ = serve(tmp_path, grid, rounds=3, **SETTINGS)
    # Twice in round 1, where the first counts; the same bytes again in round 2; then it goes on in full.
    assert [report.clients[1].outcome for report in seen.reports] == ["refreshed", "rejected", "recycled"]
    assert strategy.refusals == {1: 3}


def test_a_node_that_was_not_asked_is_not_heard(tmp_path):
    strays = []

    def tamper(reply, message):
        if message.metadata.group_id != "1" or message.metadata.dst_node_id != EVIL:
            return [reply]
        stray = with_content(reply, reply.content)
        stray.metadata.__dict__["_src_node_id"] = 999
        strays.append(stray)
        return [reply, stray]

    grid = MemoryGrid(make_apps(**SETTINGS), tamper=tamper)
    module, _, strategy, _ = serve(tmp_path, grid, rounds=1, **SETTINGS)
    assert strays
    assert strategy.refusals == {}
    expected, _, _, _ = serve(tmp_path, MemoryGrid(make_apps(**SETTINGS)), rounds=1, **SETTINGS)
    assert same(module, expected)


def test_the_id_of_a_node_that_is_there_is_not_given_away(tmp_path):
    apps = make_apps(**SETTINGS)
    configs = {**{100 + k: {"partition-id": k} for k in range(3)}, 104: {"partition-id": 1}, 105: {"partition-id": 8}}
    grid = MemoryGrid({**apps, 104: apps[101], 105: apps[101]}, configs=configs)
    _, seen, strategy, _ = serve(tmp_path, grid, rounds=1, num_clients=4, min_available_nodes=3, **SETTINGS)
    assert len(seen.reports[0].clients) == 3
    assert {m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"} == {100, 101, 102}
    assert sorted(strategy._nodes.refused) == [104, 105]


def test_settings_that_differ_are_named(tmp_path, flower_log):
    apps = make_apps(**SETTINGS)
    apps[EVIL] = federated_client_app(
        make_net(), Data(subset(TRAIN, parts(TRAIN)[1])), uplink=[TopK(0.5)], trainer={"accelerator": "cpu"}
    )
    _, seen, _, _ = serve(tmp_path, MemoryGrid(apps), rounds=1, min_available_nodes=2, **SETTINGS)
    assert [client.client_id for client in seen.reports[0].clients] == [0, 2]
    assert "Node 101 takes no part: The settings differ: `uplink` is" in flower_log.text
    assert "TopK" in flower_log.text


def test_a_node_whose_update_is_not_finite_says_so(tmp_path):
    apps = make_apps(**SETTINGS)
    apps[EVIL] = federated_client_app(
        make_net(lr=1e38), Data(subset(TRAIN, parts(TRAIN)[1])), trainer={"accelerator": "cpu"}, uplink=[LookBack(1.0)]
    )
    settings = {**SETTINGS, "local_steps": 3}
    module, seen, strategy, _ = serve(tmp_path, MemoryGrid(apps), rounds=1, **settings)
    assert strategy.refusals == {1: 1}
    assert [client.rejected for client in seen.reports[0].clients] == [False, True, False]
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_node_refuses_what_is_no_task(tmp_path):
    app = make_apps(**SETTINGS)[100]
    grid = MemoryGrid({100: app})
    for content in (RecordDict(), RecordDict({"lbgm": ConfigRecord({"kind": "Task"})}), write(Refusal("no", 0))):
        (reply,) = grid.send_and_receive([Message(content, 100, "train")])
        assert isinstance(read(reply.content, Refusal), Refusal)


WORK = Work(1, 2, b"bytes", 3, 4, 5, 0.5, True, [True], [0.1], [0.9], 0.2, "recycled", ["a"], [1.0], "[]")


def test_records_survive_flowers_serialisation():
    task = Task("name", "digest", 1, 0, 5, 1, 3, 2, 1, 7, b"\x08", [b"one", b""])
    for record in (WORK, task, Greeting("name", "{}", 1, 1, 0)):
        content = write(record)
        crossed = RecordDict({"lbgm": ConfigRecord.inflate(content["lbgm"].deflate())})
        assert read(crossed, type(record)) == record


VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.booleans(),
    st.lists(st.integers(0, 9), max_size=2),
)


@given(st.sampled_from([one.name for one in fields(Work)]), VALUES)
def test_a_record_with_any_other_value_is_read_or_refused(name, value):
    record = ConfigRecord({**dict(write(WORK)["lbgm"]), name: value})
    try:
        found = read(RecordDict({"lbgm": record}), Work)
    except RecordError:
        return
    assert type(getattr(found, name)) is type(value)


@given(st.text(max_size=50))
def test_what_nodes_say_that_they_logged_is_read_or_left_out(text):
    assert isinstance(unpack(text), list)


def test_logged_values_of_another_form_are_left_out():
    good = '{"name": "a", "reduction": "mean", "total": 2, "weight": 4, "on_step": true, "prog_bar": 7}'
    bad = [
        '{"name": 3}',
        "null",
        '{"name": "b", "reduction": "eval", "total": 1, "weight": 1}',
        good.replace("2", "NaN"),
    ]
    (entry,) = unpack(f"[{', '.join([good, *bad])}]")
    assert (entry["name"], entry["total"][0], entry["weight"]) == ("a", 2.0, 4.0)
    assert entry["options"] == {"on_step": True, "reduce_fx": "mean"}
    assert unpack("[" * 100_000) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction_train": 0}, "`fraction_train` must be in"),
        ({"min_train_nodes": 0}, "`min_train_nodes` must be"),
        ({"min_available_nodes": 11}, "raise `num_clients`"),
        ({"local_steps": 1, "local_epochs": 1}, "`local_steps=1`"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LBGMStrategy(make_net(), **settings)


# Of processes: TLS, authenticated nodes, one that is killed and comes back, one that nobody knows.
ROUNDS = 4


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


@pytest.mark.slow
def test_three_nodes_one_of_which_is_killed_and_an_intruder(tmp_path):
    results = tmp_path / "results.json"
    with Federation(tmp_path) as federation:
        run_id = federation.run(method="both", rounds=ROUNDS, results=str(results), timeout=120)
        make_node_key(tmp_path / "keys", "stranger")
        federation.start_node(3, key="stranger")

        def about():
            return federation.log("node-1")[-2000:] + federation.flwr("log", run_id, "here", "--show")[-4000:]

        # Killed when it has sent its first update: all that it knows afterwards lies on its disk.
        until(lambda: federation.log("node-1").count("Sent successfully") >= 2, 300, about)
        federation.kill_node(1)
        federation.restart_node(1)
        status = federation.wait(run_id, 400)
        assert results.exists(), about()
        stranger = federation.log("node-3")
        assert not federation.is_running("node-3")
    assert status == "finished:completed"
    assert federation.leftovers() == []

    numbers = json.loads(results.read_text())
    expected, model = simulate("both", ROUNDS)
    assert [one["round"] for one in numbers["rounds"]] == list(range(ROUNDS))
    accuracy = [one["val/acc"] for one in numbers["rounds"]]
    assert accuracy[-1] > 0.75
    assert accuracy[-1] >= expected[-1]["val/acc"] - 0.02
    if not numbers["refusals"]:  # the node was back in time for the next round: nothing was lost, to the bit
        assert accuracy == [one["val/acc"] for one in expected]
        for name, values in numbers["final"].items():
            assert torch.equal(torch.tensor(values), model[name])
        for one, other in zip(numbers["rounds"], expected):
            assert one["outcomes"] == {str(k): outcome for k, outcome in other["outcomes"].items()}
            for name in ("comm/uplink_bytes", "comm/downlink_bytes", "lbgm/lbp_error_mean", "fl/update_norm"):
                assert one[name] == pytest.approx(other[name])
    assert "Failed to activate SuperNode" in stranger
    assert "SuperNode ID" not in stranger
