"""The clock: units, clients' links by hand, their spread, tables of clients, and what is refused."""

from __future__ import annotations

import json
import math
import statistics

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lbgm import NetworkClock
from lightning_lbgm.network import PRESETS, as_network, parse_rate, parse_seconds

POSITIVE = st.floats(1e-3, 1e9)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("10 Mbit/s", 1e7), ("10Mbit/s", 1e7), ("1.2 MB/s", 9.6e6), ("56 kbit/s", 56e3), ("1 Gbps", 1e9),
        ("8 Mbps", 8e6), ("1 MiB/s", 8 * 2**20), (".5 GB/s", 4e9), ("1e3 bit/s", 1e3), ("3", 3.0), (7, 7.0),
        (math.inf, math.inf),
    ],
)  # fmt: skip
def test_rates_are_bits_a_second(text, bits):
    assert parse_rate("uplink", text) == bits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("40 ms", 0.04), ("30 s", 30), ("2 min", 120), ("1.5 h", 5400), ("10 us", 1e-5), (0, 0), (2, 2)],
)
def test_times_are_seconds(text, seconds):
    assert parse_seconds("latency", text) == pytest.approx(seconds, rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"no `uplink`: pass `uplink='10 Mbit/s'`"),
        ({"uplink": "1 kB/s"}, "no `downlink`"),
        ({"uplink": "10 mb/s", "downlink": 1}, r"`NetworkClock\(uplink=...\)` must be.*small b.*got '10 mb/s'"),
        ({"uplink": "fast", "downlink": 1}, "uplink.*got 'fast'"),
        ({"uplink": 0, "downlink": 1}, "uplink.*must be a positive rate.*got 0"),
        ({"uplink": "-1 kB/s", "downlink": 1}, "must be a positive rate.*got '-1 kB/s'"),
        ({"uplink": math.nan, "downlink": 1}, "must be a positive rate.*got nan"),
        ({"uplink": True, "downlink": 1}, "uplink.*got True"),
        ({"uplink": [1], "downlink": 1}, r"uplink.*got \[1\]"),
        ({"preset": "lte", "latency": "40"}, None),
        ({"preset": "lte", "latency": "40 sec"}, r"`NetworkClock\(latency=...\)` must be '40 ms'.*got '40 sec'"),
        ({"preset": "lte", "latency": -1}, "latency.*at least 0.*got -1"),
        ({"preset": "lte", "compute": "mesured"}, "compute.*got 'mesured'. 'measured' takes"),
        ({"preset": "lte", "compute": math.inf}, "compute.*got inf"),
        ({"preset": "lte", "spread": -0.5}, r"spread=...\)` must be finite and at least 0.*got -0.5"),
        ({"preset": "lte", "spread": "wide"}, "spread.*must be a number, such as 0.5; got 'wide'"),
        ({"preset": "lte", "planned_uplink": 0}, "planned_uplink.*above 0.*got 0"),
        ({"preset": "LTE"}, r"preset='LTE'\)` must be one of 'lte', 'home_broadband', 'data_centre'"),
        ({"preset": "lte", "clients": []}, "clients=<list>.*must be a list of dicts.*0 rows"),
        ({"preset": "lte", "clients": [{"rate": 1}]}, "the column 'rate': the columns are client, uplink"),
        ({"clients": [{"uplink": 1}]}, r"no `downlink` \(client 0\)"),
        ({"preset": "lte", "clients": [{"client": "a", "uplink": "x"}]}, r"uplink=...\)` \(client a\) must be"),
        ({"preset": "lte", "clients": 3}, "clients=<int>.*must be a list of dicts"),
    ],
)
def test_mistakes_are_refused_in_words(settings, message):
    if message is None:
        NetworkClock(**settings)
        return
    with pytest.raises((ValueError, TypeError), match=message):
        NetworkClock(**settings)


def test_what_is_no_clock_is_refused():
    assert as_network(None) is None
    assert as_network("lte") == NetworkClock(preset="lte")
    with pytest.raises(TypeError, match=r"`network` must be.*got 3"):
        as_network(3)
    with pytest.raises(TypeError, match="NetworkClock is a class: write NetworkClock"):
        as_network(NetworkClock)


def test_a_clock_shows_what_is_not_the_default():
    assert repr(NetworkClock("1 MB/s", "2 MB/s", spread=0.5)) == (
        "NetworkClock(uplink='1 MB/s', downlink='2 MB/s', spread=0.5)"
    )
    assert repr(NetworkClock(preset="lte", clients=[{}])) == "NetworkClock(clients='<list>', preset='lte')"


def test_a_clients_time_by_hand():
    """3 MB down at 24 Mbit/s: 1 s; 4 steps of 0.5 s: 2 s; 1 MB up at 1 MB/s: 1 s; and a round trip each way."""
    link = NetworkClock("1 MB/s", "24 Mbit/s", latency="100 ms", compute="500 ms").links(0, 1)[0]
    time = link.time(0, 24e6, 4, 8e6)
    assert (time.download, time.compute, time.upload, time.seconds) == (1.1, 2.0, 1.1, 4.2)
    assert NetworkClock(math.inf, math.inf).links(0, 1)[0].time(0, 1e9, 5, 1e9).seconds == 0


