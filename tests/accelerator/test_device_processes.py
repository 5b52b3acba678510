"""Two devices, a process each: the fits of one device up to rounding, over NCCL on GPUs (test_world.py: the CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_devices_script
from devices import ACCELERATOR, ON_GPU

TESTS = Path(__file__).parent.parent
ON_CPU = ACCELERATOR is not None and ACCELERATOR.type == "cpu"  # what `make gpu` does is tried
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
ON_TWO = [*ON_GPU, *([TWO_GPUS] if ACCELERATOR is None or ACCELERATOR.type == "cuda" else [])]


def launch(accelerator, devices, folder):
    script = [sys.executable, str(TESTS / "two_devices_script.py"), accelerator, str(devices), str(folder)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"results{devices}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", [pytest.param("cpu" if ON_CPU else "gpu", marks=ON_TWO, id="gpu")])
def test_two_devices_train_what_one_does(accelerator, tmp_path):
    one, two = (launch(accelerator, devices, tmp_path) for devices in (1, 2))
    two_devices_script.assert_as_one(one, two, "nccl" if accelerator == "gpu" else "gloo")
