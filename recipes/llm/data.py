"""Shakespeare's plays by role: a client's text is what one role says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""What a model from a config reads: known before anybody's text is."""


def read_roles(path: Path) -> dict[str, str]:
    """Return what each role says, in the order in which the roles come on.

    Args:
        path: A text whose blocks are parted by a blank line; a block's first line is ``ROLE:``.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}. Get input.txt of karpathy/char-rnn (data/tinyshakespeare, 1.1 MB), put it into a"
            " folder `shakespeare`, and name the folder around that by `--data` or LBGM_DATA."
        )
    roles: dict[str, str] = {}
    for block in path.read_text().split("\n\n"):
        role, _, lines = block.strip().partition(":\n")
        if lines:
            roles[role] = roles.get(role, "") + lines + "\n"
    return roles


def part_roles(roles: Mapping[str, str], num_clients: int, min_characters: int) -> tuple[dict[str, str], str]:
    """Part the roles into clients and a public text: the clients are those of enough text who come on last.

    So the base model has seen other plays than the clients have, in the same language.

    Returns:
        The clients' texts by role, and what all others say.

    Raises:
        ValueError: If there are not so many roles of enough text.
    """
    long = [role for role, text in roles.items() if len(text) >= min_characters]
    if not 0 < num_clients <= len(long):
        raise ValueError(
            f"num_clients={num_clients}: {len(long)} roles have {min_characters} characters or more, so between 1 and"
            " so many can be clients. Lower `min_characters` for more."
        )
    private = set(long[-num_clients:])
    public = "".join(text for role, text in roles.items() if role not in private)
    return {role: roles[role] for role in long[-num_clients:]}, public


class Blocks(Dataset[dict[str, Tensor]]):
    """Tokens cut into blocks, as a causal language model of transformers takes them.

    Args:
        blocks: Tokens, shape ``(n, block_size)``.
    """

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Texts(pl.LightningDataModule):
    """Texts of several owners, with the last part of each held out for validation.

    Args:
        texts: What each owner has written.
        encode: Returns the tokens of a text.
        block_size: Tokens of an example.
        batch_size: Examples of a batch.
        val_fraction: Share of each text that is held out.

    Attributes:
        owners: The owner of each training example, for ``NaturalPartitioner``.
        characters_per_token: Of the validation text, with which losses become perplexities per character.

    Raises:
        ValueError: If an owner has too little text for one training example.
    """

    def __init__(
        self,
        texts: Mapping[str, str],
        encode: Callable[[str], list[int]],
        block_size: int = 64,
        batch_size: int = 8,
        val_fraction: float = 0.15,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.owners: list[str] = []
        self._train: list[Tensor] = []
        self._val: dict[str, Tensor] = {}
        num_characters = num_tokens = 0
        for owner, text in sorted(texts.items()):
            end = len(text) - int(val_fraction * len(text))
            train, val = encode(text[:end]), encode(text[end:])
            if len(train) < block_size:
                raise ValueError(
                    f"{owner!r} has {len(train)} tokens to train with, fewer than block_size={block_size}. Use smaller"
                    " blocks, or clients with more text (`min_characters`)."
                )
            num_characters, num_tokens = num_characters + len(text) - end, num_tokens + len(val)
            self._train.append(_cut(train, block_size))
            self._val[owner] = _cut(val, block_size)
            self.owners += [owner] * len(self._train[-1])
        self.characters_per_token = num_characters / max(1, num_tokens)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Blocks(torch.cat(self._train)), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Blocks(torch.cat(list(self._val.values()))), batch_size=64)

    def val_sets(self) -> dict[int, Blocks]:
        """Return the validation examples of each client that has some, for ``ClientEvaluation(data=...)``."""
        return {client_id: Blocks(val) for client_id, val in enumerate(self._val.values()) if len(val)}


def _cut(tokens: list[int], block_size: int) -> Tensor:
    """Return whole blocks, shape ``(n, block_size)``; what is left over at the end is dropped."""
    count = len(tokens) // block_size
    return torch.tensor(tokens[: count * block_size], dtype=torch.long).view(count, block_size)
