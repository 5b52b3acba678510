"""Records: all that crosses between a server and its nodes, in Flower's ``ConfigRecord`` of plain values and bytes.

A message has one record, under the key ``"lbgm"``, with exactly the fields of one of the classes here. Whatever else
comes is refused before anything of it is used. Nothing is pickled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from flwr.app import ConfigRecord, RecordDict

__all__ = ["Greeting", "Introduction", "RecordError", "Refusal", "Score", "Task", "Trial", "Work", "read", "write"]

KEY = "lbgm"
VERSION = 1
"""Of the records' fields; both ends must have the same."""

_MOST_TESTS = 2**20
_KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bytes": bytes, "bool": bool}


class RecordError(ValueError):
    """A record that is none of ours, or has a field that is missing or of another type."""


@dataclass(frozen=True)
class Greeting:
    """What the server asks a node that it does not know.

    Attributes:
        federation: Names the federation: states of another one are of no use.
        settings: What both ends must agree on, as JSON.
        seed: The run's.
        local_epochs: Passes over the node's examples in a round; 0: steps are counted.
        local_steps: Optimizer steps in a round; 0: passes are counted.
        ticket: Random, for this node alone, which its answer must have: other nodes do not know it.
    """

    federation: str
    settings: str
    seed: int
    local_epochs: int
    local_steps: int
    ticket: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Introduction:
    """A node's answer to a ``Greeting``.

    Attributes:
        client_id: The client that it is; -1: the server may choose.
        num_examples: n_k.
        num_steps: Its local steps in a round.
        ticket: The greeting's.
    """

    client_id: int
    num_examples: int
    num_steps: int
    ticket: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        _check(-1 <= self.client_id < 2**32 - 1, "client_id", self.client_id)
        _check(0 < self.num_examples < 2**40, "num_examples", self.num_examples)
        _check(0 < self.num_steps < 2**32, "num_steps", self.num_steps)


@dataclass(frozen=True)
class Task:
    """What the server tells one node about a round.

    Attributes:
        federation: Names the federation.
        settings: Digest of what both ends must agree on.
        seed: The run's.
        local_epochs: Passes over the node's examples; 0: steps are counted.
        local_steps: Optimizer steps; 0: passes are counted.
        rounds_per_epoch: Rounds in a Lightning epoch, for schedules.
        round_index: The round, from 0.
        client_id: The client that the node is.
        sequence: Number of the last ``Message`` that the server took from it.
        state_version: Version of what the server remembers of it. A node that has another one forgets, and sends in
            full.
        shared: What the stages keep for all clients (threshold, layers, ...), in the binary form of a stage's state.
        model: The downlink's messages, in order: they make the global model out of what the node holds.
        ticket: Random, for this node and round alone, which its answer must have: other nodes do not know it.
    """

    federation: str
    settings: str
    seed: int
    local_epochs: int
    local_steps: int
    rounds_per_epoch: int
    round_index: int
    client_id: int
    sequence: int
    state_version: int
    shared: bytes
    model: list[bytes]
    ticket: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Work:
    """A node's answer to a ``Task``: one ``Message``, and the numbers that reports and metrics are made of.

    Attributes:
        round_index: The round.
        client_id: The client that the node is.
        message: The ``Message``, as bytes.
        held: Version of the model that the node holds; 0: none.
        local_steps: Optimizer steps made.
        examples: Examples seen in them, repeats included.
        loss: Mean loss over them; NaN if they had none.
        tested: Whether there was a look-back test; the next fields are the ``Decision``'s.
        recycled: Of each test.
        errors: Of each test.
        coefficients: Of each test.
        threshold: NaN: none.
        outcome: In a word.
        metric_names: Further numbers for the client's report.
        metric_values: The numbers.
        logged: What ``self.log`` was called with, as JSON.
        ticket: The task's.
    """

    round_index: int
    client_id: int
    message: bytes
    held: int
    local_steps: int
    examples: int
    loss: float
    tested: bool = False
    recycled: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    threshold: float = math.nan
    outcome: str = "sent"
    metric_names: list[str] = field(default_factory=list)
    metric_values: list[float] = field(default_factory=list)
    logged: str = "[]"
    ticket: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        _check(0 <= self.held < 2**32, "held", self.held)
        _check(0 <= self.local_steps < 2**32, "local_steps", self.local_steps)
        _check(0 <= self.examples < 2**62, "examples", self.examples)
        tests = {len(self.recycled), len(self.errors), len(self.coefficients)}
        _check(len(tests) == 1 and max(tests) <= _MOST_TESTS, "errors", f"{sorted(tests)} tests")
        _check(len(self.metric_names) == len(self.metric_values) <= 1000, "metric_names", len(self.metric_names))
        _check(len(self.outcome) <= 100 and all(len(name) <= 200 for name in self.metric_names), "outcome", "too long")
        _check(len(self.logged) <= 2**20, "logged", f"{len(self.logged)} characters")


