"""Client state store on disk: files, mapped into memory for a client's turn, if memory cannot hold all clients.

A state is made of built-ins and tensors. Each tensor has a file of its own, written once and never changed, so that a
client's turn writes only what is new, and a checkpoint is made of links.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.compression.context import State
from lightning_lbgm.core.nested import map_leaves

__all__ = [
    "ClientFiles",
    "checkpoint_folder",
    "in_memory",
    "is_index",
    "locate",
    "open_client_states",
    "prune",
    "read_index",
    "remove_clients",
]

_FILE = "tensor_file"
_Origin = tuple["weakref.ref[Tensor]", int, dict[str, Any]]  # the tensor, its version when read, and its file's entry


class ClientFiles(MutableMapping[int, State]):
    """Map client to state, on disk.

    ``files[client_id]`` returns a state whose tensors are mapped: they are read where they are used, and what is
    written to them stays in memory until the state is put back with ``files[client_id] = state``. In memory is only
    what a state has besides tensors, some hundred bytes.

    Args:
        directory: Made if it is missing. The files lie in a fresh sub-folder, which is removed with this object or
            at the end of the process.
        device: Device of the tensors returned. Elsewhere than on the CPU they are copies.
    """

    def __init__(self, directory: str, device: torch.device) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="clients-", dir=directory))
        self._device = device
        self._token, self._count = uuid.uuid4().hex, 0
        self._skeletons: dict[int, bytes] = {}
        self._read: tuple[int, list[_Origin]] | None = None  # what was handed out last, to know again what comes back
        weakref.finalize(self, _remove, self.folder, os.getpid())

    def __getitem__(self, client_id: int) -> State:
        skeleton = pickle.loads(self._skeletons[client_id])
        origins: list[_Origin] = []

        def read(entry: dict[str, Any]) -> Tensor:
            tensor = _map_file(self.folder, entry).to(self._device)
            origins.append((weakref.ref(tensor), tensor._version, entry))
            return tensor

        state: State = _from_skeleton(skeleton, read)
        self._read = (client_id, origins)
        return state

    def __setitem__(self, client_id: int, state: State) -> None:
        before = self._files_of(client_id)
        origins = self._read[1] if self._read is not None and self._read[0] == client_id else []
        known = {id(tensor): origin for origin in origins if (tensor := origin[0]()) is not None}
        self._read = None

        def write(tensor: Tensor) -> dict[str, Any]:
            origin = known.get(id(tensor))
            if origin is not None and origin[1] == tensor._version:
                return origin[2]
            return self._write(tensor)

        skeleton = map_leaves(state, lambda leaf: write(leaf) if isinstance(leaf, Tensor) else leaf)
        self._skeletons[client_id] = pickle.dumps(skeleton)
        self._delete(before - set(_files_in(skeleton)))

    def __delitem__(self, client_id: int) -> None:
        files = self._files_of(client_id)
        del self._skeletons[client_id]
        self._read = None
        self._delete(files)

    def __iter__(self) -> Iterator[int]:
        return iter(self._skeletons)

    def __len__(self) -> int:
        return len(self._skeletons)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._skeletons

    def snapshot(self, folder: Path, instead: Mapping[int, State | None] | None = None) -> dict[str, Any]:
        """Link the files into a checkpoint's folder, beside what it holds.

        Args:
            folder: The folder, made if it is missing.
            instead: States to save in the place of what these clients have here; None: such a client is left out.

        Returns:
            The index, made of built-ins, for ``restore`` or ``read_index``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        clients: dict[int, Any] = {}
        instead = instead or {}
        for client_id, packed in self._skeletons.items():
            if client_id not in instead:
                clients[client_id] = pickle.loads(packed)
                for name in _files_in(clients[client_id]):
                    _link(self.folder / name, folder / name)
        for client_id, state in instead.items():
            if state is not None:
                skeleton = map_leaves(state, lambda leaf: self._write(leaf) if isinstance(leaf, Tensor) else leaf)
                for name in _files_in(skeleton):
                    _link(self.folder / name, folder / name)
                self._delete(set(_files_in(skeleton)))
                clients[client_id] = skeleton
        return {"folder": str(folder), "skeletons": clients}

    def restore(self, index: dict[str, Any]) -> None:
        """Take over the states of a ``snapshot``, in the place of all that is here."""
        self.clear()
        for client_id, skeleton in index["skeletons"].items():
            for name in _files_in(skeleton):
                _link(Path(index["folder"]) / name, self.folder / name)
            self._skeletons[client_id] = pickle.dumps(skeleton)

    def _files_of(self, client_id: int) -> set[str]:
        packed = self._skeletons.get(client_id)
        return set() if packed is None else set(_files_in(pickle.loads(packed)))

    def _write(self, tensor: Tensor) -> dict[str, Any]:
        entry: dict[str, Any] = {
            _FILE: "",
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        if tensor.numel():
            entry[_FILE] = f"{self._token}-{self._count}"
            self._count += 1
            path = self.folder / entry[_FILE]
            unfinished = path.with_suffix(".part")
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            values.numpy().tofile(unfinished)
            unfinished.rename(path)
        return entry

    def _delete(self, names: set[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def open_client_states(store: str, device: torch.device) -> MutableMapping[int, State]:
    """Return a mapping from client to state: a dict for ``"memory"``, else files in that directory."""
    return {} if store == "memory" else ClientFiles(store, device)


def checkpoint_folder(checkpoint_path: Any) -> Path | None:
    """Return the folder of clients' files that belongs to a checkpoint; None if that is on no local disk."""
    path = os.fspath(checkpoint_path)
    return None if "://" in path else Path(f"{path}.clients")


def is_index(clients: dict[Any, Any]) -> bool:
    """Whether a checkpoint's clients lie in a folder beside it, and not in it."""
    return "skeletons" in clients


def locate(federation: dict[str, Any] | None, checkpoint_path: Any) -> None:
    """Note in a federation's state that was read from a checkpoint where its clients' files are now.

    Raises:
        FileNotFoundError: If they are not beside the checkpoint.
    """
    if federation is None or not is_index(federation["clients"]):
        return
    index = federation["clients"]
    folder = checkpoint_folder(os.path.realpath(checkpoint_path))
    missing = [name for name in _names(index) if not (Path(str(folder)) / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the clients' files of the checkpoint {os.fspath(checkpoint_path)!r} are not in"
            f" '{folder}': with `LBGMFederated(client_store=...)` move that folder along with the checkpoint."
        )
    index["folder"] = str(folder)


def read_index(index: dict[str, Any]) -> dict[int, State]:
    """Read the states of a ``snapshot`` into memory."""
    folder = Path(index["folder"])
    return {
        client_id: _from_skeleton(skeleton, lambda entry: _map_file(folder, entry).clone())
        for client_id, skeleton in index["skeletons"].items()
    }


def in_memory(federation: dict[str, Any]) -> dict[str, Any]:
    """Return a federation's state with its clients in it, not in a folder beside it."""
    clients = federation["clients"]
    return {**federation, "clients": read_index(clients)} if is_index(clients) else federation


def prune(federation: dict[str, Any]) -> None:
    """Delete from a checkpoint's folder, once it is written, what belonged to one of the same name before it."""
    index = federation["clients"]
    if is_index(index):
        needed = _names(index)
        for path in Path(index["folder"]).iterdir():
            if path.name not in needed:
                path.unlink()


def remove_clients(checkpoint_path: Any) -> None:
    """Delete a checkpoint's folder of clients, if it has one."""
    folder = checkpoint_folder(checkpoint_path)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _names(index: dict[str, Any]) -> set[str]:
    return {name for skeleton in index["skeletons"].values() for name in _files_in(skeleton)}


def _from_skeleton(value: Any, read: Any) -> Any:
    if isinstance(value, dict):
        return read(value) if _FILE in value else {key: _from_skeleton(item, read) for key, item in value.items()}
    return [_from_skeleton(item, read) for item in value] if isinstance(value, list) else value


def _files_in(skeleton: Any) -> Iterator[str]:
    if isinstance(skeleton, dict) and _FILE in skeleton:
        name = skeleton[_FILE]
        if Path(name).name != name:  # a checkpoint from elsewhere reaches nothing beyond its folder
            raise ValueError(f"The checkpoint names a file {name!r} outside its folder of clients: it is damaged.")
        if name:
            yield name
    elif isinstance(skeleton, (dict, list)):
        for item in skeleton.values() if isinstance(skeleton, dict) else skeleton:
            yield from _files_in(item)


def _map_file(folder: Path, entry: dict[str, Any]) -> Tensor:
    """Map a file: its pages are read when they are used, and writing to them does not reach the file."""
    dtype = getattr(torch, entry["dtype"])
    if not entry[_FILE]:
        return torch.empty(entry["shape"], dtype=dtype)
    size = 1
    for length in entry["shape"]:
        size *= length
    path = str(folder / entry[_FILE])
    return torch.from_file(path, shared=False, size=size, dtype=dtype).view(entry["shape"])


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        unfinished = target.with_suffix(".part")
        shutil.copyfile(source, unfinished)
        unfinished.rename(target)


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked worker of a DataLoader owns nothing
        shutil.rmtree(folder, ignore_errors=True)
