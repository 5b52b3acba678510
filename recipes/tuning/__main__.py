"""Search uplink, downlink, local steps and learning rate for accuracy and few bytes at once, with Optuna.

    python -m recipes.tuning --base recipes/configs/fmnist_tuning.yaml --lr model.init_args.lr --trials 40
    python -m recipes.tuning --base BASE.yaml --entry recipes.mnist --jobs 2 --trainer.max_epochs=20

The base is the config of a LightningCLI that trains with ``LBGMFederated``. Each trial changes it and is a child of one
MLflow run, as in ``recipes.compare``. What this command does not know, such as --trainer.max_epochs=20, goes to all
trials. The same command again goes on with the study in --output, up to --trials. It needs the extra ``tuning``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import optuna
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, Trial, TrialState

from recipes.compare.report import is_lower_better, read_result
from recipes.compare.runs import ChildRun, open_parent
from recipes.compare.variants import Variant
from recipes.tuning.report import draw_trials, table
from recipes.tuning.space import FIRST, suggest

_GIVE_UP = 3  # trials, if all of them failed


class Tuning:
    """A study in a folder, and its parent run: made, or opened to go on with.

    Args:
        namespace: The command line's arguments.
        options: Options of all trials.

    Raises:
        ValueError: If the folder has trials of other settings.
    """

    def __init__(self, namespace: argparse.Namespace, options: Sequence[str]) -> None:
        self.args, self.options, self.output = namespace, options, namespace.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.tracking_uri = namespace.tracking_uri or f"sqlite:///{self.output / 'mlflow.db'}"
        self.client = MlflowClient(self.tracking_uri)
        self.study = self._open_study()
        self.study.sampler = self._sampler()
        self.parent = self._open_parent()

    def _open_study(self) -> optuna.Study:
        storage, name = f"sqlite:///{self.output / 'optuna.db'}", "tuning"
        directions = ["minimize" if is_lower_better(self.args.metric) else "maximize", "minimize"]
        texts = [self.args.base.read_text(), self.args.entry, self.args.metric, self.args.lr, *self.options]
        fingerprint = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        if (self.output / "optuna.db").is_file() and name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            if study.user_attrs.get("fingerprint") == fingerprint:
                return study
            if study.get_trials(states=(TrialState.COMPLETE,)):
                raise ValueError(
                    f"{self.output} has a study with another base, entry, metric, lr or other options, whose trials"
                    " cannot be compared with new ones: pass another --output, or the same settings."
                )
            optuna.delete_study(study_name=name, storage=storage)  # nothing has succeeded: mended, it begins anew
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        study.set_user_attr("fingerprint", fingerprint)
        return study

    def _sampler(self) -> optuna.samplers.BaseSampler:
        # Another seed each time that it is opened, else a study that goes on would draw what it has drawn before.
        seed = self.args.seed + 1000 * self.args.worker + len(self.study.trials)
        if self.args.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, self.args.trials // 4), seed=seed)
        # Points that other processes are at count as bad ones, so that two do not try the same.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=self.args.jobs > 1)

    def _open_parent(self) -> Run:
        artifacts = None if self.args.tracking_uri else self.output / "mlruns"
        known = self.study.user_attrs.get("parent")
        parent = open_parent(self.client, self.args.experiment, self.args.name, artifacts, known)
        self.study.set_user_attr("parent", parent.info.run_id)
        return parent

    def prepare(self) -> None:
        """Queue the first trials of a new study, and again those that an interrupt has ended."""
        study = self.study
        if not study.trials:
            for params in FIRST:
                study.enqueue_trial(params)
        again = set(study.user_attrs.get("queued_again", []))
        for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
            if trial.number in again or "error" in trial.user_attrs:
                continue
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                if "run_id" in trial.user_attrs:
                    self.client.set_terminated(trial.user_attrs["run_id"], "KILLED")
            study.enqueue_trial(trial.params)
            again.add(trial.number)
        study.set_user_attr("queued_again", sorted(again))

    def counted(self) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """Return the trials that succeeded, and those that failed by themselves."""
        trials = self.study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        return done, [trial for trial in trials if "error" in trial.user_attrs and trial not in done]

    def is_enough(self) -> bool:
        """Whether no trial should follow."""
        done, failed = self.counted()
        return len(done) + len(failed) >= self.args.trials or (not done and len(failed) >= _GIVE_UP)

    def work(self) -> None:
        """Train trial after trial in this process."""

        def stop_if_enough(study: optuna.Study, trial: FrozenTrial) -> None:
            if self.is_enough():
                study.stop()

        if not self.is_enough():
            self.study.optimize(self._train, callbacks=[stop_if_enough], catch=(Exception,))

    def work_in_processes(self, command_line: Sequence[str]) -> None:
        """Let ``--jobs`` processes train, each trial after trial."""
        workers = [
            subprocess.Popen([sys.executable, "-m", "recipes.tuning", *command_line, f"--worker={number}"])
            for number in range(1, self.args.jobs + 1)
        ]
        try:
            for worker in workers:
                worker.wait()
        except BaseException:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
            raise

    def _train(self, trial: Trial) -> tuple[float, float]:
        """Train one trial and return the metric, and the bytes of both directions in decades."""
        begin, metric = time.perf_counter(), self.args.metric
        variant = Variant(f"trial {trial.number:03d}", (self.args.base,), suggest(trial, self.args.lr))
        child = ChildRun(
            self.client, self.parent, variant, self.args.entry, self.options, self.tracking_uri, self.output
        )
        trial.set_user_attr("run_id", child.run_id)
        try:
            run_inside(self.args.entry, child)
            result = read_result(self.client, child.run_id, variant.name, metric, tail=self.args.tail)
            if not math.isfinite(result.last):
                raise ValueError(f"{metric} is {result.last}")
        except BaseException as error:
            self.client.set_terminated(child.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            if isinstance(error, Exception):
                reason = str(error).strip().splitlines() or [""]
                trial.set_user_attr("error", f"{type(error).__name__}: {reason[0]} (log: {child.log})")
                _say(f"{variant.name}: failed: {trial.user_attrs['error']}")
            raise
        total = result.total_bytes[-1]
        for name, value in (("metric", result.last), ("uplink_bytes", result.uplink_bytes[-1]), ("total_bytes", total)):
            trial.set_user_attr(name, value)
        seconds = time.perf_counter() - begin
        _say(f"{variant.name}: {metric} {result.last:.4f}, {total:,.0f} bytes, {seconds:.0f} s  {trial.params}")
        return result.last, math.log10(total)

    def write(self) -> str:
        """Write the table and the figure into the folder and into the parent run, and return the table."""
        done, _ = self.counted()
        text = table(done, self.study.best_trials, self.args.metric)
        figure = draw_trials(done, self.study.best_trials, self.args.metric)
        (self.output / "table.md").write_text(text + "\n")
        figure.savefig(self.output / "trials.png")
        self.client.log_artifact(self.parent.info.run_id, str(self.output / "table.md"))
        self.client.log_figure(self.parent.info.run_id, figure, "figures/trials.png")
        return text


def run_inside(entry: str, child: ChildRun) -> None:
    """Do what ``python -m ENTRY ARGUMENTS`` does, in this process, so that a trial does not wait for imports."""
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with (
        child.log.open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        patch.object(sys, "argv", [entry, *child.arguments]),
    ):
        try:
            runpy.run_module(entry, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning ends the process after one
                raise KeyboardInterrupt from end
            if end.code:
                log.flush()
                said = child.log.read_text().split("\n\n")[-1].strip().splitlines() or [f"exit code {end.code}"]
                raise RuntimeError(f"`python -m {entry}` ended with {said[-1].strip()!r}") from end


def _say(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


def parse(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the options that go to all trials."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="config that trials change")
    add("--entry", default="recipes.paper", help="module that is a LightningCLI (default: %(default)s)")
    add("--lr", metavar="SETTING", help="setting of the base that is the learning rate; default: it is not tuned")
    add("--metric", default="val/acc", help="first objective (default: %(default)s); the second is the bytes")
    add("--tail", type=int, default=1, help="values at the end whose mean is the objective (default: %(default)s)")
    add("--trials", type=int, default=40, help="trials in all, with those of before (default: %(default)s)")
    add("--jobs", type=int, default=1, help="processes that train trials (default: %(default)s)")
    add("--sampler", choices=("tpe", "nsga2"), default="tpe", help="how settings are chosen (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampler (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/tuning"), help="folder of the study (default: %(default)s)")
    add("--experiment", default="tuning", help="MLflow experiment (default: %(default)s)")
    add("--name", default="tuning", help="name of the parent run (default: %(default)s)")
    add("--tracking-uri", help="MLflow store; default: mlflow.db in --output")
    add("--worker", type=int, default=0, help=argparse.SUPPRESS)
    namespace, options = parser.parse_known_args(args)
    for option in options:
        if option.startswith("-") and "." not in option and not option.startswith("--seed_everything"):
            parser.error(f"unrecognized argument: {option}")
    for name in ("trials", "jobs", "tail"):
        if getattr(namespace, name) < 1:
            parser.error(f"--{name} must be positive; got {getattr(namespace, name)}")
    if not namespace.base.is_file():
        parser.error(f"--base {namespace.base} is not a file")
    return namespace, options


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line, or ``args``, and return the exit code: 1 if no trial succeeded."""
    args = sys.argv[1:] if args is None else list(args)
    namespace, options = parse(args)
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    warnings.filterwarnings("ignore", module="lightning")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        tuning = Tuning(namespace, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if namespace.worker:
        tuning.work()
        return 0
    status = "FAILED"
    try:
        tuning.prepare()
        if namespace.jobs == 1:
            tuning.work()
        else:
            tuning.work_in_processes(args)
        done, failed = tuning.counted()
        if done:
            print(f"\n{tuning.write()}\n")
            status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        _say("Interrupted. The same command goes on with what is there.")
        return 130
    finally:
        tuning.client.set_terminated(tuning.parent.info.run_id, status)
    for trial in failed:
        print(f"trial {trial.number:03d} failed: {trial.user_attrs['error']}")
    print(
        f"{len(done)} trials, {len(tuning.study.best_trials)} of them on the Pareto front."
        if done
        else "No trial succeeded."
    )
    print(f"Results: {tuning.output}")
    print(f"Runs:    mlflow ui --backend-store-uri {tuning.tracking_uri}   (parent {tuning.parent.info.run_id})")
    return 0 if done else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends the trial in the right way too
    sys.exit(main())
