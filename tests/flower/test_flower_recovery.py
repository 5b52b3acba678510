"""Ends that do not agree find together again by a full send, within one round; restarts change nothing."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("flwr")

from in_process import MemoryGrid, make_apps, same, serve, simulate

from lightning_lbgm import ErrorFeedback, LookBack, TopK

SETTINGS = {"uplink": [ErrorFeedback(TopK(0.3)), LookBack(0.9)], "downlink": [TopK(0.3)], "local_steps": 2}
PLAIN = {"uplink": [LookBack(1.0)], "local_steps": 2}  # recycles whenever both ends remember


def outcomes(seen):
    return [[client.outcome for client in report.clients] for report in seen.reports]


def test_a_server_and_nodes_that_start_anew_go_on_where_they_were(tmp_path):
    whole, _, _ = simulate(tmp_path, rounds=4, **SETTINGS)
    nodes, state = tmp_path / "nodes", tmp_path / "server"
    grid = MemoryGrid(make_apps(state_dir=nodes, **SETTINGS))
    serve(tmp_path, grid, rounds=2, state_dir=state, **SETTINGS)
    assert sorted(path.name for path in state.iterdir()) == ["server.ckpt"]
    assert sorted(path.name for path in nodes.iterdir()) == [f"client-{k}.pt" for k in range(3)]
    again = MemoryGrid(make_apps(state_dir=nodes, **SETTINGS))
    module, seen, strategy, _ = serve(tmp_path, again, rounds=4, state_dir=state, **SETTINGS)
    assert [report.round_index for report in seen.reports] == [2, 3]
    assert strategy.refusals == {}
    assert not any(message.metadata.message_type == "query" for message in again.sent)
    assert same(module, whole)


def test_a_reply_that_is_lost_costs_the_node_one_full_send(tmp_path):
    lost = []

    def tamper(reply, message):
        if message.metadata.group_id == "2" and message.metadata.dst_node_id == 101:
            lost.append(reply)
            return []
        return [reply]

    grid = MemoryGrid(make_apps(**PLAIN), tamper=tamper)
    with pytest.warns(UserWarning, match="Round 1: the update of client 1 is missing. No answer came. `fl/rejected"):
        _, seen, strategy, _ = serve(tmp_path, grid, rounds=4, **PLAIN)
    full, short = "refreshed", "recycled"
    # What was lost was a coefficient: both ends remember the same after it, and no full send is needed.
    assert outcomes(seen) == [[full] * 3, [short, "rejected", short], [short] * 3, [short] * 3]
    assert strategy.refusals == {1: 1}

    def first(reply, message):
        return [] if message.metadata.group_id == "1" and message.metadata.dst_node_id == 101 else [reply]

    _, seen, _, _ = serve(tmp_path, MemoryGrid(make_apps(**PLAIN), tamper=first), rounds=3, **PLAIN)
    assert outcomes(seen) == [[full, "rejected", full], [short, full, short], [short] * 3]


def test_a_node_that_lost_its_state_sends_in_full_and_gets_the_whole_model(tmp_path):
    settings = {"uplink": [LookBack(1.0)], "downlink": [TopK(0.1)], "local_steps": 2}
    nodes, rounds = tmp_path / "nodes", []

    def tamper(reply, message):
        if message.metadata.group_id == "2" and message.metadata.dst_node_id == 102:
            (nodes / "client-1.pt").unlink()  # before round 3
        rounds.append(message)
        return [reply]

    grid = MemoryGrid(make_apps(state_dir=nodes, **settings), tamper=tamper)
    _, seen, strategy, _ = serve(tmp_path, grid, rounds=5, **settings)
    full, short = "refreshed", "recycled"
    # The server sends a change of a model that the node does not hold any more; the node says so.
    assert outcomes(seen) == [[full] * 3, [short] * 3, [short, "rejected", short], [short, full, short], [short] * 3]
    assert [report.clients[1].whole_model for report in seen.reports] == [True, False, False, True, False]
    assert strategy.refusals == {1: 1}


def test_a_damaged_state_is_as_good_as_none(tmp_path):
    nodes = tmp_path / "nodes"
    grid = MemoryGrid(make_apps(state_dir=nodes, **PLAIN))
    serve(tmp_path, grid, rounds=1, state_dir=tmp_path / "server", **PLAIN)
    for k, damage in enumerate([b"", b"no state"]):
        (nodes / f"client-{k}.pt").write_bytes(damage)
    _, seen, strategy, _ = serve(tmp_path, grid, rounds=2, state_dir=tmp_path / "server", **PLAIN)
    assert outcomes(seen) == [["refreshed", "refreshed", "recycled"]]
    assert strategy.refusals == {}


def test_a_new_server_takes_nothing_over_from_old_nodes(tmp_path):
    nodes, state = tmp_path / "nodes", tmp_path / "server"
    grid = MemoryGrid(make_apps(state_dir=nodes, **SETTINGS))
    serve(tmp_path, grid, rounds=2, state_dir=state, **SETTINGS)
    shutil.rmtree(state)
    fresh, _, strategy, _ = serve(tmp_path, grid, rounds=2, **SETTINGS)
    expected, _, _ = simulate(tmp_path, rounds=2, **SETTINGS)
    assert same(fresh, expected)  # residuals of the other run too are gone
    assert strategy.refusals == {}


def test_a_client_comes_back_as_another_node(tmp_path):
    nodes = tmp_path / "nodes"
    apps = make_apps(state_dir=nodes, **PLAIN)
    grid = MemoryGrid(
        {**apps, 103: apps[101]}, configs={**{100 + k: {"partition-id": k} for k in range(3)}, 103: {"partition-id": 1}}
    )
    grid.offline = {103}
    serve(tmp_path, grid, rounds=2, state_dir=tmp_path / "server", **PLAIN)
    grid.offline = {101}
    whole, _, _ = simulate(tmp_path, rounds=3, **PLAIN)
    module, seen, _, _ = serve(tmp_path, grid, rounds=3, state_dir=tmp_path / "server", **PLAIN)
    assert outcomes(seen) == [["recycled"] * 3]
    assert same(module, whole)
