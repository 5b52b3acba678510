"""LightningCLI: the strategy and its nested objects from YAML."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import TinyModule, make_data
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_lbgm import ClientEvaluation, ErrorFeedback, LBGMFederated, LookBack, PathologicalPartitioner, TopK


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(make_data(), batch_size=4)


class Module(TinyModule):
    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(lr=lr)


def run(tmp_path, strategy, *args):
    config = {
        "trainer": {
            "strategy": strategy,
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["fit", "--config", str(tmp_path / "config.yaml"), *args]
    return LightningCLI(Module, Data, args=command, save_config_callback=None)


def test_a_config_with_nested_objects_trains(tmp_path):
    strategy = {
        "class_path": "lightning_lbgm.LBGMFederated",
        "init_args": {
            "num_clients": 5,
            "partitioner": {
                "class_path": "lightning_lbgm.PathologicalPartitioner",
                "init_args": {"classes_per_client": 2},
            },
            "uplink": [
                {
                    "class_path": "lightning_lbgm.ErrorFeedback",
                    "init_args": {
                        "stage": {"class_path": "lightning_lbgm.TopK", "init_args": {"fraction": 0.5}},
                    },
                },
                {"class_path": "lightning_lbgm.LookBack", "init_args": {"threshold": 0.3, "granularity": "layer"}},
            ],
            "downlink": [
                {"class_path": "lightning_lbgm.TopK", "init_args": {"fraction": 0.2}},
                {"class_path": "lightning_lbgm.SignSGD"},
            ],
            "objective": {"class_path": "lightning_lbgm.FedProx", "init_args": {"mu": 0.1}},
            "clients_per_round": 0.6,
            "local_steps": 2,
            "server_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        },
    }
    trained = run(tmp_path, strategy).trainer.strategy
    assert isinstance(trained, LBGMFederated)
    assert isinstance(trained.partitioner, PathologicalPartitioner)
    feedback, look_back = trained.uplink.stages
    assert isinstance(feedback, ErrorFeedback)
    assert isinstance(feedback.stage.stages[0], TopK)
    assert isinstance(look_back, LookBack)
    assert (look_back.threshold, look_back.granularity, trained.cohort_size) == (0.3, "layer", 3)
    assert isinstance(trained._federation.server.optimizer, torch.optim.Adam)
    assert trained.session.settings.objective.mu == 0.1
    assert [type(stage).__name__ for stage in trained.downlink.stages] == ["TopK", "SignSGD"]
    assert trained._federation.downlink.downlink is trained.downlink
    assert trained.round_index == 2


@pytest.mark.parametrize("name", ["lbgm_federated", "fedavg"])
def test_a_registered_name_trains(tmp_path, name):
    assert run(tmp_path, name).trainer.strategy.round_index == 2


def test_the_command_line_overrides_the_config(tmp_path):
    strategy = {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {"num_clients": 3}}
    trained = run(
        tmp_path, strategy, "--trainer.strategy.init_args.uplink=[]", "--trainer.max_epochs=1"
    ).trainer.strategy
    assert (repr(trained.uplink), trained.num_clients, trained.round_index) == ("[]", 3, 1)


def is_head(name: str, tensor: torch.Tensor) -> bool:
    """Which parameters are personal, as a function that a config names by its import path."""
    return name.startswith("net.bias")


@pytest.mark.parametrize("personal", [["net.b*"], "test_cli.is_head"])
def test_personal_parameters_come_from_a_config(tmp_path, personal):
    settings = {"num_clients": 3, "local_steps": 2, "personal": personal, "personal_steps": 1}
    strategy = run(tmp_path, {"class_path": "lightning_lbgm.LBGMFederated", "init_args": settings}).trainer.strategy
    assert strategy.session.require().flat.names == ("net.weight",)
    shown = strategy.settings()
    assert (shown["personal"], shown["personal_steps"]) == (["net.b*"] if personal == ["net.b*"] else "is_head", 1)


def fading(round_index: int) -> float:
    """A threshold that a config names by its import path."""
    return 0.5 / (1 + round_index)


def test_the_settings_of_the_uplink_family_come_from_a_config(tmp_path):
    def stage(name, **init_args):
        return {"class_path": f"lightning_lbgm.{name}", "init_args": init_args}

    target = stage("TargetSavings", savings=0.5)
    chain = [stage("Cast", dtype="float16"), stage("LookBack", threshold=target, rank=3, max_age=4, rowwise=True)]
    strategy = stage("LBGMFederated", num_clients=3, uplink=[stage("ErrorFeedback", stage=chain)])
    (feedback,) = run(tmp_path, strategy).trainer.strategy.uplink.stages
    assert repr(feedback.stage) == (
        "[Cast(dtype=torch.float16), LookBack(threshold=TargetSavings(0.5, horizon=5), granularity='model', rank=3,"
        " max_age=4, rowwise=True)]"
    )

    large = stage("LookBack", dtype="torch.bfloat16")
    places = {"client_store": str(tmp_path / "store"), "client_capacity": 2}
    median = {"class_path": "lightning_lbgm.CoordinateMedian", "init_args": {"memory": 1000}}
    strategy = run(tmp_path, stage("LBGMFederated", num_clients=3, uplink=[large], aggregation=median, **places))
    strategy = strategy.trainer.strategy
    assert strategy.uplink.stages[0].dtype == torch.bfloat16
    shown = strategy.settings()
    assert {name: shown[name] for name in places} == places
    assert shown["aggregation"] == "CoordinateMedian(memory=1000)"

    strategy = stage("LBGMFederated", num_clients=3, uplink=[stage("LookBack", threshold="test_cli.fading")])
    (look_back,) = run(tmp_path, strategy).trainer.strategy.uplink.stages
    assert look_back.threshold is fading

    prediction = stage("Predict", rank=2, correction=[stage("TopK", fraction=0.5), stage("QSGD", levels=3)])
    strategy = stage("LBGMFederated", num_clients=3, uplink=[prediction])
    assert repr(run(tmp_path, strategy).trainer.strategy.uplink) == (
        "[Predict(rank=2, correction=[TopK(fraction=0.5), QSGD(levels=3)])]"
    )


def every_second(round_index: int, client_id: int) -> bool:
    """An availability that a config names by its import path."""
    return (round_index + client_id) % 2 == 0


def first_two(round_index: int, clients: tuple[int, ...], rng: object) -> tuple[int, ...]:
    """A sampler that a config names by its import path."""
    return clients[:2]


def risky(round_index: int, client_id: int) -> float:
    """A drop-out that a config names by its import path."""
    return 0.5 if client_id else 0.0


def test_who_takes_part_comes_from_a_config(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("1,1,0,1,1,0\n0,1,1,1,1,1\n")
    samplers = [
        {"class_path": "lightning_lbgm.PowerOfChoice", "init_args": {"d": 4}},
        {"class_path": "lightning_lbgm.SizeSampler"},
        {"class_path": "lightning_lbgm.UniformSampler"},
        "test_cli.first_two",
        None,
    ]
    available = [0.9, "test_cli.every_second", str(trace), [[1, 1, 0, 1, 0, 1]], {0: [[0, 2]], 2: [[0, 1], [1, 3]]}]
    dropouts = [0.1, "test_cli.risky", {"before": 0.1, "after": 0.2}, {"after": 0.3}, None]
    shown = []
    for sampler, availability, dropout in zip(samplers, available, dropouts):
        settings = {"num_clients": 6, "clients_per_round": 2, "over_select": 1.5, "deadline": 4, "seed": 0}
        rules = {"sampler": sampler, "availability": availability, "dropout": dropout}
        strategy = {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {**settings, **rules}}
        trained = run(tmp_path, strategy).trainer.strategy
        assert trained.round_index == 2
        shown.append([trained.settings().get(name) for name in ("sampler", "availability", "dropout")])
        assert (trained.settings()["over_select"], trained.settings()["deadline"]) == (1.5, 4)
    assert [row[0] for row in shown] == ["PowerOfChoice(d=4)", "SizeSampler()", "UniformSampler()", "first_two()", None]
    assert [row[1] for row in shown] == [0.9, "every_second()", repr(str(trace)), "<list>", "<dict>"]
    assert [row[2] for row in shown] == [
        "Dropout(before=0.0, after=0.1)", "risky()", "Dropout(before=0.1, after=0.2)", "Dropout(before=0.0, after=0.3)",
        None,
    ]  # fmt: skip


def test_a_network_comes_from_a_config(tmp_path):
    table = tmp_path / "clients.csv"
    table.write_text("uplink,compute\n" + "1 MB/s,20 ms\n" * 6)
    networks = [
        "lte",
        {"uplink": "1 MB/s", "downlink": 8e6, "latency": "40 ms", "compute": 0.02, "spread": 0.5},
        {"preset": "home_broadband", "clients": str(table), "planned_uplink": 0.1},
        {"class_path": "lightning_lbgm.NetworkClock", "init_args": {"downlink": 1e6, "clients": [{"uplink": 1e6}] * 6}},
    ]
    shown = []
    for network, deadline in zip(networks, (None, "1 min", "30 s", 4)):
        settings = {"num_clients": 6, "clients_per_round": 2, "seed": 0, "network": network, "deadline": deadline}
        trained = run(tmp_path, {"class_path": "lightning_lbgm.LBGMFederated", "init_args": settings}).trainer.strategy
        assert trained.ledger.seconds > 0
        shown.append(trained.settings()["network"])
    assert shown == [
        "NetworkClock(preset='lte')",
        "NetworkClock(uplink='1 MB/s', downlink=8000000.0, latency='40 ms', compute=0.02, spread=0.5)",
        f"NetworkClock(clients='{table}', preset='home_broadband', planned_uplink=0.1)",
        "NetworkClock(downlink=1000000.0, clients='<list>')",
    ]


@pytest.mark.parametrize(
    ("objective", "server_optimizer", "shown"),
    [
        (
            {"class_path": "lightning_lbgm.SCAFFOLD"},
            {"class_path": "lightning_lbgm.FedAvgM"},
            "SGD(lr=1.0, momentum=0.9",
        ),
        (
            {"class_path": "lightning_lbgm.FedDyn", "init_args": {"alpha": 0.2}},
            {"class_path": "lightning_lbgm.FedAdam", "init_args": {"lr": 0.02, "betas": [0.5, 0.9]}},
            "ServerAdam(lr=0.02, betas=(0.5, 0.9)",
        ),
        (None, {"class_path": "lightning_lbgm.FedYogi", "init_args": {"eps": 0.01}}, "ServerYogi(lr=0.01"),
    ],
)
def test_methods_by_name_come_from_a_config(tmp_path, objective, server_optimizer, shown):
    arguments = {"num_clients": 3, "server_optimizer": server_optimizer}
    strategy = {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {**arguments, "objective": objective}}
    trained = run(tmp_path, strategy).trainer.strategy
    assert trained.settings()["server_optimizer"].startswith(shown)
    name = None if objective is None else objective["class_path"].rpartition(".")[2]
    assert (trained.session.settings.objective is None) == (name is None)
    assert str(trained.settings().get("objective", "")).startswith(name or "")
    assert trained.round_index == 2


def test_the_evaluation_of_clients_comes_from_a_config(tmp_path):
    settings = {"split": 0.25, "every_n_rounds": 1, "clients": [0, 2], "lower_is_better": {"val/loss": True}}
    (tmp_path / "callbacks.yaml").write_text(
        yaml.safe_dump(
            {"trainer": {"callbacks": [{"class_path": "lightning_lbgm.ClientEvaluation", "init_args": settings}]}}
        )
    )
    strategy = {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {"num_clients": 3}}
    trainer = run(tmp_path, strategy, "--config", str(tmp_path / "callbacks.yaml")).trainer
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, ClientEvaluation)]
    assert {name: getattr(callback, name) for name in settings} == settings
    assert trainer.strategy.feed.num_examples(0) == 15
    assert "clients/val/acc_p10" in trainer.callback_metrics


def brightness(example: list[torch.Tensor]) -> torch.Tensor:
    """A feature that a config names by its import path."""
    return example[0].mean()


def test_partitioners_and_the_report_of_the_partition_come_from_a_config(tmp_path):
    report = {"class_path": "lightning_lbgm.PartitionReport", "init_args": {"figures": False}}
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [report]}}))
    shown = []
    for name, settings in {
        "ShardPartitioner": {"shards_per_client": 3},
        "QuantityPartitioner": {"alpha": 0.5, "min_examples": 4},
        "FeaturePartitioner": {"features": "test_cli.brightness", "alpha": 0.2},
    }.items():
        partitioner = {"class_path": f"lightning_lbgm.{name}", "init_args": settings}
        init_args = {"num_clients": 3, "partitioner": partitioner}
        strategy = {"class_path": "lightning_lbgm.LBGMFederated", "init_args": init_args}
        trainer = run(tmp_path, strategy, "--config", str(tmp_path / "callbacks.yaml")).trainer
        assert trainer.callback_metrics["partition/clients"] == 3
        shown.append(trainer.strategy.settings()["partitioner"])
    assert shown == [
        "ShardPartitioner(shards_per_client=3)",
        "QuantityPartitioner(alpha=0.5, min_examples=4)",
        "FeaturePartitioner(features=brightness(), alpha=0.2, num_groups=10, min_examples=1)",
    ]


def test_the_settings_name_the_server_optimizer_of_a_config(tmp_path):
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.9}}
    strategy = {"class_path": "lightning_lbgm.LBGMFederated", "init_args": {"server_optimizer": optimizer}}
    shown = run(tmp_path, strategy).trainer.strategy.settings()["server_optimizer"]
    assert shown.startswith("SGD(lr=1.0, momentum=0.9")
    assert "call_without" not in shown
