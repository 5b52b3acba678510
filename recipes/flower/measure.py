"""Bytes that really cross the network, round by round, beside the ledger's: ``python -m recipes.flower.measure``.

Each node reaches the SuperLink through a proxy that counts what passes, encrypted as it is. The same federation is also
simulated.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
import threading
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from recipes.flower.federation import Federation
from recipes.flower.proxy import CountingProxy
from recipes.flower.simulate import simulate

METHODS = ("fedavg", "lbgm", "both", "recommended")


class Samples:
    """Counts of all proxies over time.

    Args:
        proxies: The proxies.
    """

    def __init__(self, proxies: list[CountingProxy]) -> None:
        self._proxies = proxies
        self._times: list[float] = []
        self._counts: list[tuple[int, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Samples:
        """Start to sample."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, moment: float) -> tuple[int, int]:
        """Return the bytes up and down until a moment."""
        return self._counts[max(0, bisect_right(self._times, moment) - 1)]

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            self._times.append(time.time())
            self._counts.append((sum(p.up for p in self._proxies), sum(p.down for p in self._proxies)))


def measure(method: str, rounds: int, nodes: int, config: dict[str, Any], idle: float = 20) -> dict[str, Any]:
    """Run a federation; return each round's bytes, the ledger's, the simulation's numbers, and idle bytes a second."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="federation-")))
        federation = Federation(folder, nodes)
        proxies = [stack.enter_context(CountingProxy(federation.port)) for _ in range(nodes)]
        federation.ports = {number: proxy.port for number, proxy in enumerate(proxies)}
        samples = stack.enter_context(Samples(proxies))
        stack.enter_context(federation)
        time.sleep(5)
        before = time.time()
        time.sleep(idle)
        calm = [b - a for a, b in zip(samples.at(before), samples.at(before + idle))]
        results = folder / "results.json"
        run_id = federation.run(
            method=method, rounds=rounds, partitions=nodes, min_nodes=nodes, results=str(results), **config
        )
        status = federation.wait(run_id, 3000)
        if not results.exists():
            raise RuntimeError(f"The run ended as {status}.\n{federation.flwr('log', run_id, 'here', '--show')}")
        numbers = json.loads(results.read_text())["rounds"]
        rows = []
        # From the second round on: the first begins with the greeting and the app's code.
        for previous, one in itertools.pairwise(numbers):
            (up0, down0), (up1, down1) = samples.at(previous["time"]), samples.at(one["time"])
            rows.append(
                {
                    "round": one["round"],
                    "seconds": one["time"] - previous["time"],
                    "up": up1 - up0,
                    "down": down1 - down0,
                    "ledger up": one["comm/uplink_bytes"],
                    "ledger down": one["comm/downlink_bytes"],
                }
            )
    expected, _ = simulate(method, rounds, nodes, **config)
    return {
        "method": method,
        "idle up a second": calm[0] / idle,
        "idle down a second": calm[1] / idle,
        "rows": rows,
        "accuracy": [one["val/acc"] for one in numbers],
        "simulated": [one["val/acc"] for one in expected],
        "same decisions": [one["outcomes"] for one in numbers]
        == [{str(k): outcome for k, outcome in one["outcomes"].items()} for one in expected],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    parser.add_argument("--mnist", type=Path, help="folder of torchvision's MNIST, instead of the small digits")
    parser.add_argument("--output", type=Path, help="for all numbers, as JSON")
    given = parser.parse_args()
    config: dict[str, Any] = {"hidden": given.hidden}
    if given.mnist:
        config |= {"data": "mnist", "data-dir": str(given.mnist.resolve())}
    found = []
    print("| method | round | up, ledger | up, measured | down, ledger | down, measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method in given.methods:
        result = measure(method, given.rounds, given.nodes, config)
        found.append(result)
        for row in result["rows"]:
            cells = [row["ledger up"], row["up"], row["ledger down"], row["down"]]
            print(f"| {method} | {row['round']} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |", flush=True)
        if given.output:
            given.output.write_text(json.dumps(found, indent=1))
    for result in found:
        print(
            f"\n{result['method']}: idle {result['idle up a second']:.0f} bytes a second up and"
            f" {result['idle down a second']:.0f} down; accuracy {result['accuracy'][-1]:.3f}, simulated"
            f" {result['simulated'][-1]:.3f}; the same decisions: {result['same decisions']}"
        )


if __name__ == "__main__":
    main()
