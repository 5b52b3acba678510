"""Accuracy against bytes for chains of the uplink and the downlink: ``python -m benchmarks.uplink``.

MNIST and Fashion-MNIST, 100 clients with 3 classes each, all of it through the Trainer, in three settings (see
``variants.SETTINGS``): ``paper``, ``noisy`` and ``cohorts``, each with several seeds. A run's result is kept in a file
as soon as it is there, so a second call goes on where the first was cut off. ``LBGM_DATA`` names the folder that holds
``MNIST/raw`` and ``FashionMNIST/raw``. docs/choosing.md shows the results in benchmarks/results; to write it anew from
them: ``python -m benchmarks.uplink --docs``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.uplink.report import DOCS, draw, table, write_docs
from benchmarks.uplink.run import Job, run_missing
from benchmarks.uplink.variants import DATASETS, SETTINGS, variants

RESULTS = Path(__file__).parent.parent / "results" / "uplink.jsonl"


def main() -> None:
    """Run what is missing, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--data", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="rounds of a run, to try things; default: the setting's")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="variants whose name has this in it, and FedAvg")
    parser.add_argument("--output", type=Path, default=Path("outputs/uplink"), help="folder of results and figures")
    parser.add_argument("--docs", action="store_true", help="take the results of docs/choosing.md and write it anew")
    args = parser.parse_args()
    figures, results = (DOCS / "images", RESULTS) if args.docs else (args.output, args.output / "results.jsonl")
    figures.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(setting, data, variant.name, seed)
        for setting in args.settings
        for data in args.data
        for seed in args.seeds
        for variant in variants(setting)
        if args.only in variant.name or variant.name == "FedAvg"
    ]
    rows = run_missing(jobs, results, args.workers, args.rounds)
    tables = {setting: table(setting, rows, args.data) for setting in args.settings}
    for setting, text in tables.items():
        print(f"\n{SETTINGS[setting].title}, {len(args.seeds)} seeds\n\n{text}")
        draw(setting, rows, figures / f"uplink_{setting}.png", args.data)
    if args.docs:
        write_docs(tables)


if __name__ == "__main__":
    main()
