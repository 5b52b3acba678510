"""The paper's data sets as LightningDataModules, and stand-ins for those that are not free to be had."""

from recipes.paper.data.classification import CIFAR10, CIFAR100, MNIST, FashionMNIST

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"]