@dataclass(frozen=True)
class Trial:
    """What the server asks of a node that is to evaluate the global model on its own validation data.

    Attributes:
        federation: Names the federation.
        settings: Digest of what both ends must agree on.
        seed: The run's.
        rounds_per_epoch: Rounds in a Lightning epoch.
        round_index: The round after which it is evaluated, from 0.
        client_id: The client that the node is.
        model: A ``Message`` with the whole model. It has nothing to do with what the node holds of the downlink.
        ticket: Random, for this node and evaluation alone, which its answer must have.
    """

    federation: str
    settings: str
    seed: int
    rounds_per_epoch: int
    round_index: int
    client_id: int
    model: bytes
    ticket: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Score:
    """A node's answer to a ``Trial``.

    Attributes:
        round_index: The round.
        client_id: The client that the node is.
        num_examples: Examples that the model was evaluated on.
        metric_names: What ``validation_step`` logged.
        metric_values: Its values, finite.
        ticket: The trial's.
    """

    round_index: int
    client_id: int
    num_examples: int
    metric_names: list[str]
    metric_values: list[float]
    ticket: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        names, values = self.metric_names, self.metric_values
        _check(0 < self.num_examples < 2**40, "num_examples", self.num_examples)
        _check(len(set(names)) == len(names) == len(values) <= 1000, "metric_names", f"{len(names)} names")
        _check(all(0 < len(name) <= 200 and name.isprintable() for name in names), "metric_names", "no plain words")
        _check(all(map(math.isfinite, values)), "metric_values", "they are not finite")


@dataclass(frozen=True)
class Refusal:
    """A node's answer if it cannot do what it was asked.

    Attributes:
        reason: Why, in words, for the server's log.
        held: Version of the model that the node holds; 0: none, so that it gets the whole model next time.
        ticket: That of what was asked.
        lasting: Whether it would refuse a ``Trial`` again, so that it is asked for no other in this run.
    """

    reason: str
    held: int
    ticket: str = ""
    lasting: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        _check(0 <= self.held < 2**32, "held", self.held)


def write(record: Greeting | Introduction | Task | Work | Trial | Score | Refusal) -> RecordDict:
    """Return a message's content with one record."""
    return RecordDict({KEY: ConfigRecord({"kind": type(record).__name__, **vars(record)})})


def read(content: Any, *kinds: type) -> Any:
    """Read the one record of a message's content.

    Args:
        content: A ``RecordDict``.
        *kinds: The classes that are expected.

    Returns:
        An object of one of them.

    Raises:
        RecordError: If it has other records, or fields that are missing, unknown, of another type or out of range.
    """
    records = dict(content)
    record = records.get(KEY)
    if len(records) != 1 or type(record) is not ConfigRecord:
        found = {name: type(one).__name__ for name, one in list(records.items())[:5]}
        raise RecordError(f"The message must have one `ConfigRecord` named {KEY!r} and nothing else; it has {found}.")
    values: dict[str, Any] = dict(record)
    named = values.pop("kind", None)
    kind = next((one for one in kinds if one.__name__ == named), None)
    if kind is None:
        raise RecordError(f"The record is a {named!r}; expected {', '.join(one.__name__ for one in kinds)}.")
    if values.get("version") != VERSION:
        raise RecordError(
            f"The record has version {values.get('version')!r}, this end has {VERSION}: install the same version of"
            " lightning_lbgm at both ends."
        )
    wanted = {one.name: str(one.type) for one in fields(kind)}
    if values.keys() != wanted.keys():
        raise RecordError(f"The record {named} has the fields {sorted(values)}, not {sorted(wanted)}.")
    for name, annotation in wanted.items():
        _check(_fits(values[name], annotation), name, f"a {type(values[name]).__name__}, not {annotation}")
    return kind(**values)


def _fits(value: Any, annotation: str) -> bool:
    inner = annotation.removeprefix("list[").removesuffix("]")
    if inner != annotation:
        return isinstance(value, list) and all(type(item) is _KINDS[inner] for item in value)
    return type(value) is _KINDS[annotation]


def _check(fits: bool, name: str, found: Any) -> None:
    if not fits:
        raise RecordError(f"The record's field {name!r} is out of range: {found}.")
