"""A federation of processes: TLS, authenticated nodes, one that is killed and comes back, one that nobody knows."""

from __future__ import annotations

import json
import time

import pytest
import torch

pytest.importorskip("flwr")

from recipes.flower.certificates import make_node_key
from recipes.flower.federation import Federation
from recipes.flower.simulate import simulate

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
