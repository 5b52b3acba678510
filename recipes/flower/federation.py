"""A federation on this machine: a SuperLink and SuperNodes as processes of their own, with TLS and authentication.

``python -m recipes.flower.federation`` makes certificates, starts all, runs the app, prints its numbers and stops all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from recipes.flower.certificates import make_certificates, make_node_key

__all__ = ["Federation", "main"]

HERE = Path(__file__).parent
ADDRESS = "127.0.0.1"
_MARK = "LBGM_FEDERATION"  # in the environment of all processes of a federation, and of those that they start
_STATES = ("finished", "completed", "failed", "stopped")


class Federation:
    """Start a SuperLink and SuperNodes, and stop all that they have started, whatever happens.

    Args:
        folder: For certificates, logs, state and Flower's own files.
        num_nodes: SuperNodes.
        ports: The port of the SuperLink that each node is told, if that is not the SuperLink's own.
    """

    def __init__(self, folder: Path, num_nodes: int = 3, ports: dict[int, int] | None = None) -> None:
        self.folder = folder
        self.num_nodes = num_nodes
        self.port = free_port()
        self.ports = ports or {}
        self._mark = secrets.token_hex(8)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Federation:
        """Start the SuperLink, tell it the nodes' public keys, and start them."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        keys = self.folder / "keys"
        make_certificates(keys, [ADDRESS, "localhost"])
        home = self.folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{ADDRESS}:{self.port}"\n'
            f'root-certificates = "{keys / "ca.crt"}"\n'
        )
        self.start_superlink()
        for number in range(self.num_nodes):
            make_node_key(keys, f"node-{number}")
            self.flwr("supernode", "register", str(keys / f"node-{number}.pub"), "here")
            self.start_node(number)

    def start_superlink(self) -> None:
        """Start the SuperLink, and wait until it answers."""
        keys = self.folder / "keys"
        files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.crt"}
        self._launch(
            "superlink",
            "flower-superlink",
            *(word for name, file in files.items() for word in (f"--ssl-{name}", str(keys / file))),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--database",
            str(self.folder / "superlink.db"),
            "--host",
            ADDRESS,
            "--port",
            str(self.port),
        )
        self._wait_for_port()

    def start_node(self, number: int, key: str | None = None) -> None:
        """Start a SuperNode.

        Args:
            number: Its partition.
            key: Name of its key. None: its own.
        """
        keys, state = self.folder / "keys", self.folder / f"state-{number}"
        self._launch(
            f"node-{number}",
            "flower-supernode",
            "--root-certificates",
            str(keys / "ca.crt"),
            "--superlink",
            f"{ADDRESS}:{self.ports.get(number, self.port)}",
            "--auth-supernode-private-key",
            str(keys / f"{key or f'node-{number}'}.key"),
            "--node-config",
            f'partition-id={number} state-dir="{state}"',
            "--host",
            ADDRESS,
            "--port",
            str(free_port()),
        )

    def kill_node(self, number: int) -> None:
        """Kill a SuperNode and the processes that it has started, without a warning."""
        process = self._processes.pop(f"node-{number}")
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart_node(self, number: int, timeout: float = 120) -> None:
        """Start a SuperNode that was killed, again and again until the SuperLink takes it, as a supervisor would.

        The SuperLink believes that a node is there until it has missed its heartbeats for a minute, and refuses a
        second one with the same key until then.
        """
        end, name = time.monotonic() + timeout, f"node-{number}"
        known = self.log(name).count("SuperNode ID")
        self.start_node(number)
        while self.log(name).count("SuperNode ID") == known:
            if time.monotonic() > end:
                raise TimeoutError(f"Node {number} does not come back.\n{self.log(name)[-2000:]}")
            if not self.is_running(name):
                self.kill_node(number)  # what it has left behind
                time.sleep(2)
                self.start_node(number)
            time.sleep(0.5)

    def is_running(self, name: str) -> bool:
        """Whether ``"superlink"`` or ``"node-<number>"`` runs."""
        return name in self._processes and self._processes[name].poll() is None

    def run(self, **config: Any) -> str:
        """Start a run of the app with values of its run config; return its id."""
        words = [f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items()]
        out = self.flwr("run", str(HERE), "here", "--run-config", " ".join(words), "--format", "json")
        return str(json.loads(out)["run-id"])

    def wait(self, run_id: str, timeout: float = 600) -> str:
        """Wait until a run is over; return its status, such as ``"finished:completed"``."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            status = self.status(run_id)
            if status.partition(":")[0] in _STATES:
                return status
            time.sleep(1)
        raise TimeoutError(f"The run is not over after {timeout} s: see {self.folder}.")

    def status(self, run_id: str) -> str:
        """Return a run's status."""
        runs = json.loads(self.flwr("ls", "here", "--run-id", run_id, "--format", "json"))["runs"]
        return str(runs[0]["status"])

    def log(self, name: str) -> str:
        """Return what a process has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def flwr(self, *words: str) -> str:
        """Call Flower's command line interface."""
        done = subprocess.run(
            [str(_command("flwr")), *words], env=self._environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"`flwr {' '.join(words)}` failed.\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """Stop all processes of the federation, those too that they have started."""
        for process in self._processes.values():
            process.terminate()
        end = time.monotonic() + 10
        for process in self._processes.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = {}
        while (left := self.leftovers()) and time.monotonic() < end + 20:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def leftovers(self) -> list[int]:
        """Return the processes that bear this federation's mark and are not waited for here."""
        mark, known = f"{_MARK}={self._mark}".encode(), {process.pid for process in self._processes.values()}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                marked = mark in (entry / "environ").read_bytes().split(b"\0")
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if marked and not dead and int(entry.name) not in known | {os.getpid()}:
                found.append(int(entry.name))
        return found

    def _launch(self, name: str, command: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(_command(command)), *words],
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        return {
            **os.environ,
            "PATH": os.pathsep.join(paths),
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            _MARK: self._mark,
        }

    def _wait_for_port(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not self.is_running("superlink"):
                raise RuntimeError(f"The SuperLink has ended.\n{self.log('superlink')}")
            try:
                socket.create_connection((ADDRESS, self.port), timeout=1).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise TimeoutError(f"The SuperLink does not answer.\n{self.log('superlink')}")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind((ADDRESS, 0))
        return int(one.getsockname()[1])


def _command(name: str) -> Path:
    return Path(sys.executable).parent / name


def main() -> None:
    """Run the app on three nodes and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="both", choices=["fedavg", "lbgm", "both"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="federation-") as name:
        folder = Path(name)
        results = folder / "results.json"
        with Federation(folder, given.nodes) as federation:
            run_id = federation.run(
                method=given.method,
                rounds=given.rounds,
                partitions=given.nodes,
                min_nodes=given.nodes,
                state_dir=str(folder / "state-server"),
                results=str(results),
            )
            status = federation.wait(run_id)
            if not results.exists():
                raise SystemExit(f"The run ended as {status}.\n{federation.flwr('log', run_id, 'here', '--show')}")
        for numbers in json.loads(results.read_text())["rounds"]:
            print(
                f"round {numbers['round']}: accuracy {numbers.get('val/acc', float('nan')):.3f}, sent"
                f" {numbers['comm/uplink_bytes']:.0f} bytes up and {numbers['comm/downlink_bytes']:.0f} down,"
                f" {numbers['outcomes']}"
            )


if __name__ == "__main__":
    main()