@given(POSITIVE, POSITIVE, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 100), st.floats(1, 1e3))
def test_more_bytes_take_longer_and_more_bandwidth_shorter(up, down, sent, received, steps, factor):
    clock = NetworkClock(up, down, latency=0.1, compute=0.01)
    time = clock.links(0, 1)[0].time(0, received, steps, sent)
    more = clock.links(0, 1)[0].time(0, received * 2, steps + 1, sent * 2)
    assert more.download >= time.download
    assert more.compute > time.compute
    assert more.upload >= time.upload
    wide = (
        NetworkClock(up * factor, down * factor, latency=0.1, compute=0.01)
        .links(0, 1)[0]
        .time(0, received, steps, sent)
    )
    for part in ("download", "upload"):
        assert (getattr(time, part) - 0.1) / factor == pytest.approx(getattr(wide, part) - 0.1, rel=1e-6, abs=1e-9)
    assert wide.compute == time.compute


# Spread


def test_the_spread_is_log_normal_around_the_given_values():
    """Of 2000 clients the mean of ln(rate) is 0 and its deviation sigma, within five standard errors."""
    links = NetworkClock(1.0, 3.0, compute=2.0, spread=0.5).links(seed=7, num_clients=2000)
    network = [math.log(links[k].uplink) for k in range(2000)]
    computer = [math.log(links[k].step / 2) for k in range(2000)]
    for logs in (network, computer):
        assert abs(statistics.fmean(logs)) < 5 * 0.5 / math.sqrt(2000)
        assert statistics.stdev(logs) == pytest.approx(0.5, rel=5 / math.sqrt(4000))
    # Both directions of a client are alike; its computer has nothing to do with them.
    assert [math.log(links[k].downlink / 3) for k in range(2000)] == pytest.approx(network)
    assert abs(statistics.correlation(network, computer)) < 5 / math.sqrt(2000)


@given(st.integers(0, 2**40), st.integers(0, 1000))
def test_a_link_is_a_pure_function_of_seed_and_client(seed, client_id):
    clock = NetworkClock(preset="lte", compute=0.1, spread=1.0)
    first, second = clock.links(seed, 1001), clock.links(seed, 2000)
    assert second[1500] != second[client_id]
    assert first[client_id] == second[client_id]
    assert clock.links(seed + 1, 1001)[client_id] != first[client_id]


def test_presets_have_a_source():
    assert set(PRESETS) == {"lte", "home_broadband", "data_centre"}
    for name, preset in PRESETS.items():
        link = NetworkClock(preset=name).links(0, 1)[0]
        assert link.uplink == parse_rate("", preset.uplink)
        assert 0 < link.latency < 0.1
        assert any(word in preset.source for word in ("Opensignal", "Ofcom", "assumed"))
    assert NetworkClock("1 bit/s", preset="lte", latency=0).links(0, 1)[0].uplink == 1
    assert NetworkClock(preset="lte", latency=0).links(0, 1)[0].latency == 0


# Tables

ROWS = [
    {"uplink": "1 kbit/s", "latency": "10 ms", "compute": 0.5},
    {"uplink": 2000, "downlink": 3000.0},
    {"uplink": "3 kbit/s", "compute": "measured"},
]


def shown(links, ids):
    return [(x.uplink, x.downlink, x.latency, x.step) for x in (links[k] for k in ids)]


EXPECTED = [(1000, 5000, 0.01, 0.5), (2000, 3000, 0.0, 1.0), (3000, 5000, 0.0, None)]


def test_a_table_may_be_objects_or_a_file(tmp_path):
    frame = pd.DataFrame(ROWS)  # its empty cells are NaN
    (tmp_path / "clients.json").write_text(json.dumps(ROWS))
    frame.to_csv(tmp_path / "clients.csv", index=False)
    for table in (ROWS, frame, tmp_path / "clients.json", str(tmp_path / "clients.csv")):
        links = NetworkClock(downlink=5000, compute=1.0, clients=table).links(0, 3)
        assert shown(links, range(3)) == EXPECTED
        assert links.measures
        assert links.plan(1, 1) is None


def test_rows_name_their_clients():
    named = [{**row, "client": name} for row, name in zip(ROWS, ("b", "a", 2))]
    clock = NetworkClock(downlink=5000, compute=1.0, clients=named)
    assert shown(clock.links(0, 3, ("a", "b", "c")), (1, 0, 2)) == EXPECTED


def test_the_spread_is_of_what_the_table_does_not_say():
    clock = NetworkClock(downlink=5000, compute=1.0, clients=ROWS, spread=1.0)
    links = clock.links(0, 3)
    assert [links[k].uplink for k in range(3)] == [1000, 2000, 3000]
    assert links[1].downlink == 3000
    assert links[0].downlink != 5000
    assert links[0].step == 0.5
    assert links[1].step != 1.0


@pytest.mark.parametrize(
    ("rows", "num_clients", "message"),
    [
        (ROWS, 4, "has 3 rows, but there are 4 clients.*client 3 has none"),
        (ROWS, 2, "a row for client 2, but clients are from 0 to 1"),
        ([{"client": 1}, {"client": 1}], 2, "two rows for client 1"),
        ([{"client": "x"}], 1, "a row for client 'x', but clients are from 0 to 0"),
        ("missing.csv", 1, "missing.csv.*could not be read"),
        ("clients.txt", 1, "clients.txt.*must be a list of dicts"),
    ],
)
def test_tables_of_other_clients_are_refused(rows, num_clients, message):
    clock = NetworkClock(preset="lte", clients=rows)
    with pytest.raises((ValueError, TypeError), match=message):
        clock.links(0, num_clients)


def test_a_plan_by_hand():
    """Of 8000 bits down a tenth, of 4000 bits up a half: 0.8 + 2 steps of 1 + 2."""
    plan = NetworkClock(1000, 1000, compute=1.0, planned_uplink=0.5, planned_downlink=0.1).links(0, 1).plan(8000, 4000)
    assert plan.seconds(0, 2) == pytest.approx(4.8)
