"""Fits in two processes that torchrun has started, for test_world.py: ``torchrun ... torchrun_script.py FOLDER``.

Each script writes to the folder that has its name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import objective_script
import personal_script
import two_devices_script


def main(folder: Path) -> None:
    objective_script.main(2, folder / "objective_script")
    personal_script.main(2, folder / "personal_script")
    two_devices_script.main("cpu", 2, folder / "two_devices_script")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
