"""Train several configs and compare them: accuracy against rounds and against uplink bytes.

    python -m recipes.compare --base recipes/paper/fmnist_fcn_noniid.yaml
    python -m recipes.compare --base BASE.yaml --config recipes/paper/methods/*.yaml --jobs 2 --trainer.max_epochs=20
    python -m recipes.compare --config A.yaml B.yaml --entry recipes.mnist
    python -m recipes.compare --base BASE.yaml --seeds 0 1 2 --also clients/val/acc_mean clients/val/acc_worst
    python -m recipes.compare --base BASE.yaml --networks lte home_broadband --compute "20 ms"

Each is a LightningCLI config, trained as ``python -m ENTRY fit --config BASE --config CONFIG`` in a process of its own
with one thread, as a child of one MLflow run. What this command does not know, such as --trainer.max_epochs=20, goes to
all of them. At the end it prints a table (shares are of the first one's uplink) and writes figures, the table and
results.jsonl into --output and into the parent run. One that fails does not stop the others; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from recipes.compare.report import Result, draw, read_result, table, time_table, write_json_lines
from recipes.compare.runs import ChildRun, finished_children, open_parent, train
from recipes.compare.times import OWN, make_networks
from recipes.compare.variants import Variant, make_variants, with_seeds

METHODS = Path(__file__).parent / "methods.yaml"
NETWORKS = "networks to say the time on, without training again: lte, home_broadband, data_centre or YAML files"
_LINES_OF_LOG = 12
_LIVE_SECONDS = 2.0


def parse(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[Variant], list[str]]:
    """Return the arguments, what to compare, and the options that go to all."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", type=Path, help="config under all others")
    add("--config", type=Path, nargs="+", action="extend", default=[], help="configs, a run each")
    add(
        "--methods", type=Path, help="YAML of names and changes to --base; default with --base alone: methods.yaml here"
    )
    add("--entry", default="recipes.paper", help="module that is a LightningCLI (default: %(default)s)")
    add("--metric", default="val/acc", help="what to compare (default: %(default)s)")
    add("--also", nargs="+", action="extend", default=[], metavar="METRIC", help="further metrics for the table")
    add("--seeds", type=int, nargs="+", default=[], help="seeds, each a run of each config; default: the configs'")
    add(
        "--tail", type=int, default=1, help="values at the end whose mean counts as the last one (default: %(default)s)"
    )
    add("--networks", nargs="+", action="extend", default=[], metavar="NETWORK", help=NETWORKS)
    add("--compute", default="0 s", help="time of a local step on these networks (default: %(default)s)")
    add("--spread", type=float, default=0.0, help="how different clients are there, a sigma (default: %(default)s)")
    add("--target", type=float, help="value of --metric whose time is told; default: what all reach")
    add("--jobs", type=int, default=1, help="configs trained at a time (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/compare"), help="folder for results (default: %(default)s)")
    add("--experiment", default="compare", help="MLflow experiment (default: %(default)s)")
    add("--name", default="compare", help="name of the parent run (default: %(default)s)")
    add("--tracking-uri", help="MLflow store; default: mlflow.db in --output")
    add("--resume", metavar="RUN_ID", help="parent run to go on with: what finished with the same settings is kept")
    namespace, options = parser.parse_known_args(args)
    for option in options:
        if option.startswith("-") and "." not in option and not option.startswith("--seed_everything"):
            parser.error(f"unrecognized argument: {option}")
    for name in ("jobs", "tail"):
        if getattr(namespace, name) < 1:
            parser.error(f"--{name} must be positive; got {getattr(namespace, name)}")
    if len(set(namespace.seeds)) < len(namespace.seeds):
        parser.error(f"--seeds must differ; got {namespace.seeds}")
    if namespace.base and not namespace.config and not namespace.methods:
        namespace.methods = METHODS
    try:
        namespace.networks = make_networks(namespace.networks, namespace.compute, namespace.spread)
        variants = make_variants(namespace.base, namespace.config, namespace.methods)
    except ValueError as error:
        parser.error(str(error))
    return namespace, with_seeds(variants, namespace.seeds), options


