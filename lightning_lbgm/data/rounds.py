"""Round loader, which Lightning iterates: one item is one communication round."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

from lightning_lbgm.data.access import BatchAccessError, NotABatch
from lightning_lbgm.data.feed import Feed, LocalBatch
from lightning_lbgm.data.participation import Participation, Turnout
from lightning_lbgm.data.samplers import SamplerState
from lightning_lbgm.network import Plan

__all__ = ["Round", "RoundLoader"]


class Round(NotABatch):
    """One communication round: the cohort, and a lazy stream of each client's local batches.

    It stands where Lightning expects a training batch, so hooks such as ``on_train_batch_end(outputs, batch, ...)``
    receive it. It holds no tensors: unpacking it, indexing it or asking it for a batch's attributes is an error.

    Attributes:
        index: The round, from 0.
        cohort: Clients that take part, in increasing order. Nobody may be left.
        num_examples: n_k of each of them.
        num_steps: Local steps of each of them.
        dropped: Clients that get the model and whose update does not count, in increasing order. They are not trained.
        unreached: Clients that were chosen and do not get the model, in increasing order.
        num_available: Clients that could have been chosen; None if all could and those who were all take part.
        waits_until: The deadline in seconds, if the server waits until then for somebody who got the model; else 0.
        observers: Called with the data of each local batch as it is drawn in this process.

    Raises:
        BatchAccessError: If it is used as a batch of tensors.
    """

    def __init__(
        self,
        index: int,
        cohort: tuple[int, ...],
        feed: Feed,
        observers: Sequence[Callable[[Any], Any]] = (),
        *,
        dropped: tuple[int, ...] = (),
        unreached: tuple[int, ...] = (),
        num_available: int | None = None,
        waits_until: float = 0.0,
    ) -> None:
        self.index = index
        self.cohort = cohort
        self.dropped, self.unreached, self.num_available = dropped, unreached, num_available
        self.waits_until = waits_until
        self.num_examples = tuple(feed.num_examples(client_id) for client_id in cohort)
        self.num_steps = tuple(feed.num_steps(client_id) for client_id in cohort)
        self.observers = tuple(observers)
        self._feed = feed

    def clients(self) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Yield each client's id and its local batches, loaded as they are drawn."""
        stream = self._feed.stream(self.index, self.cohort)
        if not self.observers:
            return stream
        return ((client_id, map(self._observe, batches)) for client_id, batches in stream)

    def _observe(self, batch: LocalBatch) -> LocalBatch:
        for observe in self.observers:
            observe(batch.data)
        return batch

    @property
    def work(self) -> tuple[int, ...]:
        """Local work of each client: steps times batch size."""
        return tuple(self._feed.work(client_id) for client_id in self.cohort)

    def num_examples_of(self, client_id: int) -> int:
        """Return n_k of any client, of the cohort or not."""
        return self._feed.num_examples(client_id)

    def part(self, client_ids: Collection[int]) -> Round:
        """Return the round of some of its clients alone, each with the same batches."""
        return Round(self.index, tuple(k for k in self.cohort if k in client_ids), self._feed, self.observers)

    def _refuse(self, what: str) -> NoReturn:
        raise BatchAccessError(
            f"A training batch is a communication round here, and `{self!r}` {what}. `on_train_batch_start` and"
            " `on_train_batch_end` are called once a round; the round has `index`, `cohort`, `num_examples` and"
            " `num_steps`. To work on the clients' batches, use `on_after_batch_transfer` or `training_step` of the"
            " module, which are called with each local batch; to look at them here, draw them with"
            " `for client_id, batches in batch.clients(): ...`."
        )

    def __repr__(self) -> str:
        """Show the round without its data."""
        return f"Round(index={self.index}, cohort_size={len(self.cohort)})"


class RoundLoader:
    """Iterate over the rounds of an epoch.

    Attributes that it has not itself (``dataset``, ``batch_size``, ``num_workers``, ``collate_fn`` and the like) are
    those of the user's DataLoader, and items (``loader["a"]``) those of the user's collection of loaders.

    Args:
        feed: Where local batches come from.
        cohort_size: Clients wanted in a round.
        rounds_per_epoch: Length of the loader.
        next_round: Returns the index of the round to come; it is asked as late as possible, so that a resumed run
            continues where the checkpoint was made.
        prepare: Called before the first round, with the processes in step.
        loader: The user's DataLoader, if there is one alone.
        collection: What the user gave instead of a DataLoader, if anything.
        participation: The rules of who takes part. None: uniform cohorts, and nobody is missing.
        sampling: Returns the sampler's state before the round to come.
        agree: Returns what the first process has, where processes might come to different turnouts.
        plan: Returns the clients' times on a network; None if they are counted in local steps.
    """

    def __init__(
        self,
        feed: Feed,
        cohort_size: int,
        rounds_per_epoch: int,
        next_round: Callable[[], int],
        prepare: Callable[[], None] | None = None,
        loader: Any = None,
        collection: Any = None,
        participation: Participation | None = None,
        sampling: Callable[[], SamplerState] = dict,
        agree: Callable[[Turnout], Turnout] = lambda turnout: turnout,
        plan: Callable[[], Plan | None] = lambda: None,
    ) -> None:
        self.feed = feed
        self.cohort_size = cohort_size
        self.rounds_per_epoch = rounds_per_epoch
        self._next_round = next_round
        self._prepare = prepare
        self._loader = loader
        self._collection = collection
        self._participation = participation or Participation()
        self._sampling = sampling
        self._agree = agree
        self._plan = plan
        # Not a method of this loader, which refers to the feed: no circle, see Prefetch.
        ahead = partial(_cohort_ahead, self._participation, weakref.proxy(feed), cohort_size)
        feed.next_cohort = ahead if self._participation.is_ahead else None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's DataLoader."""
        if name.startswith("_") or self._loader is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._loader, name)

    def __getitem__(self, key: Any) -> Any:
        """Return a member of the user's collection of loaders."""
        if self._collection is None:
            raise TypeError(f"{type(self).__name__!r} object is not subscriptable: there is one training loader")
        return self._collection[key]

    def __len__(self) -> int:
        """Return the rounds in an epoch."""
        return self.rounds_per_epoch

    def __iter__(self) -> Iterator[Round]:
        """Yield the rounds of one epoch."""
        if self._prepare is not None:
            self._prepare()
        for _ in range(self.rounds_per_epoch):
            index = self._next_round()
            yield Round(index, feed=self.feed, **vars(self._turnout(index)))

    def _turnout(self, index: int) -> Turnout:
        turnout = self._participation.draw(index, self.feed, self.cohort_size, self._sampling(), self._plan())
        return turnout if self._participation.is_ahead else self._agree(turnout)

    def state_dict(self) -> dict[str, int]:
        """Return the next round: a mark for the checkpoint that the loader resumes within an epoch."""
        return {"next_round": self._next_round()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing: the round to come is asked of the federation."""


def _cohort_ahead(participation: Participation, feed: Feed, cohort_size: int, round_index: int) -> tuple[int, ...]:
    return participation.draw(round_index, feed, cohort_size, {}).cohort
