"""The page for those who come from another framework: its code runs here, and comes to what Flower's comes to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(blocks("py"))))
def test_the_code_of_the_others_is_code(number):
    compile(blocks("py")[number], "coming-from.md", "exec")


def in_process_grid(flwr_app, serverapp, client_app, num_clients):
    """Make a grid that hands each message to the client's app and takes its reply, without a network."""

    class InProcess(serverapp.Grid):
        run = None

        def set_run(self, run):
            self.run = run

        def get_node_ids(self):
            return range(1, num_clients + 1)

        def create_message(self, *args, **kwargs):
            raise NotImplementedError

        push_messages = pull_messages = create_message

        def send_and_receive(self, messages, *, timeout=None):
            replies = []
            for message in messages:
                node = message.metadata.dst_node_id
                config = {"partition-id": node - 1, "num-partitions": num_clients}
                context = flwr_app.Context(1, node, config, flwr_app.RecordDict(), {})
                replies.append(client_app(message, context))
            return replies

    return InProcess()


def test_flowers_twenty_lines_come_to_the_same_parameters(monkeypatch):
    flwr_app = pytest.importorskip("flwr.app", reason="Flower is not installed")
    serverapp = pytest.importorskip("flwr.serverapp")
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity  # of the process that `flwr run` starts
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)
    namespace = {"__name__": "coming_from"}
    for block in blocks("python"):
        exec(block, namespace)
    here = {name: tensor.clone() for name, tensor in namespace["model"].state_dict().items()}
    (theirs,) = [block for block in blocks("py") if "flwr" in block]
    exec(theirs, namespace)
    grid = in_process_grid(flwr_app, serverapp, namespace["client_app"], len(namespace["parts"]))
    namespace["main"](grid, flwr_app.Context(1, 0, {}, flwr_app.RecordDict(), {}))
    moved = max((here[name] - tensor).abs().max() for name, tensor in namespace["start"].items())
    assert moved > 0.1
    for name, tensor in namespace["model"].state_dict().items():
        torch.testing.assert_close(tensor, here[name], atol=1e-5, rtol=1e-5)
