"""The command behind ``make gpu``: without an accelerator it says so; with one it tests, and writes what it found."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parent.parent
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_stages" name="one"><properties><property name="error" value="0.5"/></properties>
</testcase>
<testcase classname="tests.test_stages" name="two"><failure message="assert 1 == 2">line 3</failure></testcase>
<testcase classname="tests.test_fits" name="three"><skipped message="no two GPUs"/></testcase>
<testcase classname="tests.test_fits" name="four"/>
</testsuite></testsuites>"""


def run(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment.pop("LBGM_TEST_DEVICE", None)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, env={**environment, **variables}, cwd=ROOT, capture_output=True, text=True)


def test_without_an_accelerator_it_says_so_and_ends_well(tmp_path):
    done = run("--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no accelerator: PyTorch ")
    assert "LBGM_TEST_DEVICE=cpu make gpu" in done.stdout
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_it_writes_what_it_found(tmp_path):
    tests = ["--tests", "tests/accelerator/test_device_stages.py", "--no-benchmarks"]
    done = run(*tests, "--output", str(tmp_path / "gpu.json"), LBGM_TEST_DEVICE="cpu")
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["tests"]["failed"] == {}, done.stdout
    assert done.returncode == 0
    assert results["device"] == "cpu"
    assert results["tests"]["passed"] > 100
    assert results["tests"]["measured"]["test_device_stages::test_an_uplink_is_the_same_on_the_device[gpu-topk]"] == {
        "relative distance to the CPU": "0.0"
    }
    assert f"tests: {results['tests']['passed']} passed, 0 failed" in done.stdout


def test_a_run_that_fails_is_told_and_ends_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LBGM_TEST_DEVICE", "cpu")
    output = tmp_path / "g.json"
    assert gpu.main(["--tests", "tests/none", "--no-benchmarks", "--output", str(output)]) == 1
    assert "pytest ended with 4" in capsys.readouterr().out


def test_what_a_junit_file_says(tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    found = gpu.read_tests(tmp_path / "tests.xml")
    assert found["passed"] == 2
    assert found["failed"] == {"test_stages::two": "assert 1 == 2\nline 3"}
    assert found["skipped"] == {"test_fits::three": "no two GPUs"}
    assert found["measured"] == {"test_stages::one": {"error": "0.5"}}
    told = gpu.summary({"device": "cuda", "torch": "2", "tests": {"ended": "ended with 1", **found}, "figures": []})
    assert "2 passed, 1 failed, 1 skipped\n  failed: test_stages::two: assert 1 == 2" in told


def test_benchmarks_on_a_device_do_not_touch_the_page(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the import sets is put back
    command = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda", "--only", "scaling"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "measures round and execution alone" in capsys.readouterr().err
