"""What clients log becomes one value a round."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_lbgm.strategy.log_capture import LogCapture


def flush(capture, **overrides):
    """The round's values and the options that they are logged with, by name."""
    logged = {}

    def log(name, value, **options):
        assert name not in logged
        logged[name] = (value, options)

    capture.flush(log, **overrides)
    return logged


def values(capture):
    return {name: value.item() for name, (value, _) in flush(capture).items()}


def record(capture, batch_size, **named):
    capture.batch_size = batch_size
    for name, value in named.items():
        capture.record(name, value)


def test_a_value_is_the_mean_over_all_steps_of_the_cohort_weighted_by_batch_size():
    capture = LogCapture()
    record(capture, 2, loss=1.0)
    record(capture, 1, loss=7.0)
    capture.accept()
    record(capture, 5, loss=3.0)
    capture.accept()
    # (2 * 1 + 1 * 7 + 5 * 3) / 8; neither the mean of the steps, 11/3, nor of the clients, 3.
    assert values(capture) == {"loss": 3.0}


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_only_accepted_clients_count(data):
    numbers = st.floats(-1e3, 1e3)
    steps = st.lists(st.tuples(numbers, st.integers(1, 50)), min_size=1, max_size=5)
    clients = data.draw(st.lists(st.tuples(st.booleans(), steps), max_size=6))
    capture = LogCapture()
    for accepted, client_steps in clients:
        for value, batch_size in client_steps:
            record(capture, batch_size, x=torch.tensor(value, dtype=torch.float64))
            for reduce_fx in ("sum", "max", "min"):
                capture.record(reduce_fx, torch.tensor(value, dtype=torch.float64), reduce_fx=reduce_fx)
        capture.accept() if accepted else capture.reject()
    counted = [step for accepted, client_steps in clients if accepted for step in client_steps]
    found = flush(capture)
    if not counted:
        assert found == {}
        return
    numbers, weights = np.array(counted).T
    for name, expected in {
        "x": np.average(numbers, weights=weights),
        "sum": numbers.sum(),
        "max": numbers.max(),
        "min": numbers.min(),
    }.items():
        value, options = found[name]
        assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert options["batch_size"] == weights.sum()


def test_a_rejected_client_leaves_no_trace():
    capture = LogCapture()
    record(capture, 4, loss=1.0)
    capture.accept()
    record(capture, 4, loss=float("nan"), other=2.0)
    capture.reject()
    record(capture, 4, loss=2.0)
    capture.accept()
    logged = flush(capture)
    assert list(logged) == ["loss"]
    value, options = logged["loss"]
    assert value.item() == 1.5
    assert options == {"batch_size": 8}


def test_what_is_neither_accepted_nor_rejected_is_forgotten_at_the_flush():
    capture = LogCapture()
    record(capture, 1, loss=1.0)
    assert flush(capture) == {}
    capture.accept()
    assert flush(capture) == {}


def test_a_flush_starts_afresh():
    capture = LogCapture()
    record(capture, 1, loss=1.0)
    capture.accept()
    assert values(capture) == {"loss": 1.0}
    record(capture, 3, loss=5.0)
    capture.accept()
    assert values(capture) == {"loss": 5.0}
    assert flush(capture) == {}


@pytest.mark.parametrize(
    ("spellings", "expected"),
    [
        (["sum", sum, torch.sum, "SUM"], 6.0),
        (["max", max, torch.max, np.max], 3.0),
        (["min", min, torch.min, np.min], 1.0),
        (["mean", "avg", "MEAN", torch.mean], 2.5),  # (1 * 1 + 2 * 1 + 3 * 4) / 6
    ],
    ids=["sum", "max", "min", "mean"],
)
def test_reduce_fx_says_how_a_value_is_reduced_within_and_over_clients(spellings, expected):
    capture = LogCapture()
    for reduce_fx in spellings:
        for value, batch_size in ((2.0, 1), (1.0, 1)):
            capture.record(str(reduce_fx), value, reduce_fx=reduce_fx, batch_size=batch_size)
    capture.accept()
    for reduce_fx in spellings:
        capture.record(str(reduce_fx), 3.0, reduce_fx=reduce_fx, batch_size=4)
    capture.accept()
    logged = flush(capture)
    assert {name: value.item() for name, (value, _) in logged.items()} == dict.fromkeys(map(str, spellings), expected)
    assert all(options["batch_size"] == 6 for _, options in logged.values())


@pytest.mark.parametrize("reduce_fx", ["max", "min", "sum", "mean"])
def test_negative_values_are_reduced_too(reduce_fx):
    capture = LogCapture()
    for value in (-3.0, -1.0):
        capture.record("x", value, reduce_fx=reduce_fx)
        capture.accept()
    assert values(capture) == {"x": {"max": -1.0, "min": -3.0, "sum": -4.0, "mean": -2.0}[reduce_fx]}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (3, torch.float32),
        (3.0, torch.float32),
        (np.float64(3.0), torch.float32),
        (torch.tensor(3), torch.float32),
        (torch.tensor(3.0), torch.float32),
        (torch.tensor([3.0]), torch.float32),
        (torch.tensor([[3.0]]), torch.float32),
        (torch.tensor(3.0, dtype=torch.float64), torch.float64),
        (torch.tensor(3.0, dtype=torch.bfloat16), torch.float32),
        (torch.tensor(3.0, dtype=torch.float16), torch.float32),
        (torch.tensor(3.0, requires_grad=True), torch.float32),
    ],
    ids=str,
)
def test_numbers_and_tensors_of_one_element_are_averaged_as_floats(value, dtype):
    capture = LogCapture(batch_size=2)
    capture.record("x", value)
    capture.record("x", value * 3)
    capture.accept()
    mean, _ = flush(capture)["x"]
    assert mean.item() == 6.0
    assert mean.dtype == dtype
    assert mean.shape == ()
    assert not mean.requires_grad


