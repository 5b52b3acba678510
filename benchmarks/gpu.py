"""Test and measure the package on an accelerator: ``python -m benchmarks.gpu``, which ``make gpu`` calls.

Runs the tests with the marker ``gpu`` and ``python -m benchmarks --only round execution`` on the first CUDA GPU, at
most eight minutes, and writes what came of it to outputs/gpu.json: the device, the versions, the tests that failed and
why, what tests have measured, and the figures. Without a GPU it says so, runs nothing and ends with 0.

``LBGM_TEST_DEVICE`` names another device, such as ``cuda:1`` or ``mps``; ``cpu`` tries this command itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import page
from lightning_lbgm.__about__ import __version__

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "outputs" / "gpu.json"
TEST_SECONDS, BENCHMARK_SECONDS = 310, 160  # under eight minutes together


def find_device() -> str | None:
    """Return the name of the device to test; None if there is none."""
    named = os.environ.get("LBGM_TEST_DEVICE")
    return named or ("cuda" if torch.cuda.is_available() else None)


def why_none() -> str:
    """Say in words that there is no accelerator, and what to do if there should be one."""
    told = [f"There is no accelerator: PyTorch {torch.__version__} finds no CUDA GPU. Nothing was tested."]
    if torch.version.cuda is None and torch.version.hip is None:
        told.append("This PyTorch is built for CPUs alone: install another build (https://pytorch.org) into .venv.")
    elif shutil.which("nvidia-smi"):
        told.append("`nvidia-smi` is there, so look at the driver's version, and at CUDA_VISIBLE_DEVICES.")
    if torch.backends.mps.is_available():
        told.append("To test Apple's GPU, which has no float64: LBGM_TEST_DEVICE=mps make gpu")
    told.append("To try the tests on the CPU: LBGM_TEST_DEVICE=cpu make gpu")
    return "\n".join(told)


def describe(name: str) -> dict[str, Any]:
    """Return what is known of a device, and the versions."""
    device = torch.device(name)
    versions = {package: importlib.metadata.version(package) for package in ("lightning", "torchmetrics")}
    versions["torch"] = torch.__version__  # with the build
    found: dict[str, Any] = {"device": name, "lightning_lbgm": __version__, "python": platform.python_version()}
    found |= {**versions, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def read_tests(path: Path) -> dict[str, Any]:
    """Return what a JUnit file of pytest says: tests that passed, failed and were skipped, and what was measured."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}, "measured": {}}
    if not path.exists():
        return found
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        failure = next((part for kind in ("failure", "error") for part in case.iter(kind)), None)
        skipped = case.find("skipped")
        if failure is not None:
            found["failed"][name] = f"{failure.get('message', '')}\n{(failure.text or '')[-3000:]}"
        elif skipped is not None:
            found["skipped"][name] = skipped.get("message", "")
        else:
            found["passed"] += 1
        measured = {part.get("name"): part.get("value") for part in case.iter("property")}
        if measured:
            found["measured"][name] = measured
    return found


def run(command: list[str], seconds: float, environment: dict[str, str]) -> str:
    """Run a command in the repository, its output shown as it comes; return how it ended."""
    try:
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    return "done" if done.returncode == 0 else f"ended with {done.returncode}"


def main(arguments: list[str] | None = None) -> int:
    """Test, measure and write; return 1 if a test has failed or something did not end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="+", default=["tests/accelerator"], help="run these tests alone")
    parser.add_argument("--no-benchmarks", action="store_true", help="run the tests alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args(arguments)
    name = find_device()
    if name is None:
        print(why_none())
        return 0
    begin = time.perf_counter()
    results: dict[str, Any] = {**describe(name), "tests": {}, "figures": []}
    print(f"Testing {results.get('name', name)} with PyTorch {results['torch']}.", flush=True)
    # The project's own code before an installed one; matrix products that give the same twice.
    environment = {
        **os.environ,
        "LBGM_TEST_DEVICE": name,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory() as folder:
        junit, rows = Path(folder) / "tests.xml", Path(folder) / "rows.json"
        tests = ["pytest", *args.tests, "-m", "gpu", "-o", "junit_family=xunit1", f"--junitxml={junit}", "--tb=short"]
        ended = run([*tests, "-W", "ignore"], TEST_SECONDS, environment)
        results["tests"] = {"ended": ended, **read_tests(junit)}
        if not args.no_benchmarks:
            quick = ["--quick"] if name == "cpu" else []  # what is measured on the CPU has a page of its own
            command = ["benchmarks", "--only", "round", "execution", "--device", name, "--json", str(rows), *quick]
            results["benchmarks"] = run(command, BENCHMARK_SECONDS, environment)
            results["figures"] = json.loads(rows.read_text()) if rows.exists() else []
    results["seconds"] = round(time.perf_counter() - begin)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(summary(results))
    print(f"Written to {args.output}. To help others, attach it to an issue of the project.")
    ended_well = results["tests"]["ended"] == "done" and results.get("benchmarks", "done") == "done"
    return 0 if ended_well and results["tests"]["passed"] else 1


def summary(results: dict[str, Any]) -> str:
    """Return the results in a few lines, and the tables."""
    tests = results["tests"]
    told = [f"\n{results.get('name', results['device'])}, PyTorch {results['torch']}: {results.get('seconds', 0)} s"]
    told.append(f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped")
    told += [f"  failed: {name}: {why.splitlines()[0]}" for name, why in tests["failed"].items()]
    if tests["ended"] != "done":
        told.append(f"  the tests were {tests['ended']}" if "cut" in tests["ended"] else f"  pytest {tests['ended']}")
    for name in dict.fromkeys(row["table"] for row in results["figures"]):
        told += ["", page.TITLES[name], "", page.table(name, results["figures"])]
    return "\n".join(told)


if __name__ == "__main__":
    sys.exit(main())
