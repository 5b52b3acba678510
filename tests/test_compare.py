"""The comparison of several configs: what is run, what is read back, and what becomes of failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from mlflow import MlflowClient

from lightning_lbgm import ClientEvaluation
from recipes.compare.__main__ import METHODS, main, parse
from recipes.compare.report import Result, draw, is_lower_better, read_result, table, time_table, write_json_lines
from recipes.compare.runs import ChildRun, finished_children, train
from recipes.compare.times import Times, lasts, less, make_networks, reached
from recipes.compare.variants import Variant, make_variants, with_seeds
from recipes.paper.cli import main as paper

ROOT = Path(__file__).parent.parent
BASE = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 6,
        "enable_checkpointing": False,
        "logger": False,
        "strategy": {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {"num_clients": 4}},
    },
}


def uplink(*stages):
    return {"trainer": {"strategy": {"init_args": {"uplink": list(stages)}}}}


LBGM = uplink({"class_path": "lightning_lbgm.LookBack", "init_args": {"threshold": 1.0}})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write a base config, two more and a file of methods, and go to their folder."""
    monkeypatch.chdir(tmp_path)
    contents = {"base": BASE, "a": uplink(), "b": LBGM, "methods": {"FedAvg": uplink(), "LBGM": LBGM, "as it is": None}}
    for name, content in contents.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


# What is compared


def test_methods_stand_before_configs_and_all_over_the_base(files):
    variants = make_variants(Path("base.yaml"), [Path("b.yaml"), Path("a.yaml")], Path("methods.yaml"))
    assert [(v.name, [p.name for p in v.configs], v.changes) for v in variants] == [
        ("FedAvg", ["base.yaml"], uplink()),
        ("LBGM", ["base.yaml"], LBGM),
        ("as it is", ["base.yaml"], None),
        ("b", ["base.yaml", "b.yaml"], None),
        ("a", ["base.yaml", "a.yaml"], None),
    ]
    assert [v.configs for v in make_variants(None, [Path("a.yaml")], None)] == [(Path("a.yaml"),)]


def test_a_name_becomes_a_file_name():
    assert Variant("TopK 0.1 + LBGM/2", ()).file_name == "TopK_0.1_LBGM_2"


@pytest.mark.parametrize(
    ("base", "configs", "methods", "message"),
    [
        (None, [], None, "Nothing to compare"),
        (None, ["missing.yaml"], None, "missing.yaml is not a file"),
        (None, [], "methods.yaml", "as --base"),
        ("base.yaml", ["a.yaml", "folder/a.yaml"], None, "named 'a'"),
        ("base.yaml", [], "list.yaml", "must map names to changes"),
        ("base.yaml", [], "numbers.yaml", "must map names to changes"),
    ],
)
def test_mistakes_are_named(files, base, configs, methods, message):
    Path("folder").mkdir()
    for name, content in {"folder/a": {}, "list": [1], "numbers": {"FedAvg": 3}}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        make_variants(base and Path(base), [Path(c) for c in configs], methods and Path(methods))


