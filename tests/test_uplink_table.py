"""The table of all uplink stages has each, and says what is measured: bytes, memory, order, downlink, passes."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

import lightning_lbgm
from lightning_lbgm import LBGMFederated, LookBack, TopK
from lightning_lbgm.compression import Context, RoundResult, Stage, as_chain
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense

DOCS = Path(__file__).parent.parent / "docs"
LAYOUT = Layout([(60, 300), 60, (10, 60), 10])
M, MATRICES, VECTORS = LAYOUT.size, [(60, 300), (10, 60)], 70
ROUNDS = 10


def cells(page, begin, end):
    text = (DOCS / page).read_text().split(begin)[1].split(end)[0].strip()
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return head, lines


HEAD, LINES = cells("uplink.md", "<!-- stages: begin -->", "<!-- stages: end -->")
TABLE = {re.search(r"`(.+)`", line[0]).group(1).replace("…", "TopK(0.03)"): dict(zip(HEAD, line)) for line in LINES}
STAGES = [name for name in TABLE if name != "[]"]


PUBLIC = {name: getattr(lightning_lbgm, name) for name in lightning_lbgm.__all__}


def stage(name):
    return eval(name, dict(PUBLIC))


def names():
    return [name for name, value in PUBLIC.items() if inspect.isclass(value) and issubclass(value, Stage)]


def numbers(state):
    """Count the float numbers that a state holds; entries kept for bookkeeping, such as inner products, are few."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, dict):
        return sum(map(numbers, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(numbers, state))
    return sum(tensor.numel() for tensor in state.tensors()) if hasattr(state, "tensors") else 0


def send(stages, seed=0):
    """Encode some updates without a common direction; return the last payload and the client's state."""
    chain = as_chain(stages)
    state, shared = chain.init(), chain.init_shared()
    generator = torch.Generator().manual_seed(seed)
    for index in range(ROUNDS):
        context = Context(index, shared, seed=1, path=(3,))
        encoded = chain.encode(Dense(torch.randn(M, generator=generator), LAYOUT), state, context)
        bits = encoded.payload.num_bits
        result = RoundResult(LAYOUT, torch.ones(M), encoded.decoded.dense(), (bits,), (32 * M,), (encoded.decision,))
        chain.end_round(shared, result, context)
    return encoded, state


def entropy(values):
    shares = torch.unique(values, return_counts=True)[1] / len(values)
    return float(-(shares * shares.log2()).sum())


def symbols(name, encoded):
    """Return what the formulas of the table refer to, for a stage and what it has sent."""
    one = stage(name)
    part = encoded.payload.split() if name.startswith("LayerRecycling") else []
    known = {
        "M": M,
        "k": round(getattr(one, "fraction", 0.03) * M),
        "r": getattr(one, "rank", 0),
        "H": entropy(encoded.decoded.dense()),
        "c": send(TopK(0.03))[0].payload.num_bits / 8 if "TopK" in name else 4 * M,
        "s": sum(one.size for one in part if one.num_bits),
    }
    return {**known, "log2": math.log2}


def value(formula, known):
    """Evaluate a formula; one of matrices is summed over them, and vectors go whole."""
    if re.search(r"\b[nm]\b", formula):
        whole = 4 * VECTORS if "n" in formula else 0
        return whole + sum(eval(formula, {**known, "n": n, "m": m}) for n, m in MATRICES)
    return eval(formula, known)


def test_every_public_stage_has_a_row():
    assert sorted({re.match(r"\w+", name).group() for name in STAGES}) == sorted(names())


@pytest.mark.parametrize("name", STAGES)
def test_bytes_and_memory_are_those_of_the_formulas(name):
    encoded, state = send(stage(name))
    known = symbols(name, encoded)
    formulas = [value(formula, known) for formula in re.findall(r"`(.+?)`", TABLE[name]["bytes"])]
    assert encoded.payload.num_bits / 8 == pytest.approx(formulas[-1], rel=0.02, abs=8)
    kept = value(TABLE[name]["keeps"].strip("`"), known)
    assert numbers(state) == pytest.approx(kept, rel=0.02, abs=100)


def test_a_recycled_update_is_the_bytes_of_its_coefficient():
    chain = as_chain(LookBack(0.2))
    state = chain.init()
    sent = [chain.encode(Dense(torch.full((M,), scale), LAYOUT), state).payload.num_bits / 8 for scale in (1.0, 2.0)]
    assert [f"`{sent[1]:.0f}` or `{sent[0] / M:.0f} * M`"] == [TABLE["LookBack(0.2)"]["bytes"]]


@pytest.mark.parametrize("name", STAGES)
def test_order_and_downlink_are_as_refused(name):
    said = TABLE[name]["look-back"]
    assert (said == "last") == stage(name).terminal
    if stage(name).terminal:
        with pytest.raises(ValueError, match="must be the last stage"):
            LBGMFederated(num_clients=2, uplink=[stage(name), LookBack(0.2)])
    if TABLE[name]["down"] == "yes":
        LBGMFederated(num_clients=2, downlink=[stage(name)])
    else:
        with pytest.raises(ValueError, match="downlink"):
            LBGMFederated(num_clients=2, downlink=[stage(name)])


@pytest.mark.parametrize("name", [name for name in STAGES if not stage(name).terminal])
def test_what_is_behind_a_stage_is_recycled_as_said(name):
    # Updates that keep their direction, with some noise: plain LookBack recycles them.
    chain = as_chain([stage(name), LookBack(0.2)])
    state, generator = chain.init(), torch.Generator().manual_seed(0)
    direction, recycled = torch.randn(M, generator=generator), 0
    for index in range(ROUNDS):
        noise = torch.randn(M, generator=generator)
        update = Dense(direction + 0.03 * noise, LAYOUT)
        recycled += sum(chain.encode(update, state, Context(index, seed=1, path=(3,))).decision.recycled)
    said = TABLE[name]["look-back"]
    assert said == ("yes" if recycled > ROUNDS // 2 else "no")


@pytest.mark.parametrize("name", STAGES)
def test_unbiased_stages_are_right_in_the_mean(name):
    if TABLE[name]["biased"] not in ("no", "a little"):
        return
    chain, update = as_chain(stage(name)), torch.randn(M, generator=torch.Generator().manual_seed(0))
    rounds, total = 200, torch.zeros(M)
    for index in range(rounds):
        context = Context(index, chain.init_shared(), seed=1, path=(3,))
        total += chain.encode(Dense(update, LAYOUT), chain.init(), context).decoded.dense()
    along = float(total @ update / update.square().sum() / rounds)
    assert along == pytest.approx(1, abs=0.02)


def test_passes_are_those_that_were_measured():
    _, lines = cells("performance.md", "<!-- table: stages -->", "<!-- end -->")
    measured = {line[0].strip("`"): int(line[-1]) for line in lines}
    signs, with_feedback = measured["[TopK(0.03), SignSGD()]"], measured["EF([TopK(0.03), SignSGD()])"]
    with_mean = measured["EF(DIANA([TopK(0.03), SignSGD()]))"]
    expected = {**measured, "ErrorFeedback(TopK(0.03))": f"+{with_feedback - signs}"}
    expected["DIANA(TopK(0.03))"] = f"+{with_mean - with_feedback}"
    said = {name: TABLE[name]["passes"] for name in STAGES if TABLE[name]["passes"]}
    assert said == {name: str(expected[name]) for name in said}
    assert len(said) == len(STAGES) - 2  # all but Relax and LayerRecycling were measured
    rank_8 = measured["LookBack(0.9, rank=8)"]
    assert f"`LookBack` has {rank_8} with rank 8" in (DOCS / "uplink.md").read_text()
