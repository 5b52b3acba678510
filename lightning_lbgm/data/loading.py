"""Loading like a user's DataLoader: workers, collate function and what belongs to them, over other examples."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["loader_like", "loading_of"]


def loading_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return a loader's settings of how it loads, not of what and in which order."""
    return {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }


def loader_like(loader: DataLoader[Any], dataset: Dataset[Any], **settings: Any) -> DataLoader[Any]:
    """Return a DataLoader over a dataset with the batch size and the loading of another, in order if not said else."""
    return DataLoader(
        dataset,
        batch_size=getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
        **loading_of(loader),
        **settings,
    )