def test_what_the_command_does_not_know_goes_to_the_entry(files):
    first = ["--base", "base.yaml", "--config", "a.yaml", "b.yaml", "--trainer.max_epochs=3", "--jobs", "2"]
    more = ["--config", "methods.yaml", "--seed_everything=1", "--data.root", "somewhere"]
    namespace, variants, options = parse([*first, *more])
    assert [variant.name for variant in variants] == ["a", "b", "methods"]
    assert options == ["--trainer.max_epochs=3", "--seed_everything=1", "--data.root", "somewhere"]
    assert (namespace.jobs, namespace.entry, namespace.metric) == (2, "recipes.paper", "val/acc")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--job", "2"], "unrecognized argument: --job"),
        (["--seeds", "1", "1"], "--seeds must differ; got [1, 1]"),
        (["--jobs", "0"], "--jobs must be positive; got 0"),
        (["--config", "missing.yaml"], "missing.yaml is not a file"),
    ],
)
def test_a_wrong_command_line_ends_with_a_message(files, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        parse(["--base", "base.yaml", *args])
    assert message in capsys.readouterr().err


def test_the_methods_of_the_recipe_are_what_their_names_say(files):
    import compare_entry

    _, variants, _ = parse(["--base", "base.yaml"])
    assert make_variants(Path("base.yaml"), [], METHODS) == variants
    uplinks = {}
    for variant in variants:
        Path("changes.yaml").write_text(yaml.safe_dump(variant.changes))
        args = ["--config=base.yaml", "--config=changes.yaml"]
        cli = LightningCLI(compare_entry.Module, compare_entry.Data, save_config_callback=None, args=args, run=False)
        strategy = cli.trainer.strategy
        uplinks[variant.name] = f"{strategy.uplink!r}{strategy.downlink!r}"
    look_back = "LookBack(threshold=0.2, granularity='model')"
    assert uplinks == {
        "FedAvg": "[][]",
        "LBGM 0.2": f"[{look_back}][]",
        "TopK 0.1": "[ErrorFeedback(TopK(fraction=0.1))][]",
        "TopK 0.1 + LBGM 0.8": f"[ErrorFeedback([TopK(fraction=0.1), {look_back.replace('0.2', '0.8')}])][]",
        "Ternary": "[Ternary()][]",
        "Ternary, sparse signs down": "[Ternary()][TopK(fraction=0.05), SignSGD(), Relax(factor=1.5)]",
    }


def test_the_federated_methods_go_with_their_base(tmp_path):
    base, methods = ROOT / "recipes/configs/fmnist_cohorts.yaml", ROOT / "recipes/compare/federated.yaml"
    shown = {}
    for variant in make_variants(base, [], methods):
        (tmp_path / "changes.yaml").write_text(yaml.safe_dump(variant.changes or {}))
        configs = [f"--config={path}" for path in (*variant.configs, tmp_path / "changes.yaml")]
        cli = paper([*configs, "--trainer.logger=false"], run=False)
        assert any(isinstance(callback, ClientEvaluation) for callback in cli.trainer.callbacks)
        settings = cli.trainer.strategy.settings()
        assert (settings["clients_per_round"], settings["server_optimizer"]) == (10, "SGD(lr=1.0)")
        shown[variant.name] = f"{settings['uplink']} {settings.get('objective')}"
    assert shown == {
        "FedAvg": "[] None",
        "FedProx": "[] FedProx(mu=0.1)",
        "SCAFFOLD": "[] SCAFFOLD()",
        "FedDyn": "[] FedDyn(alpha=0.03)",
        "LBGM 0.2": "[LookBack(threshold=0.2, granularity='model')] None",
        "Ternary": "[Ternary()] None",
    }


def test_a_fingerprint_changes_with_all_that_changes_a_run(files):
    variant = Variant("a", (Path("base.yaml"), Path("a.yaml")))
    prints = [
        variant.fingerprint("entry", ["--x.y=1"]),
        variant.fingerprint("other", ["--x.y=1"]),
        variant.fingerprint("entry", ["--x.y=2"]),
        Variant("a", variant.configs, LBGM).fingerprint("entry", ["--x.y=1"]),
    ]
    assert variant.fingerprint("entry", ["--x.y=1"]) == prints[0]
    Path("a.yaml").write_text("trainer: {max_epochs: 2}")
    prints.append(variant.fingerprint("entry", ["--x.y=1"]))
    assert len(set(prints)) == 5


# What is read back


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return (client, experiment, tracking uri) of a store, whose tables take seconds to create."""
    root = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(uri)
    return client, client.create_experiment("e", artifact_location=(root / "artifacts").as_uri()), uri


def log_run(client, experiment, values, sent):
    run_id = client.create_run(experiment).info.run_id
    for step, value in values.items():
        client.log_metric(run_id, "val/acc", value, step=step)
    for step, value in sent.items():
        client.log_metric(run_id, "comm/uplink_bytes_total", value, step=step)
        client.log_metric(run_id, "comm/uplink_floats_total", value / 4, step=step)
        client.log_metric(run_id, "comm/total_bytes_total", 3 * value, step=step)
    return run_id


def test_curves_are_those_of_the_rounds_that_were_validated(store):
    client, experiment, _ = store
    sent = {0: 400.0, 1: 404.0, 2: 408.0, 3: 412.0}
    run_id = log_run(client, experiment, {1: 0.5, 3: 0.25}, sent)
    assert read_result(client, run_id, "LBGM", "val/acc") == Result(
        "LBGM", run_id, "val/acc", 4, [2, 4], [0.5, 0.25], [404.0, 412.0], [101.0, 103.0], [1212.0, 1236.0]
    )
    also = ["val/acc", "comm/total_bytes_total", "never/logged"]
    assert read_result(client, run_id, "LBGM", "val/acc", also, seed=7).also == {
        "val/acc": 0.25, "comm/total_bytes_total": 1236.0
    }  # fmt: skip
    mean = read_result(client, run_id, "LBGM", "val/acc", also, tail=2)
    assert (mean.last, mean.also["comm/total_bytes_total"]) == (0.375, 1230.0)


@pytest.mark.parametrize(
    ("values", "sent", "message"),
    [
        (
            {},
            {0: 4.0},
            "'val/acc'; it logged comm/total_bytes_total, comm/uplink_bytes_total, comm/uplink_floats_total.*--metric",
        ),
        ({0: 0.5}, {}, "'comm/uplink_bytes_total'; it logged val/acc"),
        ({}, {}, "'comm/uplink_bytes_total'; it logged nothing"),
    ],
)
def test_what_was_not_logged_is_named(store, values, sent, message):
    client, experiment, _ = store
    with pytest.raises(ValueError, match=message):
        read_result(client, log_run(client, experiment, values, sent), "LBGM", "val/acc")


FEDAVG = Result(
    "FedAvg", "0", "val/acc", 3, [1, 2, 3], [0.5, 0.9, 0.8], [4e3, 8e3, 12e3], [1e3, 2e3, 3e3], [8e3, 16e3, 24e3]
)
CHEAP = Result("cheap", "1", "val/acc", 3, [1, 3], [0.5, 0.75], [4e3, 4008.0], [1e3, 1002.0], [5e3, 6e3])


def test_the_table_by_hand():
    lines = table([FEDAVG, CHEAP]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method", "best val/acc", "last val/acc", "rounds", "uplink bytes", "uplink floats", "total bytes", "share",
        "total share",
    ]  # fmt: skip
    assert cells[2] == ["FedAvg", "0.9000", "0.8000", "3", "12,000", "3,000", "24,000", "100.0%", "100.0%"]
    assert cells[3] == ["cheap", "0.7500", "0.7500", "3", "4,008", "1,002", "6,000", "33.4%", "25.0%"]
    assert len({len(line) for line in lines}) == 1


def test_several_seeds_are_one_row_and_one_curve():
    """Means by hand: best of 0.9 and 0.7, last of 0.8 and 0.7, uplink of 12,000 and 8,000, at the rounds of both."""
    one = replace(FEDAVG, seed=0, also={"clients/val/acc_worst": 0.5})
    two = Result(
        "FedAvg", "1", "val/acc", 3, [1, 3], [0.4, 0.7], [4e3, 8e3], [1e3, 2e3], [8e3, 20e3], {"a": 0.25}, seed=1
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table([one, two, CHEAP]).splitlines()]
    assert len(cells) == 4
    assert cells[0][3:5] == ["last clients/val/acc_worst", "last a"]
    assert cells[2][:3] == ["FedAvg", "0.8000 ± 0.1000", "0.7500 ± 0.0500"]
    assert cells[2][5:] == ["3", "10,000", "2,500", "22,000", "100.0%", "100.0%"]
    assert cells[3][3:] == ["nan", "nan", "3", "4,008", "1,002", "6,000", "40.1%", "27.3%"]
    (line, _) = draw([one, two, CHEAP])["metric_vs_total.png"].axes[0].lines
    assert line.get_xydata() == pytest.approx(np.array([[8e3, 0.45], [22e3, 0.75]]))


TIMES = {
    "FedAvg": [3600.0, 7200.0, 10800.0],
    "cheap": [600.0, 3600.0],
}


def timed(result):
    return replace(result, seconds={"lte": TIMES[result.name]}, shares={"lte": [0.25, 0.25, 0.5]})


def test_the_table_of_times_by_hand():
    """All reach 0.75, the worst end: FedAvg between its first and second hour, which is when it was validated."""
    lines = time_table([timed(FEDAVG), timed(CHEAP)], {"lte": "LTE"}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method", "network", "to the end", "than FedAvg", "to 0.75", "than FedAvg", "download", "compute", "upload"
    ]  # fmt: skip
    assert cells[2] == ["FedAvg", "LTE", "3.0 h", "", "2.0 h", "", "25%", "25%", "50%"]
    assert cells[3] == ["cheap", "LTE", "1.0 h", "2.0 h less", "1.0 h", "1.0 h less", "25%", "25%", "50%"]
    (last,) = time_table([timed(FEDAVG), timed(CHEAP)], {"lte": "LTE"}, target=0.8).splitlines()[3:]
    assert [cell.strip() for cell in last.split("|")][5:7] == ["never", ""]
    assert len(time_table([FEDAVG, timed(CHEAP)], {"lte": "LTE"}).splitlines()) == 3


def test_several_seeds_take_their_mean_time():
    one = replace(timed(FEDAVG), seed=0)
    two = replace(one, seed=1, seconds={"lte": [3600.0, 3600.0, 3600.0]})
    assert re.search(r"\| LTE +\| +2.0 h \|", time_table([one, two], {"lte": "LTE"}))
    (line,) = draw([one, two], {"lte": "LTE"})["metric_vs_hours_lte.png"].axes[0].lines
    assert line.get_xydata() == pytest.approx(np.array([[1, 0.5], [1.5, 0.9], [2, 0.8]]))


def test_times_are_shown_in_a_unit_that_fits():
    assert [lasts(s) for s in (None, 0.25, 59.0, 90.0, 5400.0)] == ["never", "0.2 s", "59.0 s", "1.5 min", "1.5 h"]
    assert [less(60.0, 3660.0), less(90.0, 60.0), less(5.0, 5.0), less(5.0, None)] == [
        "1.0 h less",
        "30.0 s more",
        "",
        "",
    ]
    curve = [(1.0, 0.9), (2.0, 0.5), (3.0, 0.7)]
    assert [reached(curve, 0.7, True), reached(curve, 0.7, False), reached(curve, 0.4, True)] == [2.0, 1.0, None]
    times = Times({2: 5.0, 4: 9.0}, [])
    assert [times.at(step) for step in (0, 2, 3, 7)] == [0.0, 5.0, 5.0, 9.0]


def test_networks_are_presets_or_files(files):
    Path("slow.yaml").write_text("{uplink: 1 kB/s, downlink: 1 kB/s, compute: 2 s}")
    lte, slow = make_networks(["lte", "slow.yaml"], "1 s", 0.5)
    assert (lte.title, lte.clock.compute, lte.clock.spread) == ("LTE", "1 s", 0.5)
    assert (slow.name, slow.clock.compute, slow.clock.spread) == ("slow", "2 s", 0.5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--networks", "5g"], "--networks 5g must be one of lte, home_broadband, data_centre, or a YAML file"),
        (["--networks", "lte", "lte"], "--networks must have different names"),
        (["--networks", "wrong.yaml"], "--networks wrong.yaml.*rate"),
        (["--networks", "lte", "--compute", "quick"], "compute.*got 'quick'"),
    ],
)
def test_wrong_networks_end_with_a_message(files, capsys, args, message):
    Path("wrong.yaml").write_text("rate: 1")
    with pytest.raises(SystemExit, match="2"):
        parse(["--base", "base.yaml", *args])
    assert re.search(message, capsys.readouterr().err)


def test_each_variant_runs_with_each_seed():
    variants = with_seeds([Variant("a b", ()), Variant("c", ())], [3, 4])
    assert [(v.name, v.run_name, v.file_name, v.options) for v in variants[:2]] == [
        ("a b", "a b, seed 3", "a_b_seed_3", ("--seed_everything=3",)),
        ("a b", "a b, seed 4", "a_b_seed_4", ("--seed_everything=4",)),
    ]
    assert [v.name for v in variants] == ["a b", "a b", "c", "c"]
    assert variants[0].fingerprint("e", []) != variants[1].fingerprint("e", [])
    assert with_seeds([Variant("c", ())], []) == [Variant("c", ())]


def test_the_best_of_a_loss_is_the_smallest():
    assert Result("a", "0", "val/loss", 2, [1, 2, 3], [0.5, 0.25, float("nan")], *[[1.0] * 3] * 3).best == 0.25
    assert [is_lower_better(name) for name in ("val/acc", "val/miou", "val/mse", "val_loss")] == [0, 0, 1, 1]


def test_figures_show_the_curves():
    figures = draw([FEDAVG, CHEAP])
    points = {
        name: {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
        for name, figure in figures.items()
    }
    assert points == {
        "metric_vs_rounds.png": {"FedAvg": [[1, 0.5], [2, 0.9], [3, 0.8]], "cheap": [[1, 0.5], [3, 0.75]]},
        "metric_vs_uplink.png": {
            "FedAvg": [[4e3, 0.5], [8e3, 0.9], [12e3, 0.8]],
            "cheap": [[4e3, 0.5], [4008, 0.75]],
        },
        "metric_vs_total.png": {
            "FedAvg": [[8e3, 0.5], [16e3, 0.9], [24e3, 0.8]],
            "cheap": [[5e3, 0.5], [6e3, 0.75]],
        },
    }
    assert figures["metric_vs_uplink.png"].axes[0].get_xscale() == "log"


def test_json_lines_hold_all(tmp_path):
    write_json_lines([FEDAVG, CHEAP], tmp_path / "results.jsonl")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [Result(**json.loads(line)) for line in lines] == [FEDAVG, CHEAP]


# Child runs


@pytest.fixture
def make_child(store, files, monkeypatch):
    """Return (parent, a function that makes a child run of an entry which is written here)."""
    client, experiment, uri = store
    parent = client.create_run(experiment)
    monkeypatch.setenv("PYTHONPATH", str(files))

    def make(name, script):
        (files / f"{name}.py").write_text(script)
        variant = Variant(name, (Path("base.yaml"),), LBGM)
        return ChildRun(client, parent, variant, name, ["--x.y=1"], uri, files)

    return parent, make


def test_a_child_is_told_its_run_and_its_changes(store, make_child, files):
    _, make = make_child
    child = make("show", "import os, sys; print(*sys.argv[1:], os.environ['OMP_NUM_THREADS'], sep='\\n')")
    ended = []
    train([lambda: child], 1, lambda run, succeeded: ended.append((run, succeeded)), lambda running: None)
    # It ended well, but its run was never closed: the process was not what it should be.
    assert ended == [(child, False)]
    command, *configs, bar, option, threads = child.log.read_text().splitlines()
    assert (command, bar, option, threads) == ("fit", "--trainer.enable_progress_bar=false", "--x.y=1", "1")
    base, changes, logger = (yaml.safe_load(Path(c.removeprefix("--config=")).read_text()) for c in configs)
    assert (base, changes) == (BASE, LBGM)
    assert logger["trainer"]["logger"]["init_args"] == {"run_id": child.run_id, "tracking_uri": store[2], "prefix": ""}
    assert store[0].get_run(child.run_id).info.status == "FAILED"


def test_an_interrupt_ends_the_processes_and_the_runs(store, make_child):
    _, make = make_child
    children = [make(name, "import time; time.sleep(60)") for name in ("one", "two")]

    def interrupt(running):
        if len(running) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([lambda child=child: child for child in children], 2, lambda run, succeeded: None, interrupt)
    assert [child._process.returncode for child in children] == [-signal.SIGTERM] * 2
    assert [store[0].get_run(child.run_id).info.status for child in children] == ["KILLED", "KILLED"]


def test_no_more_than_the_jobs_run_at_a_time(make_child):
    _, make = make_child
    seen, ended = [], []
    waiting = [lambda name=name: make(name, "pass") for name in ("one", "two", "three")]
    train(waiting, 2, lambda run, succeeded: ended.append(run.variant.name), lambda running: seen.append(len(running)))
    assert max(seen) <= 2
    assert sorted(ended) == ["one", "three", "two"]


def test_only_finished_children_with_the_same_settings_are_found(store, make_child):
    client = store[0]
    parent, make = make_child
    first, second = make("one", ""), make("two", "")
    client.set_terminated(first.run_id, "FINISHED")
    client.set_terminated(second.run_id, "FAILED")
    find = finished_children(client, parent, "one", ["--x.y=1"])
    assert find(first.variant) == first.run_id
    assert finished_children(client, parent, "two", ["--x.y=1"])(second.variant) is None
    assert finished_children(client, parent, "one", ["--x.y=2"])(first.variant) is None
    assert finished_children(client, client.create_run(store[1]), "one", ["--x.y=1"])(first.variant) is None


def test_where_all_fail_the_parent_has_failed_and_the_reason_is_said(store, files, capsys):
    code = main(
        ["--config", "a.yaml", "b.yaml", "--entry", "no_such_entry", "--tracking-uri", store[2], "--name", "all"]
    )
    assert code == 1
    (parent,) = store[0].search_runs(
        [store[0].get_experiment_by_name("compare").experiment_id], "attributes.run_name = 'all'"
    )
    assert parent.info.status == "FAILED"
    captured = capsys.readouterr()
    for name in ("a", "b"):
        assert f"{name}: failed: " in captured.out
        assert "No module named no_such_entry" in captured.out
    assert f"--resume {parent.info.run_id}" in captured.out


# From the command line


def compare(folder, *args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "recipes.compare", "--entry", "compare_entry", "--output", "out", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=1500)


@pytest.mark.slow
def test_three_configs_two_at_a_time_one_of_which_fails_and_is_mended(files):
    """21 parameters of 4 bytes, 4 clients: FedAvg sends 336 bytes a round, LBGM at threshold 1 that once, then 16."""
    methods = {"FedAvg": uplink(), "broken": {"model": {"fail_at": 2}}, "LBGM": LBGM}
    Path("methods.yaml").write_text(yaml.safe_dump(methods, sort_keys=False))
    args = ("--base", "base.yaml", "--methods", "methods.yaml", "--jobs", "2", "--trainer.max_epochs=5", "--seeds", "1")
    args += ("--networks", "lte", "--compute", "1 s")
    done = compare(files, *args)
    assert done.returncode == 1, done.stderr
    assert "[3/3]" in done.stderr
    assert "broken, seed 1: failed: RuntimeError: ordered to fail" in done.stdout

    client = MlflowClient(f"sqlite:///{files / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("compare").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent = runs.pop("compare")
    assert parent.info.status == "FAILED"
    assert {name: run.info.status for name, run in runs.items()} == {
        "FedAvg, seed 1": "FINISHED", "LBGM, seed 1": "FINISHED", "broken, seed 1": "FAILED"
    }  # fmt: skip
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}

    fedavg, lbgm = map(json.loads, (files / "out" / "results.jsonl").read_text().splitlines())
    assert (fedavg["name"], lbgm["name"]) == ("FedAvg", "LBGM")
    assert fedavg["round"] == lbgm["round"] == [1, 2, 3, 4, 5]
    assert fedavg["uplink_bytes"] == [336.0 * n for n in range(1, 6)]
    assert lbgm["uplink_floats"] == [84.0 + 4 * n for n in range(5)]
    # Two round trips of 46 ms, a step of a second, and 84 bytes at 21.7 and 7.4 Mbit/s.
    seconds = 2 * 0.046 + 1 + 672 / 21.7e6 + 672 / 7.4e6
    assert fedavg["seconds"]["lte"] == pytest.approx([seconds * n for n in range(1, 6)])
    assert lbgm["seconds"]["lte"][-1] == pytest.approx(5 * seconds - 4 * 640 / 7.4e6)
    assert re.search(r"FedAvg +\| LTE +\| +5.5 s", done.stdout)
    assert fedavg["value"][-1] == pytest.approx(runs["FedAvg, seed 1"].data.metrics["val/acc"])
    assert f"{(336 + 64) / (5 * 336):.1%} |" in done.stdout
    artifacts = {a.path for folder in (None, "figures") for a in client.list_artifacts(parent.info.run_id, folder)}
    assert artifacts == {
        "results.jsonl", "table.md", "times.md", "figures", "figures/metric_vs_hours_lte.png",
        "figures/metric_vs_rounds.png", "figures/metric_vs_uplink.png", "figures/metric_vs_total.png",
    }  # fmt: skip

    methods["broken"] = {"model": {"lr": 0.1}}
    Path("methods.yaml").write_text(yaml.safe_dump(methods, sort_keys=False))
    done = compare(files, *args, "--resume", parent.info.run_id)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished before") == 2
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    names = [json.loads(line)["name"] for line in (files / "out" / "results.jsonl").read_text().splitlines()]
    assert names == ["FedAvg", "broken", "LBGM"]
