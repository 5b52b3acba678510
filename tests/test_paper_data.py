"""The paper's data modules, on tiny folders in the official layouts and on the real data where it is there."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import pickle
import threading
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from conftest import TinyModule
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import ConcatDataset, TensorDataset
from torchvision import datasets

from lightning_lbgm import IIDPartitioner, NaturalPartitioner, PathologicalPartitioner
from lightning_lbgm.data.bulk import bulk_reader
from lightning_lbgm.data.labels import find_labels
from lightning_lbgm.data.partitioners import make_partitions
from recipes.paper.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    CelebALandmarks,
    COCOSegmentation,
    FaceLandmarks,
    FashionMNIST,
    VOCSegmentation,
)
from recipes.paper.data.subset import draw_subset

ROOT = Path(__file__).parent.parent


# Tiny folders in the official layouts. Torchvision checks the md5 of CIFAR's and CelebA's files: subclasses without
# them read the tiny ones, by the same code otherwise.


class SmallCIFAR10(datasets.CIFAR10):
    train_list: ClassVar = [[f"data_batch_{i}", None] for i in range(1, 6)]
    test_list: ClassVar = [["test_batch", None]]
    meta: ClassVar = {**datasets.CIFAR10.meta, "md5": None}


class SmallCIFAR100(datasets.CIFAR100):
    train_list: ClassVar = [["train", None]]
    test_list: ClassVar = [["test", None]]
    meta: ClassVar = {**datasets.CIFAR100.meta, "md5": None}


class SmallCelebA(datasets.CelebA):
    file_list: ClassVar = [(source, None, name) for source, _, name in datasets.CelebA.file_list]


class TinyCIFAR10(CIFAR10):
    source = SmallCIFAR10


class TinyCIFAR100(CIFAR100):
    source = SmallCIFAR100


class TinyCelebA(CelebALandmarks):
    source = SmallCelebA


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, values, packed):
    raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        Path(f"{path}.gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


def make_mnist(root, place="MNIST/raw", packed=True):
    for part, n in (("train", 30), ("t10k", 10)):
        write_idx(root / place / f"{part}-images-idx3-ubyte", pixels(n, 28, 28), packed)
        write_idx(root / place / f"{part}-labels-idx1-ubyte", np.arange(n) % 10, packed)


def make_fashion(root):
    make_mnist(root, "FashionMNIST/raw", packed=False)


def make_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        batch = {"data": pixels(4, 3072, seed=seed), "labels": [seed, 9, 8, 7]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels(10, 3072), "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def make_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, n in (("train", 20), ("test", 10)):
        batch = {"data": pixels(n, 3072), "fine_labels": list(range(90, 100)) * (n // 10), "coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))


def make_mosaic(root):
    """Two mosaics of 2 x 3 images to train on, one to validate on, each image in a grey of its own."""
    folder = root / "cifar10"
    folder.mkdir()
    for first, name in ((0, "data_batch_1"), (6, "data_batch_2"), (12, "test_batch")):
        greys = (10 * np.arange(first, first + 6, dtype=np.uint8)).reshape(2, 3)
        mosaic = np.repeat(np.repeat(greys, 32, 0), 32, 1)
        Image.fromarray(np.stack([mosaic, mosaic + 1, mosaic + 2], 2)).save(folder / f"{name}.webp", lossless=True)
    labels = {"data_batch_1": [5, 4, 3, 2, 1, 0], "data_batch_2": [9] * 6, "data_batch_3": [7], "test_batch": [8] * 6}
    np.savez(folder / "labels.npz", **{name: np.array(values, np.uint8) for name, values in labels.items()})


def make_celeba(root):
    """Eight faces: six of three persons to train on, two to validate on; face i has its left eye at (89 + i, 109)."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 9)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (20 * i, 100, 200)).save(folder / "img_align_celeba" / name, quality=95)

    def write(name, values, header=None):
        lines = [] if header is None else [str(len(values)), header]
        lines += [f"{name} {' '.join(map(str, row))}" for name, row in zip(names, values)]
        (folder / name).write_text("\n".join(lines) + "\n")

    points = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
    write("list_eval_partition.txt", [[0]] * 6 + [[1]] * 2)
    write("identity_CelebA.txt", [[40], [7], [40], [1000], [7], [40], [3], [3]])
    write("list_bbox_celeba.txt", [[0, 0, 10, 10]] * 8, "x_1 y_1 width height")
    write("list_landmarks_align_celeba.txt", [[89 + i, 109] + [0, 0, 178, 218] * 2 for i in range(8)], points)
    write("list_attr_celeba.txt", [[1, -1]] * 8, "Smiling Young")