class Comparison:
    """One parent run and its children.

    Args:
        namespace: The command line's arguments.
        variants: What to compare.
        options: Options of all.
    """

    def __init__(self, namespace: argparse.Namespace, variants: Sequence[Variant], options: Sequence[str]) -> None:
        self.variants, self.options, self.entry = variants, options, namespace.entry
        self.metric, self.also = namespace.metric, namespace.also
        self.networks, self.target = namespace.networks, namespace.target
        self.jobs, self.tail, self.output = namespace.jobs, namespace.tail, namespace.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.tracking_uri = namespace.tracking_uri or f"sqlite:///{self.output / 'mlflow.db'}"
        self.client = MlflowClient(self.tracking_uri)
        artifacts = None if namespace.tracking_uri else self.output / "mlruns"
        self.parent = open_parent(self.client, namespace.experiment, namespace.name, artifacts, namespace.resume)
        self.run_ids: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._lived_at = 0.0

    def run(self) -> list[Result]:
        """Train what is not there yet, and return the results of those that succeeded, in order."""
        find = finished_children(self.client, self.parent, self.entry, self.options)
        waiting = []
        for variant in self.variants:
            run_id = find(variant)
            if run_id:
                self.run_ids[variant.run_name] = run_id
                _say(f"{variant.run_name}: finished before")
            else:
                waiting.append(lambda variant=variant: self._child(variant))
        train(waiting, self.jobs, self._on_end, self._on_poll)
        results = []
        for variant in self.variants:
            run_id = self.run_ids.get(variant.run_name)
            if run_id is not None:
                try:
                    names = (variant.name, self.metric, self.also, variant.seed)
                    results.append(read_result(self.client, run_id, *names, self.tail, self.networks))
                except ValueError as error:
                    self.failed[variant.run_name] = str(error)
        return results

    def titles(self, results: Sequence[Result]) -> dict[str, str]:
        """Return the titles of the networks of which there are times, by name."""
        own = {OWN: "its own network"} if any(OWN in result.seconds for result in results) else {}
        return {**own, **{network.name: network.title for network in self.networks}}

    def times(self, results: Sequence[Result]) -> str:
        """Return the table of times; empty if there is no network."""
        titles = self.titles(results)
        return time_table(results, titles, self.target) if titles else ""

    def write(self, results: Sequence[Result]) -> None:
        """Write table, figures and JSON lines into the folder and into the parent run."""
        names = ["results.jsonl", "table.md"]
        write_json_lines(results, self.output / "results.jsonl")
        (self.output / "table.md").write_text(table(results) + "\n")
        if times := self.times(results):
            (self.output / "times.md").write_text(times + "\n")
            names.append("times.md")
        for name in names:
            self.client.log_artifact(self.parent.info.run_id, str(self.output / name))
        (self.output / "figures").mkdir(exist_ok=True)
        for name, figure in draw(results, self.titles(results)).items():
            self.client.log_figure(self.parent.info.run_id, figure, f"figures/{name}")
            figure.savefig(self.output / "figures" / name)

    def _child(self, variant: Variant) -> ChildRun:
        _say(f"{variant.run_name}: starts")
        return ChildRun(self.client, self.parent, variant, self.entry, self.options, self.tracking_uri, self.output)

    def _on_end(self, child: ChildRun, succeeded: bool) -> None:
        name = child.variant.run_name
        seconds = time.perf_counter() - child.begin
        if succeeded:
            self.run_ids[name] = child.run_id
        else:
            last = child.log.read_text(errors="replace").splitlines()[-_LINES_OF_LOG:] or ["nothing was printed"]
            # A traceback's error may be followed by notes.
            errors = [line for line in last if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
            self.failed[name] = f"failed: {(errors or last)[-1].strip()} (log: {child.log})"
            _say("\n".join(f"    {line}" for line in last))
        done = len(self.run_ids) + len(self.failed)
        outcome = f"{child.rounds} rounds in {seconds:.0f} s" if succeeded else self.failed[name]
        _say(f"[{done}/{len(self.variants)}] {name}: {outcome}")

    def _on_poll(self, running: Sequence[ChildRun]) -> None:
        """Show on a terminal which round each is at."""
        if sys.stderr.isatty() and running and time.monotonic() - self._lived_at > _LIVE_SECONDS:
            self._lived_at = time.monotonic()
            rounds = ", ".join(f"{child.variant.run_name}: round {child.rounds}" for child in running)
            sys.stderr.write(f"\r\033[K{rounds}"[:160])
            sys.stderr.flush()


def _say(line: str) -> None:
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}{line}", file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line, or ``args``, and return the exit code: 1 where a run failed."""
    namespace, variants, options = parse(args)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        comparison = Comparison(namespace, variants, options)
    except MlflowException as error:
        print(f"MLflow: {error}", file=sys.stderr)
        return 1
    status = "FAILED"
    try:
        results = comparison.run()
        if results:
            comparison.write(results)
        status = "FAILED" if comparison.failed else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(MlflowException):
            comparison.client.set_terminated(comparison.parent.info.run_id, status)
    if results:
        print(f"\n{table(results)}\n")
        if times := comparison.times(results):
            print(f"{times}\n")
    for name, reason in comparison.failed.items():
        print(f"{name}: {reason}")
    print(f"Results: {comparison.output}")
    print(
        f"Runs:    mlflow ui --backend-store-uri {comparison.tracking_uri}   (parent {comparison.parent.info.run_id})"
    )
    if comparison.failed:
        print(f"Again:   the same command with --resume {comparison.parent.info.run_id}")
    return 1 if comparison.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends the runs too
    sys.exit(main())
