"""The search for settings: what trials change, what a study holds, and how it goes on."""

from __future__ import annotations

import io
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import optuna
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from mlflow import MlflowClient
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, TrialState, create_trial

from recipes.tuning.__main__ import main, parse, run_inside
from recipes.tuning.report import draw_trials, table
from recipes.tuning.space import FIRST, suggest

BASE = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 3,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "logger": False,
        "callbacks": [
            {"class_path": "lightning_lbgm.LBGMCallback", "init_args": {"client_table": False, "figures": False}}
        ],
        "strategy": {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {"num_clients": 4, "local_epochs": 2}},
    },
}
CHOICE = {"fraction": 0.1, "threshold": 0.2, "down_fraction": 0.05, "local_steps": 3, "lr": 0.3}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Write the base config into a folder and go there."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def tune(folder, *args):
    """Run the command in a folder, where the base config is; return its exit code and what it printed, errors last."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    names = ["--base", f"{folder / 'base.yaml'}", "--output", f"{folder / 'out'}"]
    out, err, tracking_uri = io.StringIO(), io.StringIO(), mlflow.get_tracking_uri()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([*names, "--entry", "compare_entry", "--lr", "model.lr", *args])
    finally:
        mlflow.set_tracking_uri(tracking_uri)  # an MLFlowLogger sets it for the whole process
    return code, out.getvalue() + err.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Make a study of three trials; return its folder, exit code and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    return folder, *tune(folder, "--trials", "3")


def study_in(folder):
    return optuna.load_study(study_name="tuning", storage=f"sqlite:///{folder / 'out' / 'optuna.db'}")


def store_of(folder):
    return f"sqlite:///{folder / 'out' / 'mlflow.db'}"


# What is searched


@pytest.mark.parametrize(
    ("kind", "downlink", "expected"),
    [
        ("none", False, "[] []"),
        ("LookBack", False, "[LookBack(threshold=0.2, granularity='model')] []"),
        ("TopK, LookBack", True, "[ErrorFeedback([TopK(fraction=0.1), LookBack(threshold=0.2, granularity='model')])]"),
        ("TopK, SignSGD", False, "[ErrorFeedback([TopK(fraction=0.1), SignSGD()])] []"),
        ("Ternary", True, "[Ternary()] [TopK(fraction=0.05), SignSGD()]"),
    ],
)
def test_the_config_of_a_trial_makes_the_strategy_that_it_chose(base, kind, downlink, expected):
    import compare_entry

    changes = suggest(FixedTrial({**CHOICE, "uplink": kind, "downlink": downlink}), "model.lr")
    Path("changes.yaml").write_text(yaml.safe_dump(changes))
    args = ["--config=base.yaml", "--config=changes.yaml"]
    cli = LightningCLI(compare_entry.Module, compare_entry.Data, save_config_callback=None, args=args, run=False)
    strategy = cli.trainer.strategy
    assert f"{strategy.uplink!r} {strategy.downlink!r}".startswith(expected)
    assert bool(strategy.downlink.stages) == downlink
    assert (strategy.local_steps, cli.model.lr) == (3, 0.3)


def test_a_learning_rate_is_tuned_if_the_config_says_where_it_is():
    trial = FixedTrial({**CHOICE, "uplink": "none", "downlink": False})
    assert suggest(trial, "model.init_args.lr")["model"] == {"init_args": {"lr": 0.3}}
    assert suggest(trial, "trainer.strategy.init_args.seed")["trainer"]["strategy"]["init_args"].keys() == {
        *("uplink", "downlink", "local_epochs", "local_steps", "seed")
    }
    assert suggest(trial, None).keys() == {"trainer"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trial", "2"], "unrecognized argument: --trial"),
        (["--trials", "0"], "--trials must be positive; got 0"),
        (["--base", "missing.yaml"], "--base missing.yaml is not a file"),
        (["--sampler", "grid"], "invalid choice: 'grid'"),
    ],
)
def test_a_wrong_command_line_ends_with_a_message(base, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        parse(["--base", "base.yaml", *args])
    assert message in capsys.readouterr().err


# A study


def test_a_study_finds_the_front(first):
    """21 parameters of 4 bytes, 4 clients, 3 rounds: FedAvg sends 1008 bytes in each direction."""
    folder, code, printed = first
    assert code == 0
    study = study_in(folder)
    trials = study.trials[:3]
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    for trial, params in zip(trials, FIRST):
        assert params.items() <= trial.params.items()
    fedavg = trials[0]
    assert (fedavg.user_attrs["uplink_bytes"], fedavg.user_attrs["total_bytes"]) == (1008, 2016)
    assert fedavg.values[1] == pytest.approx(math.log10(2016))
    found = [(trial.values[0], -trial.values[1]) for trial in trials]
    best = [a for a in found if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in found)]
    assert f"3 trials, {len(best)} of them on the Pareto front." in printed
    assert len(re.findall(r"^\| \d", printed, re.MULTILINE)) == len(best)

    client = MlflowClient(store_of(folder))
    runs = client.search_runs([client.get_experiment_by_name("tuning").experiment_id])
    named = {run.info.run_name: run for run in runs}
    parent = named["tuning"].info.run_id
    children = [named[f"trial {number:03d}"] for number in range(3)]
    assert {(run.info.status, run.data.tags["mlflow.parentRunId"]) for run in children} == {("FINISHED", parent)}
    assert children[0].data.metrics["val/acc"] == fedavg.values[0] == fedavg.user_attrs["metric"]
    paths = {a.path for place in (None, "figures") for a in client.list_artifacts(parent, place)}
    assert paths == {"table.md", "figures", "figures/trials.png"}


def test_a_study_goes_on_where_it_was_interrupted(first):
    folder, *_ = first
    study, client = study_in(folder), MlflowClient(store_of(folder))
    lost = study.ask()  # its process is killed
    suggest(lost, "model.lr")
    lost_run = client.create_run(client.get_experiment_by_name("tuning").experiment_id).info.run_id
    lost.set_user_attr("run_id", lost_run)

    assert tune(folder, "--trials", "4")[0] == 0
    trials = study_in(folder).trials
    assert [trial.state.name for trial in trials] == [*["COMPLETE"] * 3, "FAIL", "COMPLETE"]
    assert trials[4].params == trials[3].params == lost.params
    assert client.get_run(lost_run).info.status == "KILLED"
    parents = {
        client.get_run(t.user_attrs["run_id"]).data.tags.get("mlflow.parentRunId") for t in (trials[0], trials[4])
    }
    (parent,) = parents
    assert client.get_run(parent).info.status == "FINISHED"

    code, printed = tune(folder, "--trials", "4")
    assert (code, len(study_in(folder).trials)) == (0, 5)  # there was nothing left to do
    assert "4 trials, " in printed
    code, printed = tune(folder, "--trials", "5", "--trainer.max_epochs=2")
    assert code == 1
    assert "out has a study with another base" in printed


def test_if_all_fail_it_gives_up_and_says_why(first, tmp_path):
    uri = store_of(first[0])  # a new one takes seconds
    args = ("--model.fail_at=1", "--sampler", "nsga2", "--tracking-uri", uri, "--experiment", "failing")
    code, printed = tune(tmp_path, *args)
    assert code == 1
    assert (
        len(re.findall(r"^trial 00\d failed: RuntimeError: ordered to fail \(log: .*\)$", printed, re.MULTILINE)) == 3
    )
    assert "No trial succeeded." in printed
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("failing").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED"] * 4

    assert tune(tmp_path, *args[1:], "--trials", "1")[0] == 0  # mended, it begins anew
    assert study_in(tmp_path).trials[0].state == TrialState.COMPLETE


def test_what_the_entry_said_last_is_the_reason(base, monkeypatch):
    Path("refuses.py").write_text(
        "import sys\nprint(sys.argv[1:])\nprint('no such setting', file=sys.stderr)\nsys.exit(2)"
    )
    monkeypatch.syspath_prepend(base)
    child = SimpleNamespace(log=Path("logs/a.log"), arguments=["fit", "--x=1"])
    with pytest.raises(RuntimeError, match="`python -m refuses` ended with 'no such setting'"):
        run_inside("refuses", child)
    assert child.log.read_text() == "['fit', '--x=1']\nno such setting\n"


# What is reported


def finished(params, metric, uplink, total):
    distributions = {
        "uplink": CategoricalDistribution(("none", "LookBack", "TopK, LookBack", "TopK, SignSGD", "Ternary")),
        "downlink": CategoricalDistribution((False, True)),
        "local_steps": IntDistribution(1, 10),
        **{name: FloatDistribution(0, 1) for name in ("fraction", "threshold", "down_fraction", "lr")},
    }
    return create_trial(
        params=params,
        distributions={name: distributions[name] for name in params},
        values=[metric, math.log10(total)],
        user_attrs={"metric": metric, "uplink_bytes": uplink, "total_bytes": total},
    )


FEDAVG = finished({"uplink": "none", "downlink": False, "local_steps": 2}, 0.9, 1e6, 2e6)
CHEAP = finished(
    {"uplink": "TopK, LookBack", "fraction": 0.1, "threshold": 0.25, "downlink": True, "down_fraction": 0.05,
     "local_steps": 1, "lr": 0.3}, 0.8, 1e4, 3e4,
)  # fmt: skip
WORSE = finished({"uplink": "LookBack", "threshold": 0.5, "downlink": False, "local_steps": 1}, 0.7, 1e5, 1.1e6)


def test_the_table_by_hand():
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in table([FEDAVG, CHEAP, WORSE], [FEDAVG, CHEAP], "val/acc").splitlines()
    ]
    assert cells[0][1:4] == ["val/acc", "total bytes", "of FedAvg's"]
    assert [row[1:] for row in cells[2:]] == [
        ["0.8000", "30,000", "1.50%", "10,000", "`[ErrorFeedback([TopK(0.100), LookBack(0.25)])]`",
         "`[TopK(0.050), SignSGD()]`", "1", "0.300"],
        ["0.9000", "2,000,000", "100.00%", "1,000,000", "`[]`", "whole model", "2", ""],
    ]  # fmt: skip
    assert table([CHEAP], [CHEAP], "val/acc").splitlines()[2].split(" | ")[3] == ""


def test_the_figure_shows_all_trials_and_the_front():
    (axes,) = draw_trials([FEDAVG, CHEAP, WORSE], [FEDAVG, CHEAP], "val/acc").axes
    assert axes.get_xscale() == "log"
    (front,) = axes.lines
    np.testing.assert_allclose(front.get_xydata(), [[3e4, 0.8], [2e6, 0.9]])
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert points == {
        "FedAvg": [[2e6, 0.9]], "TopK, LookBack, downlink too": [[3e4, 0.8]], "LookBack": [[1.1e6, 0.7]]
    }  # fmt: skip
