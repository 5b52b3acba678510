"""What docs/results.md shows: which configs are run with which methods, and what the authors' code got.

``AUTHORS`` are the best accuracies in the tables of the authors' published code (github.com/shams-sam/FedOptim,
``src/result_*.txt``): 100 clients, 3 classes each, full-batch steps, 101 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AUTHORS", "EXPERIMENTS", "LABELS", "Experiment"]

_THRESHOLDS = ("0.2", "0.4", "0.6", "0.8")
LAYER = tuple(f"lbgm_layer_{threshold}" for threshold in _THRESHOLDS)
MODEL = tuple(f"lbgm_{threshold}" for threshold in _THRESHOLDS)
COEFFICIENT = tuple(f"coefficient_{threshold}" for threshold in _THRESHOLDS)
STACKED = ("topk", "topk_lbgm", "atomo", "atomo_lbgm", "signsgd", "signsgd_lbgm")

LABELS = {
    "fedavg": "FedAvg",
    "topk": "TopK 0.1",
    "topk_lbgm": "TopK 0.1 + LBGM",
    "atomo": "ATOMO 2",
    "atomo_lbgm": "ATOMO 2 + LBGM",
    "signsgd": "SignSGD",
    "signsgd_lbgm": "SignSGD + LBGM",
    **{f"lbgm_{threshold}": f"LBGM {threshold}" for threshold in (*_THRESHOLDS, "0.9")},
    **{f"lbgm_layer_{threshold}": f"LBGM {threshold}, by tensor" for threshold in _THRESHOLDS},
    **{f"coefficient_{threshold}": f"coefficient ≥ {threshold}, by tensor" for threshold in _THRESHOLDS},
}
"""How tables and figures name the configs of methods."""


@dataclass(frozen=True)
class Experiment:
    """A config and the methods that are compared on it.

    Attributes:
        title: For headings.
        config: Name of the config, without its ending.
        methods: Names of configs in ``methods``; the first sends everything.
        metric: What is judged, from the validation.
        options: Further options of the command line.
        clients: K.
    """

    title: str
    config: str
    methods: tuple[str, ...]
    metric: str = "val/acc"
    options: tuple[str, ...] = ()
    clients: int = 100


_FEW_IMAGES = ("--data.init_args.num_train=10000", "--trainer.check_val_every_n_epoch=5")

EXPERIMENTS = {
    "mnist_fcn": Experiment("MNIST, linear classifier", "mnist_fcn_noniid", ("fedavg", *MODEL, *LAYER, *COEFFICIENT)),
    "fmnist_fcn": Experiment(
        "Fashion-MNIST, linear classifier", "fmnist_fcn_noniid", ("fedavg", *MODEL, *LAYER, *COEFFICIENT)
    ),
    "mnist_stacked": Experiment("MNIST, linear classifier, stacked", "mnist_fcn_noniid", ("fedavg", *STACKED)),
    "fmnist_stacked": Experiment(
        "Fashion-MNIST, linear classifier, stacked", "fmnist_fcn_noniid", ("fedavg", *STACKED)
    ),
    "mnist_svm": Experiment("MNIST, linear SVM", "mnist_svm_noniid", ("fedavg", "lbgm_0.2", "lbgm_0.8")),
    "mnist_partial": Experiment(
        "MNIST, half the clients a round",
        "mnist_fcn_noniid",
        ("fedavg", "lbgm_0.2", "lbgm_0.8"),
        options=("--trainer.strategy.init_args.clients_per_round=0.5",),
    ),
    "mnist_distributed": Experiment(
        "MNIST, one mini-batch a round",
        "mnist_fcn_noniid",
        ("fedavg", "lbgm_layer_0.8", "signsgd", "signsgd_lbgm"),
        options=("--trainer.strategy.init_args.local_steps=1", "--data.init_args.batch_size=128"),
    ),
    "mnist_cnn": Experiment(
        "MNIST, CNN", "mnist_cnn_noniid", ("fedavg", "lbgm_0.2", "lbgm_0.8", *LAYER), options=_FEW_IMAGES
    ),
    "fmnist_cnn": Experiment(
        "Fashion-MNIST, CNN",
        "fmnist_cnn_noniid",
        ("fedavg", "lbgm_0.2", "coefficient_0.2", "coefficient_0.8"),
        options=("--model.init_args.lr=0.01", *_FEW_IMAGES),
    ),
    "cifar10_resnet18": Experiment(
        "CIFAR-10, ResNet18",
        "cifar10_resnet18_noniid",
        ("fedavg", "lbgm_0.2", "lbgm_0.8"),
        options=("--trainer.max_epochs=15", "--data.init_args.num_train=2000", "--data.init_args.num_val=2000"),
        clients=10,
    ),
    "cifar10_vgg19": Experiment(
        "CIFAR-10, VGG19",
        "cifar10_vgg19_noniid",
        ("fedavg", "lbgm_0.2", "lbgm_0.8"),
        "train/loss",
        options=("--trainer.max_epochs=10", "--data.init_args.num_train=400", "--data.init_args.num_val=400"),
        clients=10,
    ),
    "coco_unet": Experiment(
        "COCO, U-Net",
        "coco_unet_iid",
        ("fedavg", "lbgm_0.2", "lbgm_0.8"),
        "val/loss",
        ("--data.init_args.size=64",),
        clients=10,
    ),
    "faces_cnn": Experiment(
        "Faces, CNN, a client for each person",
        "faces_cnn_persons",
        ("fedavg", "lbgm_0.2", "lbgm_0.8"),
        "val/mse",
        clients=347,
    ),
}

AUTHORS = {
    "mnist_fcn": {"fedavg": 0.909, **dict(zip(COEFFICIENT, (0.864, 0.889, 0.899, 0.908)))},
    "fmnist_fcn": {"fedavg": 0.821, **dict(zip(COEFFICIENT, (0.787, 0.807, 0.808, 0.816)))},
    "mnist_cnn": {"fedavg": 0.950, **dict(zip(LAYER, (0.946, 0.935, 0.932, 0.863)))},
    "fmnist_cnn": {"fedavg": 0.754, "coefficient_0.2": 0.662, "coefficient_0.8": 0.727},
    "mnist_stacked": {"fedavg": 0.909, **dict(zip(STACKED, (0.909, 0.908, 0.887, 0.882, 0.773, 0.724)))},
    "fmnist_stacked": {"fedavg": 0.821, **dict(zip(STACKED, (0.822, 0.820, 0.794, 0.782, 0.687, 0.642)))},
}
"""Best accuracy by experiment and method. Those of LBGM stand at the test that they were made with: see
``CoefficientTest`` and docs/results.md."""
