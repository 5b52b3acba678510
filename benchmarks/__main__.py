"""What a round costs, and what each setting changes: ``python -m benchmarks``.

Prints the tables of docs/performance.md as they are measured, and writes them to benchmarks/results/performance.jsonl,
into the page and as figures to docs/images. About eight minutes on two quiet cores; ``--quick`` measures less, and
only prints. ``--device cuda`` measures ``--only round execution`` on a GPU and only prints too, as ``make gpu`` does.
``LBGM_DATA`` names a folder that holds ``MNIST/raw``, for the feeding of images.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: all contestants have one thread

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import device, page
from benchmarks.feeding import feeding
from benchmarks.look_back import look_back
from benchmarks.methods_cost import methods_cost
from benchmarks.processes import processes
from benchmarks.rounds import execution, peers, round_cost, stores, uplink_cost
from benchmarks.scaling import scaling
from benchmarks.stages import stage_cost

PARTS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "round": round_cost,
    "peers": peers,
    "execution": execution,
    "processes": processes,
    "stores": stores,
    "look_back": look_back,
    "uplinks": uplink_cost,
    "methods": methods_cost,
    "stages": stage_cost,
    "feeding": feeding,
    "scaling": scaling,
}
ON_DEVICE = ("round", "execution")


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure less, and write nothing")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="measure these parts and keep the others' rows")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page from the results")
    parser.add_argument("--device", default="cpu", help=f"measure {' and '.join(ON_DEVICE)} there, and write no page")
    parser.add_argument("--json", help="write the rows to this file too")
    args = parser.parse_args()
    if args.page:
        page.write(page.load())
        return
    parts = args.only or (list(PARTS) if args.device == "cpu" else ON_DEVICE)
    if args.device != "cpu" and not set(parts) <= set(ON_DEVICE):
        parser.error(f"--device {args.device} measures {' and '.join(ON_DEVICE)} alone; add --only")
    device.use(args.device)
    only_prints = args.quick or args.device != "cpu"
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_lbgm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    rows, all_measured = page.load(), []
    begin = time.perf_counter()
    for part in parts:
        measured = list(PARTS[part](args.quick))
        tables = list(dict.fromkeys(row["table"] for row in measured))
        for name in tables:
            print(f"\n{page.TITLES[name]}\n\n{page.table(name, measured)}", flush=True)
        print(f"({part}: {time.perf_counter() - begin:.0f} s so far)", file=sys.stderr)
        all_measured += measured
        if args.json:
            Path(args.json).write_text(json.dumps(all_measured))
        if not only_prints:  # part by part, so that a run that is cut off leaves page and results in agreement
            rows = [row for row in rows if row["table"] not in (*tables, "machine")] + measured
            rows.append({"table": "machine", **versions})
            page.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
            page.write(rows)


if __name__ == "__main__":
    main()
