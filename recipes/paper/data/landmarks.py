"""Points on faces, to be found by regression: CelebA, and a small set of faces with a client for each person."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import datasets

from recipes.paper.data.base import PaperData
from recipes.paper.data.pictures import decode_all, picture_transform, read_mosaic
from recipes.paper.data.subset import draw_subset

__all__ = ["CelebALandmarks", "FaceLandmarks"]


class _Faces(PaperData):
    """What the sets of faces share: the training set is one part for each person."""

    size: int
    num_persons: int | None

    @property
    def num_clients(self) -> int:
        """Persons in the training set, once it is loaded: ``num_clients`` for ``NaturalPartitioner()``."""
        assert isinstance(self.train, ConcatDataset), "call `setup` first"
        return len(self.train.datasets)

    def choose(self, persons: Tensor, train: bool) -> Tensor:
        """Return the indices of the examples wanted; of the training set ordered by person.

        Args:
            persons: Number of each example's person, ``int64`` of the shape ``(n,)``.
            train: Whether it is the training set.
        """
        if not train:
            return self.wanted(len(persons), train)
        numbers = persons.unique()
        kept = numbers[draw_subset(len(numbers), self.num_persons, name="num_persons")]
        candidates = torch.isin(persons, kept).nonzero().squeeze(1)
        chosen = candidates[self.wanted(len(candidates), train, persons[candidates])]
        return chosen[persons[chosen].argsort(stable=True)]


def _by_person(faces: Dataset[Any], persons: Tensor) -> ConcatDataset[Any]:
    """Cut a data set that is ordered by person into a part for each."""
    sizes = persons.unique_consecutive(return_counts=True)[1]
    parts = torch.arange(len(persons)).split(sizes.tolist())
    return ConcatDataset([Subset(faces, part.tolist()) for part in parts])


class CelebALandmarks(_Faces):
    """CelebA's five landmarks (Liu et al., ICCV 2015): 162,770 faces to train on, 19,867 to validate on.

    An item is ``(x, y)``: x ``float32`` of the shape ``(3, size, size)``, normalised; y ``float32`` of the shape
    ``(10,)``, the x and y of the left eye, the right eye, the nose and the left and right end of the mouth (as seen in
    the picture), in pixels of the resized picture. The files' pictures are 178 wide and 218 high; an error in their
    pixels, which the paper's authors train on, is ``178 / size`` and ``218 / size`` times as large.

    The training set is a ``ConcatDataset`` of one part for each person, so ``NaturalPartitioner()`` makes a client of
    each; the other partitioners see one data set.

    The files lie in ``root/celeba``: the folder ``img_align_celeba`` and the lists that torchvision names. Pictures are
    decoded when asked for, as all of them in memory would take 8 GB. Means and deviations are those that the paper's
    authors publish with their code.

    Args:
        root: Folder that holds the data set. None: the environment variable ``LBGM_DATA``, else ``data``. It is never
            written to.
        batch_size: Size of the local batches; at least a client's examples means full-batch steps.
        val_batch_size: Size of the validation batches.
        num_train: Use only so many training examples: always the same, drawn at random with each person's share kept.
            None: all. A person whose share rounds to nothing is no client.
        num_val: Use only so many validation examples, drawn at random.
        num_persons: Train on the pictures of only so many persons, drawn at random. None: all of them.
        size: Width and height to resize to.
        in_memory: Whether to decode all pictures once, at the start.
        num_workers: Processes that decode pictures.
        download: Whether to download into ``cache`` what is missing.
        cache: Folder to download into.
    """

    source: ClassVar[Any] = datasets.CelebA
    title = "CelebA"
    place = "celeba"
    files = (
        "img_align_celeba.zip, unpacked into the folder img_align_celeba, and list_attr_celeba.txt,"
        " identity_CelebA.txt, list_bbox_celeba.txt, list_landmarks_align_celeba.txt and list_eval_partition.txt"
    )
    page = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    download_needs = ", if the package gdown is installed and Google Drive's quota is not used up"
    mean, std = (0.5063, 0.4258, 0.3832), (0.3106, 0.2904, 0.2897)

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 60000,
        val_batch_size: int = 500,
        num_train: int | None = None,
        num_val: int | None = None,
        num_persons: int | None = None,
        size: int = 64,
        in_memory: bool = False,
        num_workers: int = 0,
        download: bool = False,
        cache: str = "~/.cache/lightning_lbgm",
    ) -> None:
        super().__init__(root, batch_size, val_batch_size, num_train, num_val, size, num_workers, download, cache)
        self.num_persons = num_persons
        self.in_memory = in_memory

    @property
    def num_outputs(self) -> int:
        return 10

    def fetch(self, folder: Path) -> None:
        self.source(str(folder), download=True)

    def is_there(self, folder: Path) -> bool:
        names = [name for *_, name in self.source.file_list if not name.endswith(".zip")]
        lists = all((folder / self.place / name).is_file() for name in names)
        return lists and (folder / self.place / "img_align_celeba").is_dir()

    def load(self, folder: Path, train: bool) -> Dataset[Any]:
        pictures = self.source(
            str(folder),
            split="train" if train else "valid",
            target_type="landmarks",
            transform=picture_transform(self.size, self.mean, self.std),
            target_transform=partial(torch.mul, torch.tensor([self.size / 178, self.size / 218] * 5)),
        )
        persons = pictures.identity.squeeze(1)
        chosen = self.choose(persons, train)
        faces: Dataset[Any] = Subset(pictures, chosen.tolist())
        if self.in_memory:
            faces = decode_all(faces)
        return _by_person(faces, persons[chosen]) if train else faces


class FaceLandmarks(_Faces):
    """Landmarks of faces from YouTube Faces (Wolf et al., CVPR 2011), which stand in for CelebA: 347 persons.

    An item is ``(x, y)``: x ``float32`` of the shape ``(3, size, size)``, normalised; y ``float32`` of the shape
    ``(2 * num_points,)``, the x and y of each point in pixels of the resized picture. A few points lie outside it.

    The training set, 3,462 faces, is a ``ConcatDataset`` of one part for each person (at least 9 faces), so
    ``NaturalPartitioner()`` with ``num_clients=347`` makes a client of each. 770 faces of the same persons validate.

    The files lie in ``root/face_landmarks``: ``train.jpg`` and ``test.jpg``, faces of 64 x 64 side by side, row by row,
    and ``landmarks.npz`` with ``train_points`` (n, 68, 2), in pixels, and ``train_person`` (n,), and the same of
    ``test``. Mean and deviation are those of the training pixels, measured here.

    Args:
        root: Folder that holds the data set. None: the environment variable ``LBGM_DATA``, else ``data``. It is never
            written to.
        batch_size: Size of the local batches; at least a client's examples means full-batch steps.
        val_batch_size: Size of the validation batches.
        num_train: Use only so many training examples: always the same, drawn at random with each person's share kept.
            None: all. A person whose share rounds to nothing is no client.
        num_val: Use only so many validation examples, drawn at random.
        num_persons: Train on the pictures of only so many persons, drawn at random. None: all of them.
        num_points: 5: CelebA's landmarks, in its order. 68: all of them.
        size: Width and height to resize to.
    """

    title = "The set of faces"
    place = "face_landmarks"
    files = (
        "train.jpg and test.jpg (faces of 64 x 64 side by side, row by row) and landmarks.npz (train_points,"
        " train_person, test_points, test_person), made of the data"
    )
    page = "https://github.com/udacity/P1_Facial_Keypoints (for the paper's own set use CelebALandmarks)"
    mean, std = (0.4050, 0.3416, 0.3098), (0.2711, 0.2424, 0.2445)

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 60000,
        val_batch_size: int = 500,
        num_train: int | None = None,
        num_val: int | None = None,
        num_persons: int | None = None,
        num_points: int = 5,
        size: int = 64,
    ) -> None:
        super().__init__(root, batch_size, val_batch_size, num_train, num_val, size)
        if num_points not in (5, 68):
            raise ValueError(f"`num_points={num_points}` must be 5 (CelebA's landmarks) or 68 (all of them).")
        self.num_persons = num_persons
        self.num_points = num_points

    @property
    def num_outputs(self) -> int:
        return 2 * self.num_points

    def is_there(self, folder: Path) -> bool:
        return all((folder / self.place / name).is_file() for name in ("train.jpg", "test.jpg", "landmarks.npz"))

    def load(self, folder: Path, train: bool) -> Dataset[Any]:
        part = "train" if train else "test"
        with np.load(folder / self.place / "landmarks.npz") as file:
            points = torch.from_numpy(file[f"{part}_points"])
            persons = torch.from_numpy(file[f"{part}_person"]).long()
        if self.num_points == 5:
            points = _celeba_points(points)
        pictures = read_mosaic(folder / self.place / f"{part}.jpg", 64)
        chosen = self.choose(persons, train)
        x = picture_transform(self.size, self.mean, self.std)(pictures[chosen])
        faces = TensorDataset(x, points[chosen].flatten(1) * (self.size / 64))
        return _by_person(faces, persons[chosen]) if train else faces


def _celeba_points(points: Tensor) -> Tensor:
    """Reduce the 68 points of the iBUG scheme, ``(n, 68, 2)``, to CelebA's five, ``(n, 5, 2)``: eyes, nose, mouth."""
    eyes = [points[:, 36:42].mean(1), points[:, 42:48].mean(1)]
    return torch.stack([*eyes, points[:, 30], points[:, 48], points[:, 54]], 1)