def test_a_boolean_counts_as_zero_or_one():
    capture = LogCapture()
    for value in (True, False, torch.tensor(True), torch.tensor(True)):
        capture.record("hit", value)
    capture.accept()
    assert values(capture) == {"hit": 0.75}


def test_half_precision_values_are_summed_in_single_precision():
    # In bfloat16 a sum of ones stops at 256, where the spacing of its numbers becomes 2.
    capture = LogCapture()
    for _ in range(600):
        capture.record("x", torch.tensor(1.0, dtype=torch.bfloat16), reduce_fx="sum")
    capture.accept()
    assert values(capture) == {"x": 600.0}


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "max", "min"])
def test_a_logged_tensor_may_change_afterwards_and_is_not_changed(reduce_fx):
    capture = LogCapture()
    value = torch.tensor(2.0)
    capture.record("x", value, reduce_fx=reduce_fx)
    value.fill_(100.0)
    other = torch.tensor(2.0)
    capture.record("x", other, reduce_fx=reduce_fx)
    capture.record("x", 2.0, reduce_fx=reduce_fx)
    capture.accept()
    assert values(capture) == {"x": 6.0 if reduce_fx == "sum" else 2.0}
    assert value.item() == 100.0
    assert other.item() == 2.0


def test_the_batch_size_option_goes_before_the_batchs_own():
    capture = LogCapture(batch_size=100)
    capture.record("x", 1.0, batch_size=1)
    capture.record("x", 5.0, batch_size=3)
    capture.accept()
    value, options = flush(capture)["x"]
    assert value.item() == 4.0  # (1 + 15) / 4
    assert options["batch_size"] == 4


def test_options_are_handed_on_and_overrides_replace_them():
    capture = LogCapture(batch_size=2)
    capture.record("x", 1.0, prog_bar=True, on_step=True, logger=False)
    capture.accept()
    capture.record("x", 1.0, prog_bar=True, on_step=True, logger=False)
    capture.accept()
    _, options = flush(capture, on_step=False, sync_dist=True)["x"]
    assert options == {"prog_bar": True, "on_step": False, "logger": False, "sync_dist": True, "batch_size": 4}


def test_names_are_kept_apart():
    capture = LogCapture()
    record(capture, 1, a=1.0, b=10.0)
    capture.accept()
    record(capture, 3, b=20.0, c=-1.0)
    capture.accept()
    # b: (1 * 10 + 3 * 20) / 4.
    assert values(capture) == {"a": 1.0, "b": 17.5, "c": -1.0}


@pytest.mark.parametrize("value", ["text", torch.tensor([1.0, 2.0])], ids=["string", "vector"])
def test_what_is_no_number_is_handed_on_as_it_is(value):
    # Lightning's own `log` then says what is wrong with it.
    capture = LogCapture()
    capture.record("x", value)
    capture.accept()
    handed_on, options = flush(capture)["x"]
    assert handed_on is value
    assert options["batch_size"] == 1


def test_a_metric_keeps_its_own_state_and_shows_the_mean_of_the_rounds_batches():
    capture, metric = LogCapture(), MulticlassAccuracy(num_classes=2, average="micro")
    batches = [
        (torch.tensor([0, 1]), torch.tensor([0, 1])),  # 2 of 2 right
        (torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 1, 1])),  # 1 of 4
        (torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 0, 0])),  # 2 of 4
    ]
    for client_batches in (batches[:2], batches[2:]):
        for predicted, target in client_batches:
            metric(predicted, target)
            capture.batch_size = len(target)
            capture.record("accuracy", metric)
        capture.accept()
    value, options = flush(capture)["accuracy"]
    assert value is metric
    assert options["batch_size"] == 10
    assert metric._forward_cache.item() == pytest.approx(5 / 10)  # (2 * 1 + 4 * 1/4 + 4 * 1/2) / 10
    assert metric.compute().item() == pytest.approx(5 / 10)
    metric.update(torch.tensor([0, 0]), torch.tensor([1, 1]))
    assert metric.compute().item() == pytest.approx(5 / 12)  # its state went on from 5 of 10


def test_a_metrics_state_is_its_own_not_the_mean():
    capture, metric = LogCapture(batch_size=1), SumMetric()
    for value in (1.0, 2.0, 6.0):
        metric(value)
        capture.record("total", metric)
    capture.accept()
    assert flush(capture)["total"][0] is metric
    assert metric._forward_cache.item() == 3.0  # the mean of the steps, for the step's log
    assert metric.compute().item() == 9.0  # the metric's own sum, for the epoch's log


def test_a_metric_that_is_only_updated_is_handed_on():
    capture, metric = LogCapture(), MeanMetric()
    metric.update(4.0)
    capture.record("mean", metric)
    capture.accept()
    assert flush(capture)["mean"][0] is metric
    assert metric.compute().item() == 4.0


def test_a_metric_of_many_values_is_handed_on():
    capture, metric = LogCapture(), MulticlassAccuracy(num_classes=2, average=None)
    metric(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    capture.record("accuracy", metric)
    capture.accept()
    assert flush(capture)["accuracy"][0] is metric
    assert metric._forward_cache.tolist() == [0.5, 1.0]


def test_numpy_numbers_are_averaged_like_others():
    capture = LogCapture(batch_size=1)
    for value in (np.float32(1.0), np.int64(3), 2.0):
        capture.record("value", value)
    capture.accept()
    assert float(flush(capture)["value"][0]) == 2.0
