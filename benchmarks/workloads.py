"""The measured work, and FedAvg on it as one writes it by hand in PyTorch.

W1 is an FCN 784-128-10 with 100 of 100 clients a round, W2 a CNN with 20 of 100; 600 examples a client, batch 32,
5 local steps. The data are drawn at random: what a step costs does not depend on them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks import device

BATCH_SIZE, LOCAL_STEPS, LEARNING_RATE, EXAMPLES_PER_CLIENT = 32, 5, 0.1, 600

Client = tuple[int, list[Tensor]]  # its number, and the indices of its local batches


@dataclass(frozen=True)
class Workload:
    """A model and a federation.

    Attributes:
        name: For tables.
        title: What it is.
        make_net: Returns the model, the same weights at each call.
        shape: Of one input.
        num_clients: K.
        cohort_size: Clients in a round.
    """

    name: str
    title: str
    make_net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_clients: int = 100
    cohort_size: int = 100

    def data(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of all clients, one client after the other."""
        return _data(self.num_clients * EXAMPLES_PER_CLIENT, self.shape)


@functools.lru_cache(maxsize=2)
def _data(num_examples: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_examples, *shape, generator=generator)
    noise = 0.5 * torch.randn(num_examples, 10, generator=generator)
    return inputs, (inputs.flatten(1)[:, :10] + noise).argmax(1)


def make_fcn() -> nn.Module:
    """FCN 784-128-10: 101,770 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def make_cnn() -> nn.Module:
    """Two convolutions and a linear layer, 28 x 28 inputs: 18,378 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


W1 = Workload("W1", "FCN 784-128-10, 100 of 100 clients", make_fcn, (784,))
W2 = Workload("W2", "CNN, 20 of 100 clients", make_cnn, (1, 28, 28), cohort_size=20)


def workloads(quick: bool) -> tuple[Workload, Workload]:
    """Return W1 and W2, with a fifth of the clients where it must be quick."""
    if quick:
        return dataclasses.replace(W1, num_clients=20, cohort_size=20), dataclasses.replace(W2, cohort_size=4)
    return W1, W2


class Classifier(pl.LightningModule):
    """An ordinary LightningModule, as a user would write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def cohorts(workload: Workload) -> Iterator[list[Client]]:
    """Draw each round's clients and their local batches; a client's examples are consecutive."""
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randperm(workload.num_clients, generator=generator)[: workload.cohort_size].tolist()
        yield [(client, _batches(client, generator)) for client in sorted(chosen)]


def _batches(client: int, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(EXAMPLES_PER_CLIENT, generator=generator) + client * EXAMPLES_PER_CLIENT
    return list(order.split(BATCH_SIZE)[:LOCAL_STEPS])


class _Worker:
    """A model that trains clients one after the other and sums what they arrive at."""

    def __init__(self, workload: Workload) -> None:
        self.device = device.current()
        self.net = workload.make_net().to(self.device)
        self.parameters = list(self.net.parameters())
        self.inputs, self.targets = workload.data()

    def run(self, server: Sequence[Tensor], clients: Sequence[Client], num_clients: int) -> tuple[list[Tensor], Tensor]:
        """Return the sum of the clients' parameters over ``num_clients``, and the sum of the steps' losses."""
        sums = [torch.zeros_like(p) for p in server]
        loss_sum = torch.zeros((), device=self.device)
        for _, batches in clients:
            with torch.no_grad():
                for p, s in zip(self.parameters, server):
                    p.copy_(s)
            optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)
            for batch in batches:
                x, y = self.inputs[batch].to(self.device), self.targets[batch].to(self.device)
                loss = nn.functional.cross_entropy(self.net(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
            with torch.no_grad():
                for total, p in zip(sums, self.parameters):
                    total.add_(p, alpha=1 / num_clients)
        return sums, loss_sum


def loop(workload: Workload) -> Iterator[float]:
    """FedAvg by hand, one client after the other; yields the loss of each round."""
    worker = _Worker(workload)
    server = [p.detach().clone() for p in worker.parameters]
    rounds = cohorts(workload)
    while True:
        clients = next(rounds)
        server, loss_sum = worker.run(server, clients, len(clients))
        yield float(loss_sum) / (len(clients) * LOCAL_STEPS)


def threads(workload: Workload, num_threads: int = 2) -> Iterator[float]:
    """FedAvg by hand, with a pool of threads that each train a part of the cohort on a model of their own."""
    workers = [_Worker(workload) for _ in range(num_threads)]
    server = [p.detach().clone() for p in workers[0].parameters]
    rounds = cohorts(workload)
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            clients = next(rounds)
            parts = [clients[start::num_threads] for start in range(num_threads)]
            jobs = [pool.submit(w.run, server, part, len(clients)) for w, part in zip(workers, parts)]
            results = [job.result() for job in jobs]
            server = [torch.stack(sums).sum(0) for sums in zip(*(sums for sums, _ in results))]
            yield float(sum(loss for _, loss in results)) / (len(clients) * LOCAL_STEPS)


def vectorized(workload: Workload, chunk: int) -> Iterator[float]:
    """FedAvg by hand, ``torch.func.vmap`` over ``chunk`` clients at once."""
    net = workload.make_net()
    inputs, targets = workload.data()
    server = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = nn.functional.cross_entropy(functional_call(net, parameters, (x,)), y)
        return loss, loss.detach()

    gradients = vmap(grad(loss_of, has_aux=True), randomness="different")
    rounds = cohorts(workload)
    while True:
        clients = next(rounds)
        sums = {name: torch.zeros_like(p) for name, p in server.items()}
        loss_sum = torch.zeros(())
        for start in range(0, len(clients), chunk):
            part = clients[start : start + chunk]
            stacked = {name: p.expand(len(part), *p.shape).clone() for name, p in server.items()}
            for step in range(LOCAL_STEPS):
                batch = torch.stack([batches[step] for _, batches in part])
                changes, losses = gradients(stacked, inputs[batch], targets[batch])
                for name, change in changes.items():
                    stacked[name].add_(change, alpha=-LEARNING_RATE)
                loss_sum += losses.sum()
            for name, p in stacked.items():
                sums[name].add_(p.sum(0), alpha=1 / len(clients))
        server = sums
        yield float(loss_sum) / (len(clients) * LOCAL_STEPS)