def make_voc(root):
    """Images with a person's rectangle of an odd width, its border not to be counted."""
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for part, n in (("train", 4), ("val", 3)):
        names = [f"{part}_{i}" for i in range(n)]
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            Image.fromarray(pixels(50, 75, 3, seed=i)).save(folder / "JPEGImages" / f"{name}.jpg")
            classes = np.zeros((50, 75), np.uint8)
            classes[10:40, 11:60] = 255
            classes[14:36, 15:56] = 15 + i
            mask = Image.fromarray(classes).convert("P")
            mask.putpalette([255 - value // 3 for value in range(768)])
            mask.putdata(classes.ravel().tolist())
            mask.save(folder / "SegmentationClass" / f"{name}.png")


def make_faces(root):
    """Five faces of three persons to train on, two to validate on, side by side in rows of two, each of one grey."""
    folder = root / "face_landmarks"
    folder.mkdir()
    arrays = {"names": np.array(["a", "b", "c"])}
    for part, persons in (("train", [0, 0, 1, 2, 2]), ("test", [1, 2])):
        n = len(persons)
        greys = np.zeros(2 * ((n + 1) // 2), np.uint8)
        greys[:n] = 40 * np.arange(n)
        mosaic = np.repeat(np.repeat(greys.reshape(-1, 2), 64, 0), 64, 1)
        Image.fromarray(np.stack([mosaic] * 3, 2)).save(folder / f"{part}.jpg", quality=100, subsampling=0)
        points = np.stack([np.stack([np.arange(68.0), 100 * i + np.arange(68.0)], 1) for i in range(n)])
        arrays |= {f"{part}_points": points.astype(np.float32), f"{part}_person": np.array(persons, np.int16)}
    np.savez(folder / "landmarks.npz", **arrays)


def make_coco(root):
    for part, n in (("train", 3), ("val", 2)):
        for name in ("images", "masks"):
            (root / "coco_seg" / part / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(pixels(60, 80, 3, seed=i)).save(root / "coco_seg" / part / "images" / f"{i:012}.jpg")
            ids = np.full((60, 80), 187, np.uint8)  # sky, none of VOC's classes
            ids[:20], ids[20:40] = 1, 72  # persons, above a tvmonitor
            Image.fromarray(ids).save(root / "coco_seg" / part / "masks" / f"{i:012}.png")


CASES = {
    "MNIST": (MNIST, make_mnist),
    "FashionMNIST": (FashionMNIST, make_fashion),
    "CIFAR10": (TinyCIFAR10, make_cifar10),
    "CIFAR10 as mosaics": (CIFAR10, make_mosaic),
    "CIFAR100": (TinyCIFAR100, make_cifar100),
    "CelebALandmarks": (TinyCelebA, make_celeba),
    "FaceLandmarks": (FaceLandmarks, make_faces),
    "VOCSegmentation": (VOCSegmentation, make_voc),
    "COCOSegmentation": (COCOSegmentation, make_coco),
}
CLASSIFICATION = ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR10 as mosaics", "CIFAR100"]


def load(data, *stages):
    data.prepare_data()
    for stage in stages or ("fit",):
        data.setup(stage)
    return data


def make(name, folder, **init_args):
    module, write = CASES[name]
    if not folder.exists():
        folder.mkdir()
        write(folder)
    return load(module(root=str(folder), **init_args))


@pytest.fixture
def tiny(tmp_path):
    return lambda name, **init_args: make(name, tmp_path / "root", **init_args)


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))


# What all of them share


@pytest.mark.parametrize("name", CASES)
def test_batches_have_the_stated_shapes_and_nothing_is_written_to_root(name, tmp_path, monkeypatch):
    module, write = CASES[name]
    root = tmp_path / "root"
    root.mkdir()
    write(root)
    before = listing(tmp_path)
    monkeypatch.setenv("LBGM_DATA", str(root))
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load(module(batch_size=3, val_batch_size=2))
    (x, y), (val_x, val_y) = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert listing(tmp_path) == before
    size = {"MNIST": 28, "FashionMNIST": 28, "VOCSegmentation": 128, "COCOSegmentation": 128}.get(name, 32)
    size = 64 if "Landmarks" in name else size
    assert (x.dtype, x.shape, val_x.shape) == (
        torch.float32,
        (3, data.in_channels, size, size),
        (2, data.in_channels, size, size),
    )
    assert y.dtype == val_y.dtype == (torch.float32 if "Landmarks" in name else torch.int64)
    per_item = (data.num_outputs,) if "Landmarks" in name else (size, size) if "Segmentation" in name else ()
    assert (y.shape, val_y.shape) == ((3, *per_item), (2, *per_item))
    assert pickle.dumps((data.train, data.val))  # for workers that are spawned


@pytest.mark.parametrize("name", CASES)
def test_what_to_do_where_the_files_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # nothing downloaded before
    module, _ = CASES[name]
    missing = tmp_path / "nowhere"
    data = module(root=str(missing))
    with pytest.raises(FileNotFoundError) as error:
        data.prepare_data()
    message = str(error.value)
    assert str(missing / data.place) in message
    for words in (data.page, "http", "`root`", "`LBGM_DATA`"):
        assert words in message
    if name in ("FaceLandmarks", "COCOSegmentation"):
        assert message.endswith("It cannot be downloaded by itself.")
        assert "for the paper's own set use" in message
    else:
        assert "`download=true`, which fetches it into" in message
    with pytest.raises(FileNotFoundError, match="is not in"):
        data.setup("fit")
    assert not missing.exists()


@pytest.mark.parametrize("name", CASES)
def test_fewer_examples_are_the_same_ones_each_time(name, tiny):
    def examples(dataset):
        pairs = (dataset[i] for i in range(len(dataset)))
        return torch.stack([torch.stack([x.mean(), y.float().mean()]) for x, y in pairs])

    whole, first, second = tiny(name), tiny(name, num_train=3, num_val=2), tiny(name, num_train=3, num_val=2)
    assert (len(first.train), len(first.val)) == (3, 2)
    assert torch.equal(examples(first.train), examples(second.train))
    assert torch.equal(examples(first.val), examples(second.val))
    assert (examples(first.train)[:, None] == examples(whole.train)).all(2).any(1).all()
    with pytest.raises(ValueError, match=r"`num_train=1000` must lie between 1 and the \d+ examples"):
        tiny(name, num_train=1000)
    with pytest.raises(ValueError, match="`num_val=0` must lie"):
        tiny(name, num_val=0)


def test_what_is_loaded_is_kept_for_further_stages(tiny):
    data = tiny("MNIST")
    train = data.train
    data.setup("validate")
    assert data.train is train


def mnist_from(port):
    """MNIST by torchvision's own download, from this machine; it takes the folder's name from the class."""
    resources = [(name, None) for name, _ in datasets.MNIST.resources]
    local = type("MNIST", (datasets.MNIST,), {"mirrors": [f"http://127.0.0.1:{port}/"], "resources": resources})
    return type("LocalMNIST", (MNIST,), {"source": local})


@pytest.mark.parametrize("packed", [True, False])
def test_a_download_goes_into_the_cache_and_is_found_there(packed, tmp_path):
    server, root, cache = tmp_path / "server", tmp_path / "root", tmp_path / "cache"
    make_mnist(server)
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(server / "MNIST" / "raw"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        data = load(mnist_from(httpd.server_port)(root=str(root), cache=str(cache), download=True))
        httpd.shutdown()
    assert len(data.train) == 30
    assert not list(root.iterdir())
    if packed:  # torchvision leaves both; either is enough
        for path in (cache / "MNIST" / "raw").glob("*ubyte"):
            path.unlink()
    again = load(MNIST(root=str(root), cache=str(cache)))
    assert torch.equal(again.train.tensors[0], data.train.tensors[0])


def test_the_root_is_the_argument_else_the_environment_variable_else_data(monkeypatch):
    monkeypatch.delenv("LBGM_DATA", raising=False)
    assert MNIST().root == Path("data")
    monkeypatch.setenv("LBGM_DATA", "/somewhere")
    assert (MNIST().root, MNIST(root="~/here").root) == (Path("/somewhere"), Path("~/here").expanduser())


# Classification


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classes_are_found_and_batches_drawn_in_bulk(name, tiny):
    data = tiny(name)
    assert type(data.train) is TensorDataset
    assert bulk_reader(data.train) is not None
    classes = data.train.tensors[1]
    assert 0 <= classes.min() <= classes.max() < data.num_classes == data.num_outputs
    assert torch.equal(find_labels(data.train), torch.unique(classes, return_inverse=True)[1])


def test_three_classes_a_client(tiny):
    data = tiny("MNIST")
    parts = make_partitions(data.train, 5, PathologicalPartitioner(3), seed=0)
    assert [len(data.train.tensors[1][part].unique()) for part in parts] == [3] * 5


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_normalised_packed_or_not(packed, tmp_path):
    make_mnist(tmp_path, packed=packed)
    data = load(MNIST(root=str(tmp_path)))
    expected = (torch.tensor(pixels(30, 28, 28)) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(data.train.tensors[0], expected.unsqueeze(1))
    assert data.train.tensors[1].tolist() == [i % 10 for i in range(30)]


def test_cifar_keeps_order_channels_and_classes(tiny):
    data = tiny("CIFAR10")
    raw = np.concatenate([pixels(4, 3072, seed=seed) for seed in range(5)]).reshape(20, 3, 32, 32)  # planes by colour
    mean, std = np.array(data.mean).reshape(3, 1, 1), np.array(data.std).reshape(3, 1, 1)
    expected = torch.tensor((raw / 255 - mean) / std, dtype=torch.float32)
    torch.testing.assert_close(data.train.tensors[0], expected)
    assert data.train.tensors[1].tolist() == [c for first in range(5) for c in (first, 9, 8, 7)]


def test_a_mosaic_is_read_row_by_row_and_said_to_be_a_subset(tiny, caplog):
    with caplog.at_level("INFO"):
        data = tiny("CIFAR10 as mosaics")
    assert caplog.text.count("a subset of 12 of the 50,000 training images") == 1
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    x, y = data.train.tensors
    raw = (x * std + mean) * 255
    expected = 10 * torch.arange(12.0).view(12, 1, 1, 1) + torch.arange(3.0).view(1, 3, 1, 1)
    torch.testing.assert_close(raw, expected.expand(12, 3, 32, 32), atol=1e-3, rtol=0)
    assert y.tolist() == [5, 4, 3, 2, 1, 0] + [9] * 6
    assert data.val.tensors[1].tolist() == [8] * 6


def test_the_official_files_of_cifar10_go_before_mosaics(tmp_path):
    make_cifar10(tmp_path)
    make_mosaic(tmp_path)
    assert len(load(TinyCIFAR10(root=str(tmp_path))).train) == 20


def test_images_are_resized(tiny):
    assert tiny("CIFAR10 as mosaics", size=24).train.tensors[0].shape == (12, 3, 24, 24)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.data())
def test_a_subset_keeps_each_classs_share(classes, draw):
    n = len(classes)
    strata, wanted = torch.tensor(classes), draw.draw(st.integers(1, n))
    chosen = draw_subset(n, wanted, strata)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == wanted
    exact = strata.bincount() * wanted / n
    assert ((strata[chosen].bincount(minlength=len(exact)) - exact).abs() < 1).all()
    assert torch.equal(chosen, draw_subset(n, wanted, strata))
    plain = draw_subset(n, wanted)
    assert plain.tolist() == sorted(set(plain.tolist()))
    assert len(plain) == wanted


# Landmarks


@pytest.mark.parametrize("in_memory", [False, True])
def test_celebas_points_are_pixels_of_the_resized_picture(in_memory, tiny):
    data = tiny("CelebALandmarks", size=32, in_memory=in_memory)
    assert (data.num_clients, len(data.train), len(data.val), data.num_outputs) == (3, 6, 2, 10)
    assert (bulk_reader(data.train) is not None) == in_memory
    x, y = data.train[0]
    # Persons in increasing order: the faces of person 7 are numbers 1 and 4, so its first left eye is at (90, 109).
    expected = torch.tensor([90 * 32 / 178, 16.0] + [0.0, 0.0, 32.0, 32.0] * 2)
    torch.testing.assert_close(y, expected)
    raw = x * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    assert x.shape == (3, 32, 32)
    torch.testing.assert_close(raw[:, 16, 16] * 255, torch.tensor([20.0, 100.0, 200.0]), atol=4, rtol=0)
    torch.testing.assert_close(data.val[0][1][0], torch.tensor(95 * 32 / 178))


@pytest.mark.parametrize("name", ["CelebALandmarks", "FaceLandmarks"])
def test_a_person_is_a_client(name, tiny):
    data = tiny(name)
    assert isinstance(data.train, ConcatDataset)
    sizes = {"CelebALandmarks": [2, 3, 1], "FaceLandmarks": [2, 1, 2]}[name]
    parts = make_partitions(data.train, data.num_clients, NaturalPartitioner(), seed=0)
    assert [len(part) for part in parts] == sizes
    assert sum(len(part) for part in make_partitions(data.train, 2, IIDPartitioner(), seed=0)) == sum(sizes)
    fewer = tiny(name, num_persons=2)
    assert fewer.num_clients == 2
    assert len(fewer.val) == len(data.val)
    with pytest.raises(ValueError, match=r"`num_persons=4` must lie between 1 and the 3"):
        tiny(name, num_persons=4)


def test_faces_are_cut_from_their_rows_and_keep_their_points(tiny):
    data = tiny("FaceLandmarks", num_points=68, size=32)
    x, y = (torch.stack(column) for column in zip(*data.train))
    greys = (x * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)) * 255
    expected = (40.0 * torch.arange(5)).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    torch.testing.assert_close(greys, expected, atol=2, rtol=0)
    at = torch.arange(68.0)
    points = torch.stack([torch.stack([at, 100 * i + at], 1) for i in range(5)]) / 2  # from 64 pixels to 32
    torch.testing.assert_close(y, points.flatten(1))


def test_celebas_five_of_the_68_points(tiny):
    data = tiny("FaceLandmarks")
    # The means of 36 to 41 and of 42 to 47, then 30, 48 and 54; y is 100 more for the next face.
    first = torch.tensor([38.5, 38.5, 44.5, 44.5, 30, 30, 48, 48, 54, 54])
    assert data.num_outputs == 10
    torch.testing.assert_close(data.train[0][1], first)
    torch.testing.assert_close(data.train[1][1], first + torch.tensor([0.0, 100.0] * 5))
    with pytest.raises(ValueError, match="`num_points=7` must be 5"):
        FaceLandmarks(num_points=7)


# Segmentation


@pytest.mark.parametrize("in_memory", [False, True])
def test_vocs_masks_keep_their_classes(in_memory, tiny):
    data = tiny("VOCSegmentation", size=32, in_memory=in_memory)
    assert (len(data.train), len(data.val), data.num_classes, data.ignore_index) == (4, 3, 21, 255)
    for i in range(4):
        x, y = data.train[i]
        assert (x.shape, y.shape) == ((3, 32, 32), (32, 32))
        assert y.unique().tolist() == [0, 15 + i, 255]
        # The pixel at the centre of each target pixel: rows 50 / 32 (i + 0.5), columns 75 / 32 (i + 0.5).
        rows, columns = (((torch.arange(32) + 0.5) * n / 32).long() for n in (50, 75))
        inside = ((rows >= 14) & (rows < 36)).unsqueeze(1) & ((columns >= 15) & (columns < 56))
        assert torch.equal(y == 15 + i, inside)


def test_a_files_path_is_not_taken_for_a_class(tiny):
    with pytest.raises(ValueError, match="labels of the training dataset cannot be found"):
        make_partitions(tiny("VOCSegmentation").train, 2, PathologicalPartitioner(1), seed=0)


def test_voc_is_decoded_by_workers(tiny):
    alone, workers = tiny("VOCSegmentation", val_batch_size=3), tiny("VOCSegmentation", val_batch_size=3, num_workers=1)
    for a, b in zip(next(iter(alone.val_dataloader())), next(iter(workers.val_dataloader()))):
        assert torch.equal(a, b)


def test_cocos_categories_become_vocs_classes(tiny):
    data = tiny("COCOSegmentation", size=30)
    _, y = data.train[0]
    expected = torch.zeros(30, 30, dtype=torch.int64)
    expected[:10], expected[10:20] = 15, 20
    assert torch.equal(y, expected)
    assert bulk_reader(data.train) is not None


# In a run


class PointModule(TinyModule):
    def __init__(self) -> None:
        super().__init__(0.0, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)))
        self.net(torch.zeros(1, 3, 16, 16))

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))


