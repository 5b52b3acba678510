"""The node's app."""

from __future__ import annotations

from digits.task import METHODS, make
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lightning_lbgm.flower import federated_client_app

app = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """Answer the server with the stages that the run config names."""
    module, data = make(context.run_config, int(context.node_config["partition-id"]))
    node = federated_client_app(module, data, **METHODS[str(context.run_config["method"])], trainer=CPU)
    return node(message, context)


CPU = {"accelerator": "cpu"}
app.train()(answer)
app.query()(answer)
app.evaluate()(answer)
