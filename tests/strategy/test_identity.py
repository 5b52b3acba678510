"""What decides whose state a checkpoint holds is compared by value."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import TinyModule, make_data
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lbgm import (
    DIANA,
    QSGD,
    ErrorFeedback,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    PathologicalPartitioner,
    TargetSavings,
    TopK,
)
from lightning_lbgm.compression import Encoded, Stage
from lightning_lbgm.data import Partitioner
from lightning_lbgm.strategy.identity import identify, is_same, show

IDS = [i % 4 for i in range(60)]


class Halves(Partitioner):
    """A user's own, with what it keeps in a private attribute of another name."""

    def __init__(self, order: list[int]) -> None:
        self._positions = np.asarray(order)

    def partition(self, dataset, num_clients, rng):
        return np.array_split(self._positions, num_clients)


class Scale(Stage):
    """A user's own stage."""

    def __init__(self, factors: list[float]) -> None:
        self._factors = torch.tensor(factors)

    def encode(self, update, state, context=None):
        return Encoded(update)


def rate(round_index: int) -> float:
    return 0.3


def rising(start: float):
    return lambda round_index: start


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (IDS, np.array(IDS)),
        (IDS, torch.tensor(IDS, dtype=torch.int32)),
        (IDS, torch.tensor(IDS)[:, None]),
        ([1, 0], torch.tensor([1, 0])),
        (["a", "b"] * 10, np.array(["a", "b"] * 10)),
        (0.5, np.float64(0.5)),
        (rising(0.1), rising(0.1)),
        ({"b": 1, "a": (1, 2)}, {"a": [1, 2], "b": 1}),
    ],
)
def test_the_same_values_are_the_same(one, other):
    assert is_same(identify(one), identify(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (IDS, sorted(IDS)),
        (IDS, IDS[:-1]),
        (torch.zeros(20), torch.zeros(4, 5)),
        (["a"] * 20, ["b"] * 20),
        ([None, 1.0] * 20, [None, 2.0] * 20),
        (NaturalPartitioner(IDS), NaturalPartitioner(sorted(IDS))),
        (PathologicalPartitioner(2, labels=IDS), PathologicalPartitioner(2, labels=IDS[::-1])),
        (Halves(list(range(60))), Halves(list(range(60))[::-1])),
        (ErrorFeedback([TopK(0.1), LookBack(0.2)]), ErrorFeedback([TopK(0.2), LookBack(0.2)])),
        (DIANA(QSGD(7)), DIANA(QSGD(127))),
        (LookBack(TargetSavings(0.9)), LookBack(TargetSavings(0.8))),
        (LookBack(rate), LookBack(lambda round_index: 0.3)),
        (LookBack(lambda r: 0.2), LookBack(lambda r: 0.9)),
        (LookBack(rising(0.1)), LookBack(rising(0.2))),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (Scale([1.0, 2.0]), Scale([1.0, 3.0])),
        (Scale([1.0] * 50), Scale([2.0] * 50)),
        (True, False),
        (None, 0),
    ],
)
def test_other_values_are_others(one, other):
    assert not is_same(identify(one), identify(other))


def test_functions_of_another_python_are_compared_by_name():
    here, there = identify(rate), identify(rate) | {"bytecode": "another", "code": "other"}
    assert is_same(here, there)
    assert not is_same(here, {**there, "function": "other"})


def test_descriptions_are_readable_and_plain(tmp_path):
    identity = identify(ErrorFeedback([TopK(0.1), LookBack(rate, rank=2)]))
    assert show(identity).startswith("ErrorFeedback(stage=[TopK(fraction=0.1), LookBack(threshold=rate(), ")
    assert "<60 values, hash " in show(identify(NaturalPartitioner(IDS)))
    torch.save(identity, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True) == identity


def test_what_leads_anywhere_is_described_by_its_class():
    module = TinyModule()
    module.itself = [module] * 50
    assert identify(lambda: module)["bound"] == [{"class": "TinyModule"}]
    loop: list[object] = []
    loop.append(loop)
    assert identify(loop)


def test_a_large_array_is_hashed_in_part_and_fast():
    ids = torch.zeros(2**25, dtype=torch.int8)
    changed = ids.clone()
    changed[::2] = 1
    assert not is_same(identify(ids), identify(changed))
    assert identify(ids)["length"] == 2**25


SETTINGS = {"num_clients": 4, "partitioner": NaturalPartitioner(IDS), "uplink": [LookBack(0.2)], "seed": 1}


