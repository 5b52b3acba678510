"""The convergence monitor against hand-derived numbers and against a plain loop that keeps every update."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, fit_tiny, flat_params, make_data
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import (
    QSGD,
    ConvergenceMonitor,
    ErrorFeedback,
    LBGMCallback,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    TopK,
)
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.reports.metrics import convergence_metrics
from lightning_lbgm.reports.reports import AggregateError, ClientReport, RoundReport
from lightning_lbgm.server.compression_error import CompressionError

DOCS = Path(__file__).parents[2] / "docs"


def watched(fit, strategy, monitor=None, **kwargs):
    """Train with a monitor and return (each round's metrics without the prefix, recorder, trainer)."""
    recorder = Recorder()
    monitor = monitor or ConvergenceMonitor()
    monitor.figure = False  # takes longer than the rounds
    trainer, _ = fit(strategy, callbacks=[monitor, recorder, LBGMCallback(figures=False)], **kwargs)
    rounds = [
        {name.removeprefix("convergence/"): v for name, v in metrics.items() if name.startswith("convergence/")}
        for metrics in recorder.callback_metrics
    ]
    return rounds, recorder, trainer


# The parts


def test_the_gap_of_two_clients_by_hand():
    # Exact: 0.25 (3, 4) + 0.75 (0, 4) = (0.75, 4). Client 0 loses (0, 4), client 1 nothing: (0.75, 3) is used.
    errors = CompressionError(torch.zeros(2))
    assert errors.receive(torch.tensor([3.0, 4.0]), Dense(torch.tensor([3.0, 0.0])), 0.25) == 16
    assert errors.receive(torch.tensor([0.0, 4.0]), Dense(torch.tensor([0.0, 4.0])), 0.75) == 0
    error = errors.finish(torch.tensor([0.75, 3.0]), 1.0)
    assert error.norm == 1
    assert error.exact_norm == pytest.approx(math.hypot(0.75, 4))
    assert error.relative == pytest.approx(1 / math.hypot(0.75, 4))
    assert error.cosine == pytest.approx((0.75**2 + 12) / math.hypot(0.75, 4) / math.hypot(0.75, 3))


def test_weights_renormalise_where_a_client_was_left_out():
    # Client 1 with weight 0.75 was rejected: the mean is client 0's alone, exact (3, 4), used (3, 0).
    errors = CompressionError(torch.zeros(2))
    errors.receive(torch.tensor([3.0, 4.0]), Dense(torch.tensor([3.0, 0.0])), 0.25)
    assert errors.finish(torch.tensor([3.0, 0.0]), 0.25) == AggregateError(4.0, 5.0, pytest.approx(0.6))


def test_two_processes_add_up_what_they_received():
    parts = [CompressionError(torch.zeros(2)), CompressionError(torch.zeros(2))]
    parts[0].receive(torch.tensor([3.0, 4.0]), Dense(torch.tensor([3.0, 0.0])), 0.25)
    parts[1].receive(torch.tensor([0.0, 4.0]), Dense(torch.tensor([0.0, 0.0])), 0.75)
    total = parts[0]._sum + parts[1]._sum
    for part in parts:
        part.combine(lambda tensor: tensor.copy_(total))
        # Lost: 0.25 (0, 4) + 0.75 (0, 4) = (0, 4). Used: (0.75, 0).
        assert part.finish(torch.tensor([0.75, 0.0]), 1.0).norm == 4


def test_nothing_received_has_no_error():
    assert CompressionError(torch.zeros(2)).finish(None, 0.0) is None


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_the_mean_gap_is_never_longer_than_the_weighted_mean_of_the_clients(num_clients, size, seed):
    """|sum w e|^2 <= sum w |e|^2 (Jensen); and the exact mean is that of the updates themselves."""
    generator = torch.Generator().manual_seed(seed)
    updates, decoded = torch.randn(2, num_clients, size, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_clients, generator=generator, dtype=torch.float64) + 0.01
    weights /= weights.sum()
    errors = CompressionError(updates[0])
    squared = [errors.receive(u, Dense(d), float(w)) for u, d, w in zip(updates, decoded, weights)]
    error = errors.finish(weights @ decoded, 1.0)
    assert error.norm**2 <= sum(w * e for w, e in zip(weights.tolist(), squared)) + 1e-9
    assert error.exact_norm == pytest.approx(float((weights @ updates).norm()))
    assert error.norm == pytest.approx(float((weights @ (updates - decoded)).norm()))


def client(k, squared_error=math.nan, steps=1, norm=1.0, rejected=False):
    return ClientReport(k, 1, steps, 0.0, norm, 0, 0, 0, rejected=rejected, squared_error=squared_error)


def test_the_metrics_of_a_report_by_hand():
    # eta = 0.5: client 0 made 2 steps and is divided by (0.5 * 2)^2 = 1, client 1 made 1 and by 0.25.
    clients = (client(0, 0.5, 2, norm=3.0), client(1, 0.5, 1, norm=4.0), client(2, norm=math.nan, rejected=True))
    report = RoundReport(0, clients, 2.0, AggregateError(norm=1.0, exact_norm=4.0, cosine=0.9))
    assert convergence_metrics(report, lr=0.5, bound=0.5) == {
        "convergence/sent_error_mean": 1.25,
        "convergence/sent_error_max": 2.0,
        "convergence/update_norm_mean": 3.5,
        "convergence/update_norm_min": 3.0,
        "convergence/update_norm_max": 4.0,
        "convergence/gap_norm": 1.0,
        "convergence/gap_relative": 0.25,
        "convergence/gap_cosine": 0.9,
        "convergence/over_bound_fraction": 0.5,  # 0.5 itself is within the bound
    }
    assert "convergence/over_bound_fraction" not in convergence_metrics(report, lr=0.5)


@pytest.mark.parametrize("lr", [0.0, math.nan])
def test_without_a_learning_rate_only_what_is_divided_by_it_is_unknown(lr):
    metrics = convergence_metrics(RoundReport(0, (client(0, 0.5),), 2.0, AggregateError(1.0, 4.0, 0.9)), lr, bound=1.0)
    unknown = {name for name, value in metrics.items() if math.isnan(value)}
    assert unknown == {f"convergence/{n}" for n in ("sent_error_mean", "sent_error_max", "over_bound_fraction")}


def test_a_round_without_any_update_is_unknown():
    metrics = convergence_metrics(RoundReport(0, (client(0, rejected=True, norm=math.inf),), 0.0), 0.1, bound=1.0)
    assert all(math.isnan(value) for value in metrics.values())
    assert math.isnan(AggregateError(1.0, 0.0, math.nan).relative)


def test_the_metrics_page_lists_them():
    report = RoundReport(0, (client(0, 0.5),), 2.0, AggregateError(1.0, 4.0, 0.9))
    listed = set(re.findall(r"^\| `(convergence/\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    assert listed == set(convergence_metrics(report, 1.0, 1.0))


# A federation


class Pull(pl.LightningModule):
    """Two numbers w that each example x pulls to itself: the gradient is w - mean(x)."""

    def __init__(self, optimizer=torch.optim.SGD, lr=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.optimizer, self.lr = optimizer, lr

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.w - batch[0]).square().sum(1).mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


PULLS = TensorDataset(torch.eye(2))


def test_two_clients_by_hand(fit):
    """Two clients pull w to (1, 0) and (0, 1); eta = 0.5, one step, weights 1/2.

    Round 0, w = 0: d = (-1, 0) and (0, -1), in full; w becomes (1/4, 1/4). Round 1: d = (-3/4, 1/4) and (1/4, -3/4).
    The first has the squared sine 1/10 to (-1, 0): recycled, (-3/4, 0) is used, |d|^2 sin^2 = 1/16; so has the other.
    Updates are half of that. Exact mean: (-1/8, -1/8), used (-3/16, -3/16), gap (1/16, 1/16): half of it, no angle.
    """
    strategy = LBGMFederated(num_clients=2, partitioner=NaturalPartitioner([0, 1]), uplink=[LookBack(0.2)])
    monitor = ConvergenceMonitor(bound=0.05)
    with pytest.warns(UserWarning, match=r"Round 1: the largest sent error, 0.0625, .*bound=0.05.*100%") as caught:
        (first, second), recorder, _ = watched(fit, strategy, monitor, module=Pull(), dataset=PULLS, max_epochs=2)
    assert [c.outcome for c in recorder.reports[1].clients] == ["recycled"] * 2
    assert sum("bound=0.05" in str(warning.message) for warning in caught) == 1
    assert first == pytest.approx(
        {
            "sent_error_mean": 0.0,
            "sent_error_max": 0.0,
            "update_norm_mean": 0.5,
            "update_norm_min": 0.5,
            "update_norm_max": 0.5,
            "gap_norm": 0.0,
            "gap_relative": 0.0,
            "gap_cosine": 1.0,
            "over_bound_fraction": 0.0,
        }
    )
    assert second == pytest.approx(
        {
            "sent_error_mean": 1 / 16,
            "sent_error_max": 1 / 16,
            "update_norm_mean": math.sqrt(10) / 8,
            "update_norm_min": math.sqrt(10) / 8,
            "update_norm_max": math.sqrt(10) / 8,
            "gap_norm": math.sqrt(2) / 16,
            "gap_relative": 0.5,
            "gap_cosine": 1.0,
            "over_bound_fraction": 1.0,
        }
    )


def test_the_sent_error_is_the_papers_product_where_it_recycles_and_zero_where_not(fit):
    strategy = LBGMFederated(num_clients=3, uplink=[LookBack(0.2)], local_steps=2, seed=0)
    rounds, recorder, _ = watched(fit, strategy, module=seeded_fcn(), batch_size=20, shuffle=True, max_epochs=12)
    outcomes = set()
    for metrics, report in zip(rounds, recorder.reports):
        expected = [
            (c.update_norm / (0.3 * 2)) ** 2 * c.lbp_error if c.outcome == "recycled" else 0.0 for c in report.clients
        ]
        outcomes.update(c.outcome for c in report.clients)
        assert metrics["sent_error_mean"] == pytest.approx(sum(expected) / 3, rel=1e-3, abs=1e-9)
        assert metrics["sent_error_max"] == pytest.approx(max(expected), rel=1e-3, abs=1e-9)
    assert outcomes == {"recycled", "refreshed"}


def seeded_fcn():
    torch.manual_seed(0)
    return TinyModule(net=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


OWNER = torch.tensor([0] * 10 + [1] * 20 + [2] * 60)
SIZES = [p.numel() for p in seeded_fcn().parameters()]


class Reference:
    """The uplink of one client, written out: what the server sees of an update, and what both keep."""

    def __init__(self, threshold, fraction=1.0, feedback=False, cuts=None):
        self.threshold, self.fraction, self.feedback, self.cuts = threshold, fraction, feedback, cuts
        self.lbgs, self.residual = {}, 0.0

    def send(self, update):
        wanted = update + self.residual if self.feedback else update
        kept = torch.zeros_like(wanted)
        largest = wanted.abs().topk(max(1, round(self.fraction * len(wanted)))).indices
        kept[largest] = wanted[largest]
        parts = []
        for index, part in enumerate(kept.split(self.cuts or len(kept))):
            lbg = self.lbgs.get(index)
            if lbg is not None and 1 - (part @ lbg) ** 2 / (part @ part) / (lbg @ lbg) <= self.threshold:
                parts.append((part @ lbg) / (lbg @ lbg) * lbg)
            else:
                self.lbgs[index] = part.clone()
                parts.append(part)
        sent = torch.cat(parts)
        self.residual = wanted - sent
        return sent


def reference_rounds(make_client, num_rounds, lr=0.3, num_steps=2):
    """Train in a plain loop, full-batch steps, weights by examples; keep every update and compare the means."""
    module = seeded_fcn()
    x, y = make_data(90).tensors
    theta = flat_params(module)
    clients = [make_client() for _ in range(3)]
    weights = torch.tensor([1.0, 2.0, 6.0]) / 9
    rounds = []
    for _ in range(num_rounds):
        updates = []
        for k in range(3):
            nn.utils.vector_to_parameters(theta.clone(), module.parameters())
            for _ in range(num_steps):
                grads = torch.autograd.grad(module.loss((x[k == OWNER], y[k == OWNER])), list(module.parameters()))
                with torch.no_grad():
                    for p, grad in zip(module.parameters(), grads):
                        p -= lr * grad
            updates.append(theta - flat_params(module))
        sent = torch.stack([c.send(u) for c, u in zip(clients, updates)])
        exact = torch.stack(updates)
        used, aim = weights @ sent, weights @ exact
        errors = (exact - sent).square().sum(1) / (lr * num_steps) ** 2
        rounds.append(
            {
                "sent_error_mean": float(errors.mean()),
                "sent_error_max": float(errors.max()),
                "update_norm_mean": float(exact.norm(dim=1).mean()),
                "update_norm_min": float(exact.norm(dim=1).min()),
                "update_norm_max": float(exact.norm(dim=1).max()),
                "gap_norm": float((aim - used).norm()),
                "gap_relative": float((aim - used).norm() / aim.norm()),
                "gap_cosine": float(torch.cosine_similarity(aim, used, dim=0)),
            }
        )
        theta = theta - used
    return rounds, theta


@pytest.mark.parametrize(
    ("uplink", "make_client"),
    [
        ([LookBack(0.2)], lambda: Reference(0.2)),
        ([LookBack(0.2, "layer")], lambda: Reference(0.2, cuts=SIZES)),
        ([TopK(0.4), LookBack(0.4)], lambda: Reference(0.4, 0.4)),
        ([ErrorFeedback(TopK(0.3))], lambda: Reference(-1.0, 0.3, feedback=True)),
        ([ErrorFeedback([TopK(0.4), LookBack(0.3)])], lambda: Reference(0.3, 0.4, feedback=True)),
    ],
    ids=["look-back", "layer", "top-k and look-back", "error feedback", "error feedback around both"],
)
@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
def test_everything_equals_a_plain_loop_that_keeps_all_updates(fit, uplink, make_client, execution):
    strategy = LBGMFederated(
        num_clients=3, partitioner=NaturalPartitioner(OWNER), uplink=uplink, local_epochs=2, execution=execution
    )
    rounds, recorder, _ = watched(fit, strategy, module=seeded_fcn(), dataset=make_data(90), max_epochs=10)
    expected, theta = reference_rounds(make_client, 10)
    torch.testing.assert_close(recorder.params[-1], theta, atol=1e-4, rtol=1e-3)
    for found, wanted in zip(rounds, expected):
        assert found == pytest.approx(wanted, rel=2e-3, abs=2e-5)
    assert max(wanted["gap_relative"] for wanted in expected) > 0.05


def test_fedavg_has_no_gap(fit):
    rounds, *_ = watched(fit, LBGMFederated(num_clients=4, uplink=[], seed=0), ConvergenceMonitor(bound=1e-30))
    for metrics in rounds:
        names = ("sent_error_mean", "sent_error_max", "gap_norm", "gap_relative", "over_bound_fraction")
        assert [metrics[name] for name in names] == [0.0] * 5
        assert metrics["gap_cosine"] == pytest.approx(1.0, abs=1e-6)


def test_a_rejected_client_is_left_out(fit):
    # Client 1's examples are not finite. Client 0 has 1/3 of the examples, and what is left has weight 1.
    x, y = make_data(60).tensors
    x[20:] = math.nan
    strategy = LBGMFederated(
        num_clients=2, partitioner=NaturalPartitioner([0] * 20 + [1] * 40), uplink=[TopK(0.5)], seed=0
    )
    with pytest.warns(UserWarning, match="is not finite"):
        rounds, *_ = watched(fit, strategy, dataset=TensorDataset(x, y), max_epochs=3)
    alone = LBGMFederated(num_clients=1, uplink=[TopK(0.5)], seed=0)
    expected, *_ = watched(fit, alone, dataset=TensorDataset(x[:20], y[:20]), max_epochs=3)
    for found, wanted in zip(rounds, expected):
        assert found == pytest.approx(wanted, rel=1e-4)
        assert found["gap_relative"] > 0.1


def test_all_rejected_is_unknown_and_training_goes_on(fit):
    x, y = make_data(60).tensors
    with pytest.warns(UserWarning, match="is not finite"):
        rounds, _, trainer = watched(fit, LBGMFederated(num_clients=2), dataset=TensorDataset(x * math.nan, y))
    assert trainer.global_step == 3
    assert all(math.isnan(value) for metrics in rounds for value in metrics.values())


# The learning rate


class Scheduled(TinyModule):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def test_a_schedule_is_followed(fit):
    results = []
    for monitor in (ConvergenceMonitor(), ConvergenceMonitor(lr=1.0)):
        torch.manual_seed(0)
        strategy = LBGMFederated(num_clients=3, uplink=[TopK(0.3)], seed=0)
        results.append(watched(fit, strategy, monitor, module=Scheduled(), max_epochs=4)[0])
    for index, (found, unscaled) in enumerate(zip(*results)):
        assert unscaled["sent_error_max"] > 0
        assert found["sent_error_max"] == pytest.approx(unscaled["sent_error_max"] / (0.4 * 0.5**index) ** 2)


def test_learning_rates_that_differ_are_warned_of_once(fit):
    class Grouped(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.2}], lr=0.1)

    strategy = LBGMFederated(num_clients=2, uplink=[TopK(0.3)], seed=0)
    with pytest.warns(UserWarning, match=r"\[0.1, 0.2\].*`ConvergenceMonitor\(lr=...\)`") as caught:
        rounds, *_ = watched(fit, strategy, module=Grouped())
    assert sum("learning rates" in str(warning.message) for warning in caught) == 1
    assert all(math.isnan(metrics["sent_error_mean"]) and metrics["gap_norm"] > 0 for metrics in rounds)


# Around it


@pytest.mark.parametrize("uplink", [[LookBack(0.3)], [ErrorFeedback([TopK(0.3), QSGD(7)])]], ids=["lbgm", "feedback"])
def test_it_has_no_effect_on_training(fit, uplink):
    results = []
    for callbacks in ([], [ConvergenceMonitor()]):
        strategy = LBGMFederated(num_clients=5, clients_per_round=3, uplink=uplink, seed=1)
        trainer, module = fit(strategy, batch_size=4, shuffle=True, max_epochs=6, callbacks=callbacks)
        results.append((flat_params(module), trainer.strategy.ledger))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_without_a_monitor_nothing_is_measured(fit):
    recorder = Recorder()
    trainer, _ = fit(LBGMFederated(num_clients=3, uplink=[TopK(0.3)]), callbacks=[recorder])
    assert all(report.error is None for report in recorder.reports)
    assert all(math.isnan(c.squared_error) for report in recorder.reports for c in report.clients)
    assert not [name for name in trainer.callback_metrics if name.startswith("convergence/")]


def test_a_fit_after_the_monitor_has_gone_measures_nothing(fit):
    monitor, strategy = ConvergenceMonitor(), LBGMFederated(num_clients=3)
    trainer, module = fit(strategy, callbacks=[monitor], max_epochs=2)
    assert strategy.last_report.error is not None
    trainer.callbacks.remove(monitor)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader(make_data(), batch_size=1000))
    assert strategy.round_index == 3
    assert strategy.last_report.error is None


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Train for six rounds with a checkpoint after each, and return (monitor, folder)."""
    folder, monitor = tmp_path_factory.mktemp("unbroken"), ConvergenceMonitor(bound=1e-4)
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run_resumable(folder, monitor, callbacks=[checkpoint], enable_checkpointing=True)
    return monitor, folder


def run_resumable(folder, monitor, ckpt_path=None, **kwargs):
    torch.manual_seed(0)
    callbacks = [monitor, *kwargs.pop("callbacks", [])]
    strategy = LBGMFederated(num_clients=4, clients_per_round=2, uplink=[LookBack(0.4)], seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_tiny(folder, strategy, callbacks=callbacks, max_epochs=6, ckpt_path=ckpt_path, **kwargs)


def test_a_resumed_run_has_the_whole_history(unbroken, tmp_path):
    monitor, folder = unbroken
    again = ConvergenceMonitor(bound=1e-4)
    run_resumable(tmp_path, again, ckpt_path=folder / "epoch=2.ckpt")
    assert len(again._history) == 6
    assert again._history.points() == monitor._history.points()
    assert max(row[1] for row in again._history.points()) > 0
    state = torch.load(folder / "epoch=2.ckpt", weights_only=True)["callbacks"]["ConvergenceMonitor"]
    assert state["history"]["points"].shape == (3, 4)


def test_a_fresh_fit_with_the_same_monitor_starts_a_new_history(unbroken, tmp_path):
    monitor = ConvergenceMonitor()
    for _ in range(2):
        run_resumable(tmp_path, monitor)
    assert [row[0] for row in monitor._history.points()] == [0, 1, 2, 3, 4, 5]


def test_the_figure_is_drawn_where_the_other_figures_are(unbroken, fit, tmp_path):
    assert (unbroken[1] / "figures" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    fit(callbacks=[ConvergenceMonitor()], logger=CSVLogger(tmp_path, name="run", version=0))
    figures = tmp_path / "run" / "version_0" / "figures"
    assert {path.name for path in figures.iterdir()} > {"convergence.png", "lbp_error.png"}
    header = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "convergence/sent_error_max" in header


def test_it_can_be_switched_off_and_a_dev_run_writes_nothing(fit, tmp_path):
    fit(callbacks=[ConvergenceMonitor(figure=False)])
    assert not list(tmp_path.rglob("convergence.png"))
    fit(callbacks=[ConvergenceMonitor()], fast_dev_run=True)
    assert not list(tmp_path.rglob("convergence.png"))


@pytest.mark.parametrize("factor", [1.0, math.nan])
def test_a_run_without_any_error_or_any_update_has_a_figure(fit, tmp_path, factor):
    x, y = make_data(60).tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            LBGMFederated(num_clients=2, uplink=[]),
            dataset=TensorDataset(x * factor, y),
            callbacks=[ConvergenceMonitor()],
        )
    assert (tmp_path / "figures" / "convergence.png").exists()


def test_a_failed_fit_keeps_its_figure(fit, tmp_path):
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="boom"):
        fit(module=Failing(), callbacks=[ConvergenceMonitor()])
    assert (tmp_path / "figures" / "convergence.png").exists()


@pytest.mark.parametrize("name", ["bound", "lr"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "0.1", True])
def test_arguments_must_be_positive_numbers(name, value):
    with pytest.raises(ValueError, match=rf"`ConvergenceMonitor\({name}=...\)` must be a positive number"):
        ConvergenceMonitor(**{name: value})


def test_another_strategy_is_refused(fit):
    with pytest.raises(MisconfigurationException, match=r"`ConvergenceMonitor` .* SingleDeviceStrategy.*LBGMFederated"):
        fit("auto", callbacks=[ConvergenceMonitor()])
