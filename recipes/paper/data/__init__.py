"""The paper's data sets, and stand-ins for those that cannot be had freely, as LightningDataModules."""

from recipes.paper.data.classification import CIFAR10, CIFAR100, MNIST, FashionMNIST
from recipes.paper.data.landmarks import CelebALandmarks, FaceLandmarks
from recipes.paper.data.segmentation import COCOSegmentation, VOCSegmentation

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "COCOSegmentation",
    "CelebALandmarks",
    "FaceLandmarks",
    "FashionMNIST",
    "VOCSegmentation",
]
