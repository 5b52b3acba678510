"""The paper's experiments: every config makes what it says, the models and tasks are the paper's."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lbgm import GradientSpaceCallback, LBGMFederated, LookBack
from lightning_lbgm.payloads.base import Dense
from recipes.paper.cli import main
from recipes.paper.coefficient_test import CoefficientTest
from recipes.paper.experiments import AUTHORS, EXPERIMENTS, LABELS
from recipes.paper.models import CNN, FCN, VGG19, ResNet18, UNet
from recipes.paper.report import PAGE, draw, table
from recipes.paper.results import read, run_missing
from recipes.paper.tasks import Classification, LandmarkRegression, Segmentation

HERE = Path(__file__).parent.parent / "recipes" / "paper"
CONFIGS = sorted(path for path in HERE.glob("*.yaml") if path.name != "defaults.yaml")
METHODS = sorted((HERE / "methods").glob("*.yaml"))
DATA = os.environ.get("LBGM_DATA")
needs_data = pytest.mark.skipif(not (DATA and (Path(DATA) / "MNIST").is_dir()), reason="LBGM_DATA names no MNIST")


def num_parameters(net):
    return sum(p.numel() for p in net.parameters())


def build(*configs, args=()):
    return main([*(f"--config={path}" for path in configs), "--trainer.logger=false", *args], run=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_makes_its_experiment(config):
    data, model, partition = config.stem.split("_")
    cli = build(config)
    classes = {"cifar100": 100}.get(data, 10)
    few = {"cifar100": 10}.get(data, 3)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, LBGMFederated)
    assert re.sub("[-_]", "", type(cli.datamodule).__name__.lower()).startswith(
        {"fmnist": "fashionmnist", "faces": "face"}.get(data, data)
    )
    if partition == "noniid":
        assert strategy.partitioner.classes_per_client == few
    else:
        assert type(strategy.partitioner).__name__.startswith({"iid": "IID", "persons": "Natural"}[partition])
    assert strategy.settings()["server_optimizer"].startswith("SGD(lr=1.0, momentum=0.9")
    assert repr(strategy.uplink) == "[LookBack(threshold=0.2, granularity='model')]"
    channels = cli.datamodule.in_channels
    size = {"cifar10": 32, "cifar100": 32, "celeba": 64, "faces": 32, "voc": 64, "coco": 64}.get(data, 28)
    size = getattr(cli.datamodule, "size", None) or size if model == "vgg19" else size
    outputs = cli.model.net(torch.zeros(2, channels, size, size))
    assert outputs.shape == ((2, 21, 64, 64) if model == "unet" else (2, classes))
    assert cli.datamodule.num_outputs == outputs.shape[1]
    # Full-batch steps: no client of any of these sets has more examples.
    assert cli.datamodule.batch_size >= 60_000
    lr = {"celeba": 2e-5, "faces": 2e-4, "voc": 0.001, "coco": 0.05}.get(data, {"svm": 0.001}.get(model, 0.01))
    assert cli.model.lr == (0.03 if config.stem.startswith("fmnist_cnn") else lr)


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_goes_on_top_of_a_config(method):
    cli = build(HERE / "mnist_fcn_noniid.yaml", method)
    strategy = cli.trainer.strategy
    if method.stem == "centralized":
        assert not isinstance(strategy, LBGMFederated)
        assert any(isinstance(callback, GradientSpaceCallback) for callback in cli.trainer.callbacks)
        assert cli.datamodule.batch_size == 128
        return
    uplink = repr(strategy.uplink)
    if method.stem.startswith("lbgm_"):
        layer, threshold = "layer" in method.stem, method.stem.split("_")[-1]
        granularity = "layer" if layer else "model"
        assert uplink == f"[LookBack(threshold={threshold}, granularity='{granularity}')]"
        return
    if method.stem.startswith("coefficient_"):
        assert uplink == f"[CoefficientTest(threshold={method.stem.split('_')[-1]})]"
        return
    look_back = f"LookBack(threshold={0.8 if method.stem == 'topk_lbgm' else 0.2}, granularity='layer')"
    assert (uplink, strategy.cohort_size, strategy.local_steps, cli.datamodule.batch_size) == {
        "fedavg": ("[]", 100, None, 60_000),
        "topk": ("[ErrorFeedback(TopK(fraction=0.1))]", 100, None, 60_000),
        "topk_lbgm": (f"[ErrorFeedback([TopK(fraction=0.1), {look_back}])]", 100, None, 60_000),
        "atomo": ("[ATOMO(rank=2, sampling='top')]", 100, None, 60_000),
        "atomo_lbgm": (f"[ATOMO(rank=2, sampling='top'), {look_back}]", 100, None, 60_000),
        "signsgd": ("[SignSGD()]", 100, None, 60_000),
        "signsgd_lbgm": (f"[SignSGD(), {look_back}]", 100, None, 60_000),
        "half_the_clients": (repr([LookBack(0.2)]), 50, None, 60_000),
        "distributed": (repr([LookBack(0.2)]), 100, 1, 128),
    }[method.stem]


def test_the_models_have_the_papers_sizes():
    assert num_parameters(FCN()) == 784 * 10 + 10
    convolutions = 20 * 25 + 20 + 50 * 20 * 25 + 50
    assert num_parameters(CNN()) == convolutions + 800 * 500 + 500 + 500 * 10 + 10
    assert num_parameters(CNN(3, 32)) == convolutions + 20 * 50 + 1250 * 500 + 500 + 500 * 10 + 10
    assert num_parameters(ResNet18(1)) == 11_181_642 - 2 * 64 * 49
    assert num_parameters(VGG19(1)) == 20_040_522 - 2 * 64 * 9  # VGG19 for CIFAR
    assert ResNet18(1)(torch.zeros(2, 1, 28, 28)).shape == VGG19(1)(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_a_unet_keeps_the_size_and_passes_gradients_to_every_parameter():
    net = UNet(1, 5, width=4, depth=3)
    logits = net(torch.randn(2, 1, 12, 16))
    assert logits.shape == (2, 5, 12, 16)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_squared_hinge_loss_is_summed_over_the_wrong_classes():
    task = Classification(nn.Identity(), 3, loss="squared_hinge")
    # Class 1: class 0 is over by 1 + 0.5 - 2 < 0, class 2 by 1 + 1.5 - 2 = 0.5. Class 0: 1 + 1 - 0 and 1 + 3 - 0.
    loss = task.loss(torch.tensor([[0.5, 2.0, 1.5], [0.0, 1.0, 3.0]]), torch.tensor([1, 0]))
    assert float(loss) == pytest.approx((0.25 + (4 + 16)) / 2)


def test_segmentation_does_not_count_pixels_without_a_class():
    task = Segmentation(nn.Identity(), 2)
    logits = torch.tensor([[[[9.0, 0.0, 0.0]], [[0.0, 9.0, 9.0]]]])  # classes 0, 1, 1
    targets = torch.tensor([[[0, 255, 0]]])
    # Class 0: one of two pixels; class 1: predicted once, wrongly.
    task.metric(logits, targets)
    assert float(task.metric.compute()) == pytest.approx((1 / 2 + 0) / 2)
    sure, wrong = torch.log1p(torch.exp(torch.tensor(-9.0))), torch.log1p(torch.exp(torch.tensor(9.0)))
    assert float(task.loss(logits, targets)) == pytest.approx(float(sure + wrong) / 2)


def test_landmarks_are_judged_by_the_mean_squared_error():
    task = LandmarkRegression(nn.Identity())
    outputs, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    task.metric(outputs, targets)
    assert float(task.loss(outputs, targets)) == float(task.metric.compute()) == 2.5


@pytest.mark.parametrize("data", ["cifar100_fcn_iid", "celeba_fcn_iid", "voc_unet_iid"])
def test_without_the_data_the_command_says_what_to_do(data, tmp_path):
    args = ["fit", f"--config={HERE / f'{data}.yaml'}", f"--data.init_args.root={tmp_path}", "--trainer.logger=false"]
    with pytest.raises(FileNotFoundError, match="LBGM_DATA"):
        main([*args, f"--data.init_args.cache={tmp_path / 'cache'}", "--trainer.enable_model_summary=false"])


def test_the_authors_earlier_test_is_of_the_coefficient():
    stage = CoefficientTest(0.5)
    state = stage.init()

    def recycled(*values):
        return stage.encode(Dense(torch.tensor(values)), state).decision.recycled

    assert recycled(2.0, 0.0) == (False,)  # no LBG yet
    assert recycled(1.0, 5.0) == (True,)  # rho = 0.5, at an angle of 79 degrees
    assert recycled(0.9, 0.0) == (False,)  # rho = 0.45, at an angle of 0; it is the LBG now
    assert recycled(1.0, 0.0) == (False,)  # rho = 1.1


ROWS = [  # two rounds of one client of two
    {"name": "fedavg", "round": [1, 2], "value": [0.5, 0.75], "uplink_floats": [2000.0, 4000.0]},
    {"name": "coefficient_0.2", "round": [1, 2], "value": [0.5, 0.25], "uplink_floats": [2000.0, 2400.0]},
]


def test_the_table_has_best_and_last_metric_floats_and_the_authors(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "mnist_fcn", replace(EXPERIMENTS["mnist_fcn"], clients=2))
    assert table("mnist_fcn", ROWS).splitlines() == [
        "| method | best acc | authors' best acc | last acc | floats a client | of FedAvg's |",
        "| --- | --- | --- | --- | --- | --- |",
        "| FedAvg | 0.750 | 0.909 | 0.750 | 2,000 | 100.0% |",
        "| coefficient ≥ 0.2, by tensor | 0.500 | 0.864 | 0.250 | 1,200 | 60.0% |",
    ]


def test_of_an_error_the_smallest_is_best():
    rows = [{**row, "name": name} for row, name in zip(ROWS, ("fedavg", "lbgm_0.2"))]
    assert "| LBGM 0.2 | 0.250 | 0.250 |" in table("faces_cnn", rows)


def test_the_figure_has_the_papers_three_panels():
    figure = draw("mnist_fcn", ROWS)
    left, middle, right = figure.axes
    for line, row in zip(left.lines, ROWS):
        assert (list(line.get_xdata()), list(line.get_ydata())) == (row["round"], row["value"])
    assert list(middle.lines[1].get_ydata()) == list(right.lines[1].get_xdata()) == [20.0, 24.0]


@needs_data
@pytest.mark.slow
def test_what_is_missing_is_run_and_kept(tmp_path, monkeypatch):
    options = ("--trainer.max_epochs=3", "--data.init_args.num_train=600", "--data.init_args.num_val=500")
    methods = ("fedavg", "lbgm_0.9")
    monkeypatch.setitem(EXPERIMENTS, "mnist_fcn", replace(EXPERIMENTS["mnist_fcn"], options=options, methods=methods))
    results = tmp_path / "results.jsonl"
    assert run_missing(["mnist_fcn"], results, tmp_path, jobs=2)
    kept = read(results)
    fedavg, lbgm = kept["mnist_fcn", "fedavg"], kept["mnist_fcn", "lbgm_0.9"]
    assert fedavg["round"] == lbgm["round"] == [1, 2, 3]
    assert fedavg["uplink_floats"][-1] == pytest.approx(3 * 100 * 7850, rel=0.01)
    assert lbgm["uplink_floats"][-1] < 2 * 100 * 7850
    before = results.read_text()
    assert run_missing(["mnist_fcn"], results, tmp_path, jobs=2)
    assert results.read_text() == before


def test_the_page_shows_the_results_kept():
    page, known = PAGE.read_text(), read(HERE / "results.jsonl")
    for name, experiment in EXPERIMENTS.items():
        rows = [known[name, method] for method in experiment.methods]
        assert f"<!-- {name}: begin -->\n{table(name, rows)}\n<!-- {name}: end -->" in page
        assert f"](images/results_{name}.png)" in page
        assert (PAGE.parent / "images" / f"results_{name}.png").stat().st_size < 200_000


def test_every_experiment_names_configs_that_there_are():
    for experiment in EXPERIMENTS.values():
        assert (HERE / f"{experiment.config}.yaml").is_file()
        assert experiment.methods[0] == "fedavg"
        for method in experiment.methods:
            assert (HERE / "methods" / f"{method}.yaml").is_file()
            assert method in LABELS
    assert set(AUTHORS) <= set(EXPERIMENTS)
    assert all(set(numbers) <= set(EXPERIMENTS[name].methods) for name, numbers in AUTHORS.items())
