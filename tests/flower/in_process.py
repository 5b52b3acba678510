"""Nodes and a grid in this process: Flower's apps are called with messages that went through its serialisation."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lbgm import LBGMFederated
from lightning_lbgm.data import Partitioner
from lightning_lbgm.flower import LBGMStrategy, federated_client_app

SEED = 3
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # what Flower's processes are told


class Net(pl.LightningModule):
    """A small classifier with dropout, whose random numbers must be those of the simulation."""

    def __init__(self, norm=False, lr=0.1):
        super().__init__()
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16)] if norm else [nn.Linear(8, 16)]
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def make_net(**options):
    torch.manual_seed(0)
    return Net(**options)


def dataset(n=180, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.5 * torch.randn(n, 3, generator=generator)).argmax(1))


class Data(pl.LightningDataModule):
    def __init__(self, train=None, val=None):
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=100)


def parts(data, num_clients=3):
    """Examples of each client: of different numbers."""
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(9))
    sizes = [len(data) * (k + 1) // (num_clients * (num_clients + 1) // 2) for k in range(num_clients)]
    sizes[-1] += len(data) - sum(sizes)
    return [part.sort().values for part in indices.split(sizes)]


class MemoryGrid(Grid):
    """A grid whose nodes are called one after the other.

    Args:
        apps: The ClientApp of each node, by Flower's number.
        configs: Node configs, by Flower's number. None: `partition-id` counts from 0.
        tamper: Called with each reply and the message that it answers; returns the replies that arrive.
    """

    def __init__(self, apps, configs=None, tamper=None):
        self.apps = dict(apps)
        self.configs = configs or {node: {"partition-id": k} for k, node in enumerate(self.apps)}
        self.tamper = tamper or (lambda reply, message: [reply])
        self.offline = set()
        self.sent, self.received = [], []
        self.forget_contexts()

    def forget_contexts(self, *nodes):
        for node in nodes or self.apps:
            state = RecordDict()
            if not nodes and not hasattr(self, "contexts"):
                self.contexts = {}
            self.contexts[node] = Context(1, node, self.configs[node], state, {})

    def set_run(self, run): ...

    @property
    def run(self):
        return None

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, group_id=group_id)

    def get_node_ids(self):
        return [node for node in self.apps if node not in self.offline]

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"{len(self.sent)}"
            crossed = copied(message)
            self.sent.append(crossed)
            if node in self.offline:
                continue
            try:
                reply = self.apps[node](crossed, self.contexts[node])
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=crossed)
            for one in self.tamper(reply, crossed):
                self.received.append(one)
                replies.append(one)
        return replies


def copied(message):
    """A message whose content went through Flower's serialisation."""
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = type(record).inflate(record.deflate())
    fresh = Message(content, message.metadata.dst_node_id, message.metadata.message_type)
    fresh.metadata.__dict__.update(message.metadata.__dict__)
    return fresh


def subset(data, part):
    return Subset(data, part.tolist())


class Given(Partitioner):
    """Deals what `parts` says."""

    def partition(self, dataset, num_clients, rng):
        return [part.numpy() for part in parts(dataset, num_clients)]


class Seen(pl.Callback):
    """Collects reports and metrics of each round."""

    def __init__(self):
        self.reports, self.metrics = [], []

    def on_train_batch_end(self, trainer, *args):
        self.reports.append(trainer.strategy.last_report)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
TRAIN, VAL = dataset(), dataset(200, seed=1)
BOTH = ("uplink", "downlink", "buffers", "personal")


def simulate(folder, rounds=4, net=make_net, num_clients=3, callbacks=(), **settings):
    """The federation as it is simulated: model, what was seen, and the ledger."""
    module, seen = net(), Seen()
    strategy = LBGMFederated(
        num_clients=num_clients, partitioner=Given(), seed=SEED, execution="sequential", **settings
    )
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=rounds,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[*callbacks, seen],
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(module, datamodule=Data(TRAIN, VAL))
    return module, seen, strategy.ledger


def make_apps(net=make_net, num_clients=3, state_dir=None, objective=None, trainer=None, val=None, **settings):
    """The nodes' apps, by Flower's number."""
    options = {name: value for name, value in settings.items() if name in BOTH}
    return {
        100 + k: federated_client_app(
            net(),
            Data(subset(TRAIN, part), val and val[k]),
            state_dir=state_dir,
            objective=objective,
            trainer={"accelerator": "cpu", **(trainer or {})},
            **options,
        )
        for k, part in enumerate(parts(TRAIN, num_clients))
    }


def serve(folder, grid, rounds=4, net=make_net, num_clients=3, timeout=1, **settings):
    """Run a server on a grid: model, what was seen, the strategy and Flower's result."""
    module, seen = net(), Seen()
    strategy = LBGMStrategy(
        module,
        Data(val=VAL),
        num_clients=num_clients,
        seed=SEED,
        trainer={"accelerator": "cpu", "callbacks": [seen], "default_root_dir": folder},
        **{"min_available_nodes": num_clients, **settings},
    )
    result = strategy.start(grid, num_rounds=rounds, timeout=timeout)
    return module, seen, strategy, result


def same(one, other):
    """Whether two modules hold the same numbers to the bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
