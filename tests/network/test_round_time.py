"""The time of a round from its clients' times, and of a finished run on another network."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lbgm import NetworkClock
from lightning_lbgm.network import ClientTime, RoundTime, replay

SECONDS = st.floats(0, 1e6)
CLIENTS = st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=8)


def test_a_round_lasts_until_the_last_update():
    time = RoundTime((ClientTime(2, 1.0, 2.0, 1.0), ClientTime(5, 2.0, 5.0, 3.0), ClientTime(7, 9.0, 0.5, 0.5)))
    assert (time.seconds, time.straggler) == (10.0, 5)  # client 7 needs as long
    assert (time.download_share, time.compute_share, time.upload_share) == (0.2, 0.5, 0.3)


def test_a_round_that_waits_for_its_deadline():
    time = RoundTime((ClientTime(2, 1.0, 2.0, 1.0),), waited_until=8.0)
    assert (time.seconds, time.straggler, time.compute_share) == (8.0, 2, 0.25)
    assert RoundTime((ClientTime(2, 1.0, 2.0, 1.0),), waited_until=3.0).seconds == 4.0
    nobody = RoundTime((), waited_until=8.0)
    assert nobody.seconds == 8.0
    assert math.isnan(nobody.straggler)
    assert math.isnan(nobody.upload_share)


def test_a_round_without_anybody_takes_no_time():
    time = RoundTime(())
    assert (time.seconds, time.last) == (0.0, None)
    assert math.isnan(time.download_share)
    assert math.isnan(RoundTime((ClientTime(0, 0.0, 0.0, 0.0),)).compute_share)


@given(CLIENTS, st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_count(parts, random):
    clients = [ClientTime(k, *part) for k, part in enumerate(parts)]
    mixed = random.sample(clients, len(clients))
    one, other = RoundTime(tuple(clients)), RoundTime(tuple(mixed))
    assert one.last == other.last
    assert one.seconds == max(map(sum, parts))
    if one.seconds > 0:
        assert one.download_share + one.compute_share + one.upload_share == pytest.approx(1)


def row(round_index, client, sent, received, steps=1, decision="sent"):
    return {
        "round": round_index, "client": client, "decision": decision, "uplink_bytes": sent, "downlink_bytes": received,
        "local_steps": steps, "loss": 0.5,
    }  # fmt: skip


CLOCK = NetworkClock("1 kB/s", "2 kB/s", latency=0.5, compute=1.0)


def test_a_replay_by_hand():
    """2 kB down: 0.5 + 1; 3 steps: 3; 4 kB up: 0.5 + 4. Who was dropped is not waited for, in any order of rows."""
    rows = [row(3, 1, 0, 9e9, decision="dropped"), row(1, 0, 4000, 2000, 3), row(1, 4, 1000, 2000), row(3, 4, 1000, 0)]
    times = replay(rows, CLOCK)
    assert list(times) == [1, 3]
    assert (times[1].seconds, times[1].straggler) == (9.0, 0)
    assert [client.seconds for client in times[1].clients] == [9.0, 4.0]
    assert times[3].seconds == 3.0
    assert replay([], CLOCK) == {}


def test_a_replay_has_the_links_of_the_seed():
    clock = NetworkClock(preset="lte", spread=1.0)
    one, other = (replay([row(0, 3, 8e6, 8e6)], clock, seed)[0].seconds for seed in (1, 2))
    assert one != other
    assert one == clock.links(1, 9)[3].time(3, 64e6, 1, 64e6).seconds


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(ValueError, match="'measured' needs a simulation"):
        replay([row(0, 0, 1, 1)], NetworkClock(preset="lte", compute="measured"))
    with pytest.raises(ValueError, match="no column 'local_steps'"):
        replay([{"round": 0, "client": 0, "decision": "sent", "downlink_bytes": 0}], CLOCK)
    with pytest.raises(ValueError, match="1 rows, but there are 4 clients"):
        replay([row(0, 3, 1, 1)], NetworkClock(preset="lte", clients=[{}]))
    rows = [{"uplink": "1 kB/s"}] * 6
    assert replay([row(0, 3, 1000, 0)], NetworkClock(downlink=1, clients=rows))[0].seconds == 1.0