def test_a_config_trains_a_client_for_each_person(tmp_path):
    make_faces(tmp_path)
    strategy = {
        "class_path": "lightning_lbgm.LBGMFederated",
        "init_args": {"num_clients": 3, "partitioner": {"class_path": "lightning_lbgm.NaturalPartitioner"}},
    }
    config = {
        "trainer": {
            "strategy": strategy,
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
        "data": {
            "class_path": "recipes.paper.data.FaceLandmarks",
            "init_args": {"root": str(tmp_path), "size": 16},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        PointModule,
        pl.LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=None,
        args=["fit", "--config", str(tmp_path / "config.yaml"), "--data.num_persons=3"],
    )
    assert isinstance(cli.datamodule, FaceLandmarks)
    assert cli.trainer.strategy.round_index == 1
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


# Real data, where it is there


def real(place):
    candidates = [os.environ.get("LBGM_DATA"), ROOT.parent / "shared" / "data", ROOT / "data"]
    folder = next((Path(c) for c in candidates if c and (Path(c) / place).is_dir()), None)
    if folder is None:
        pytest.skip(f"set LBGM_DATA to a folder that holds {place}")
    return str(folder)


@pytest.mark.parametrize(
    ("module", "place", "num_train"),
    [(MNIST, "MNIST/raw", 60_000), (FashionMNIST, "FashionMNIST/raw", 60_000), (CIFAR10, "cifar10", 20_000)],
)
def test_real_images_are_normalised(module, place, num_train):
    data = load(module(root=real(place)))
    x, classes = data.train.tensors
    assert len(x) in (num_train, 50_000)
    assert len(data.val) == 10_000
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(data.in_channels), atol=0.01, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(data.in_channels), atol=0.01, rtol=0)
    assert classes.unique().tolist() == list(range(10))


def test_real_faces_have_a_client_for_each_person():
    data = load(FaceLandmarks(root=real("face_landmarks")))
    assert (data.num_clients, len(data.train), len(data.val)) == (347, 3462, 770)
    parts = make_partitions(data.train, 347, NaturalPartitioner(), seed=0)
    assert min(map(len, parts)) == 9
    x, points = bulk_reader(data.train)(torch.arange(3462))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=0.01, rtol=0)
    left_eye, right_eye, nose, *mouth = points.view(-1, 5, 2).mean(0).unbind()
    assert left_eye[0] < nose[0] < right_eye[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(corner[1] for corner in mouth)


def test_real_masks_hold_vocs_classes():
    data = load(COCOSegmentation(root=real("coco_seg")))
    assert (len(data.train), len(data.val)) == (100, 100)
    present = torch.cat([data.train.tensors[1].unique(), data.val.tensors[1].unique()]).unique()
    assert set(present.tolist()) <= set(range(21))
    # Persons are on half of the images.
    assert 40 <= int((data.train.tensors[1] == 15).flatten(1).any(1).sum()) <= 60
