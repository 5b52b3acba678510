"""Checks of training loaders that cannot be dealt to clients, each with the remedy."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_lbgm.data.sampling import iterates_by_itself

__all__ = ["check_client_loaders", "check_loader", "check_same_data", "needs_client_loaders"]


_A_LOADER_EACH = (
    "Or give each client a loader of its own, whose batches are taken as they come: `fit(model, [loader_a, loader_b])`"
    " with `LBGMFederated(num_clients=None)`."
)


def check_loader(loader: object) -> DataLoader[Any]:
    """Return the training DataLoader if its dataset can be dealt to clients."""
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            "LBGMFederated deals the dataset of one training `DataLoader` to the clients; got an object of type"
            f" {type(loader).__name__}. Pass the `DataLoader` itself, with what is done to its batches in its"
            f" `collate_fn` or its dataset. {_A_LOADER_EACH}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            f"The training dataset {type(loader.dataset).__name__} is an `IterableDataset`: its examples cannot be"
            f" dealt to clients. Use a map-style dataset. {_A_LOADER_EACH}"
        )
    method = iterates_by_itself(loader)
    if method is not None:
        raise MisconfigurationException(
            f"The training loader's class {type(loader).__name__} has a `{method}` of its own, but clients' batches are"
            " drawn from its dataset, so what it does would be left out. Do it in the dataset, in `collate_fn` or in"
            f" the module's `on_after_batch_transfer`, and use torch's `DataLoader`. {_A_LOADER_EACH}"
        )
    return loader


def check_client_loaders(
    num_loaders: int, num_clients: int | None, partitioner: object | None, in_use: int | None, mode: str | None
) -> None:
    """Refuse several training loaders if they are not to be the clients.

    Args:
        num_loaders: Number of loaders in the collection.
        num_clients: The setting.
        partitioner: The setting.
        in_use: Number of clients of the federation that goes on; None: it has not begun.
        mode: That of the ``CombinedLoader``, if the user made one.
    """
    if num_loaders == 0:
        raise MisconfigurationException("The collection of training loaders is empty: pass a loader for each client.")
    if mode is not None:
        raise MisconfigurationException(
            f"`CombinedLoader(..., mode={mode!r})` combines the batches of {num_loaders} loaders, which a federation"
            f" cannot. {_A_LOADER_EACH}"
        )
    if num_clients is not None and (num_clients != num_loaders or partitioner is not None):
        clash = (
            f"`num_clients={num_clients}`" if num_clients != num_loaders else f"`partitioner={partitioner!r}` beside"
        )
        raise MisconfigurationException(
            f"LBGMFederated got {clash} and {num_loaders} training loaders. With `LBGMFederated(num_clients=None)` and"
            " no partitioner each loader is a client. To deal the examples of all of them, pass one"
            " `DataLoader(ConcatDataset(datasets), ...)`; with `partitioner=NaturalPartitioner()` each of the datasets"
            " is then a client."
        )
    if in_use is not None and in_use != num_loaders:
        raise MisconfigurationException(
            f"There are {num_loaders} training loaders now, but the federation has {in_use} clients, one for each"
            " loader it began with: pass as many loaders, or use a new Trainer for other clients."
        )


def needs_client_loaders(found: str) -> MisconfigurationException:
    """Return the error for ``num_clients=None`` without loaders for the clients."""
    return MisconfigurationException(
        f"`LBGMFederated(num_clients=None)` takes a training loader for each client, as `fit(model, [loader_a,"
        f" loader_b])` or a dict of them; got {found}. Pass a list or a dict, or say how many clients the data is dealt"
        " to: `LBGMFederated(num_clients=10)`."
    )


def check_same_data(fingerprints: list[str]) -> None:
    """Refuse processes that have dealt different data to the clients."""
    if len(set(fingerprints)) > 1:
        raise MisconfigurationException(
            "The processes have dealt the training examples to the clients differently: the dataset, its labels, its"
            " sampler or its split differ between them. Seed what is random in it, for instance with"
            " `seed_everything(...)` at the top of the script."
        )