def resume(fit, path, change, first=None, **kwargs):
    trainer, _ = fit(LBGMFederated(**{**SETTINGS, **(first or {})}))
    trainer.save_checkpoint(path)
    strategy = LBGMFederated(**{**SETTINGS, **(first or {}), **change})
    fit(strategy, ckpt_path=path, max_epochs=5, **kwargs)
    return strategy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partitioner": NaturalPartitioner(sorted(IDS))}, "partitioner=NaturalPartitioner.*60 values.*does not fit"),
        ({"partitioner": NaturalPartitioner([f"{i}" for i in IDS])}, "partitioner="),
        ({"uplink": [LookBack(lambda r: 0.2)]}, r"uplink=\[LookBack\(threshold=0.2.*threshold=.*lambda"),
        ({"buffers": "server"}, "buffers=average.*buffers=server"),
        (
            {"server_optimizer": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)},
            "momentum=0,.*momentum=0.9,",
        ),
    ],
)
def test_resuming_with_other_values_is_refused(fit, tmp_path, change, message):
    with pytest.raises(MisconfigurationException, match=message):
        resume(fit, tmp_path / "a.ckpt", change)


def test_other_code_under_the_same_name_is_named(fit, tmp_path):
    one, other = [LookBack(lambda r: 0.2)], [LookBack(lambda r: 0.3)]
    with pytest.raises(MisconfigurationException, match="with other code or values"):
        resume(fit, tmp_path / "a.ckpt", {"uplink": other}, first={"uplink": one})


def test_other_data_is_refused(fit, tmp_path):
    first = {"partitioner": None}
    with pytest.raises(MisconfigurationException, match="other training examples.*Resume with the same data"):
        resume(fit, tmp_path / "a.ckpt", {}, first=first, dataset=make_data(59))


@pytest.mark.parametrize(
    "change",
    [
        {"partitioner": NaturalPartitioner(torch.tensor(IDS))},
        {"clients_per_round": 2},
        {"local_steps": 3},
        {"weighting": "uniform"},
        {"rounds_per_epoch": 2},
        {"execution": "sequential"},
        {"seed": None},
    ],
)
def test_what_clients_do_not_keep_may_change(fit, tmp_path, change):
    assert resume(fit, tmp_path / "a.ckpt", change).round_index > 3


def test_the_servers_new_learning_rate_holds_and_is_said(fit, tmp_path):
    def adam(lr):
        return {"server_optimizer": lambda params: torch.optim.Adam(params, lr=lr)}

    with pytest.warns(UserWarning, match=r"learning rate 0\.02.*checkpoint's was 0\.1"):
        strategy = resume(fit, tmp_path / "a.ckpt", adam(0.02), first=adam(0.1))
    optimizer = strategy._federation.server.optimizer
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert int(next(iter(optimizer.state.values()))["step"]) == 5  # the moments are the checkpoint's


# Formats


def saved(fit, tmp_path, change):
    trainer, _ = fit(LBGMFederated(**SETTINGS))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    change(checkpoint["lightning_lbgm"])
    torch.save(checkpoint, tmp_path / "b.ckpt")
    return tmp_path / "b.ckpt"


def as_version_0(state):
    del state["version"]
    del state["uses"]
    state["identity"] = {
        "num_clients": 4,
        "partitioner": "NaturalPartitioner(client_ids=<60 values>)",
        "uplink": "[LookBack(threshold=0.2, granularity='model')]",
        "server_optimizer": "SGD",
        "seed": 1,
        "num_parameters": 21,
    }


def test_a_checkpoint_of_the_first_format_is_read(fit, tmp_path):
    path = saved(fit, tmp_path, as_version_0)
    strategy = LBGMFederated(**SETTINGS)
    fit(strategy, ckpt_path=path, max_epochs=5)
    assert strategy.round_index == 5
    with pytest.raises(MisconfigurationException, match=r"uplink=.*threshold=0\.2.*uplink=.*threshold=0\.3"):
        fit(LBGMFederated(**{**SETTINGS, "uplink": [LookBack(0.3)]}), ckpt_path=path, max_epochs=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(version=7), "newer lightning_lbgm.*format 7.*reads up to 1.*Upgrade"),
        (lambda state: state.pop("clients"), "damaged: 'clients' is missing.*load_from_checkpoint"),
        (lambda state: state.update(seed="x", ledger=None), "damaged: 'seed', 'ledger' is missing or is not"),
        (lambda state: state["server"].clear(), "damaged: KeyError"),
        (lambda state: state["ledger"].update(downlink_bits=1, more=2), "damaged: TypeError"),
        (lambda state: state.update(version="1"), "damaged: the version"),
    ],
)
def test_a_damaged_or_newer_checkpoint_is_refused_in_words(fit, tmp_path, change, message):
    path = saved(fit, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fit(LBGMFederated(**SETTINGS), ckpt_path=path, max_epochs=5)
