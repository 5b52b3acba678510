"""Fine-tune a language model by federated LoRA, a client for each of Shakespeare's roles: ``python -m recipes.llm``.

Without ``--model`` a small decoder is made from a config and trained centrally on the roles that are no clients, letter
by letter. Then its adapters are trained on 20 other roles, by several methods. It prints a table, draws perplexity
against bytes, saves each method's adapter and stores one MLflow run a method. With ``--model`` the adapters are those
of a model that you have, with its own tokenizer.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import MLFlowLogger
from transformers.utils.logging import disable_progress_bar

from lightning_lbgm import (
    Cast,
    ClientEvaluation,
    ErrorFeedback,
    LBGMCallback,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    SignSGD,
    Ternary,
    TopK,
)
from lightning_lbgm.figures.communication import draw_metric_against_total
from recipes.llm.data import CHARACTERS, Texts, part_roles, read_roles
from recipes.llm.model import LanguageModel, load_model, small_model, with_adapters

QUIET = dict.fromkeys(("enable_model_summary", "enable_progress_bar", "enable_checkpointing"), False)


@dataclass(frozen=True)
class Method:
    """What is trained, and settings of the strategy."""

    settings: dict[str, Any] = field(default_factory=dict)
    adapters: bool = True


METHODS = {
    "full-fedavg": Method(adapters=False),
    "fedavg": Method(),
    "lbgm": Method({"uplink": [LookBack(0.2)]}),
    "rank-8": Method({"uplink": [ErrorFeedback([Cast(torch.bfloat16), LookBack(0.9, rank=8)])]}),
    "ternary": Method({"uplink": [Ternary()]}),
    "ternary-both": Method({"uplink": [Ternary()], "downlink": [TopK(0.2), SignSGD()]}),
    "fedsa": Method({"personal": ["*.lora_B.*"]}),  # FedSA-LoRA: Guo et al., ICLR 2025, arXiv 2410.01463
}


class Result(NamedTuple):
    """What a method came to: perplexities per character, and bytes."""

    perplexity: float
    mean_client: float
    worst_client: float
    uplink_bytes: int
    downlink_bytes: int
    curve: list[tuple[float, float]]
    adapter: Path | None


class Curve(pl.Callback):
    """Remember perplexity against the bytes of both directions, for the figure of all methods."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.points.append((float(metrics["comm/total_bytes_total"]), float(metrics["val/perplexity"])))


def character_tokens(text: str) -> list[int]:
    """Return the tokens of a text, one for each character."""
    return [CHARACTERS.index(character) for character in text]


def tokens_of(model: str | None) -> Callable[[str], list[int]]:
    """Return what makes tokens of a text: the model's tokenizer, or characters if there is no model."""
    if model is None:
        return character_tokens
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def make_base(public: str, args: argparse.Namespace) -> Path:
    """Make a small model, train it centrally on a public text by a plain Trainer, and save it as transformers does."""
    folder: Path = args.output / "base"
    data = Texts({"public": public}, character_tokens, args.block_size, batch_size=16, val_fraction=0.02)
    module = LanguageModel(small_model(len(CHARACTERS), args.block_size, args.width, args.layers), lr=3e-3)
    trainer = pl.Trainer(max_steps=args.pretrain_steps, limit_val_batches=0, accelerator="cpu", logger=False, **QUIET)
    if args.pretrain_steps:
        trainer.fit(module, datamodule=data)
    module.model.save_pretrained(folder)
    return folder


def run(name: str, base: str | Path, data: Texts, args: argparse.Namespace, tracking_uri: str) -> Result:
    """Train one method."""
    pl.seed_everything(args.seed, verbose=False)
    method = METHODS[name]
    model = load_model(base)
    if method.adapters:
        model = with_adapters(model, args.rank)
    module = LanguageModel(model, args.lr if method.adapters else args.full_lr, data.characters_per_token)
    strategy = LBGMFederated(
        num_clients=len(set(data.owners)),
        partitioner=NaturalPartitioner(data.owners),
        local_steps=args.local_steps,
        execution=args.execution,
        **{"uplink": [], **method.settings},
    )
    curve = Curve()
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=args.rounds,
        logger=MLFlowLogger(
            "llm",
            run_name=name,
            tracking_uri=tracking_uri,
            artifact_location=(args.output / "mlruns").resolve().as_uri(),
        ),
        callbacks=[
            LBGMCallback(monitor="val/perplexity"),
            ClientEvaluation(data=data.val_sets(), every_n_rounds=args.rounds, own_models=False),
            curve,
        ],
        accelerator="cpu",
        num_sanity_val_steps=0,
        default_root_dir=args.output,
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    adapter = None
    if method.adapters:
        adapter = args.output / "adapters" / name
        module.model.save_pretrained(adapter)  # the adapters alone, as safetensors
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return Result(
        metrics["val/perplexity"],
        metrics["clients/val/perplexity_mean"],
        metrics["clients/val/perplexity_worst"],
        int(metrics["comm/uplink_bytes_total"]),
        int(metrics["comm/downlink_bytes_total"]),
        curve.points,
        adapter,
    )


def untrained(base: str | Path, data: Texts) -> tuple[float, int]:
    """Return the base model's perplexity on the clients' held-out texts, and its number of parameters."""
    module = LanguageModel(load_model(base), lr=0.0, characters_per_token=data.characters_per_token)
    trainer = pl.Trainer(accelerator="cpu", logger=False, **QUIET)
    metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    return metrics["val/perplexity"], sum(parameter.numel() for parameter in module.parameters())


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    """Run the methods, then print and draw the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model of transformers")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--min-characters", type=int, default=1000, help="least text of a role that is a client")
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=64, help="tokens of an example")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--lr", type=float, default=1e-2, help="the clients' learning rate for adapters")
    parser.add_argument("--full-lr", type=float, default=3e-3, help="the same for the full model")
    parser.add_argument("--width", type=int, default=64, help="width of the base model without --model")
    parser.add_argument("--layers", type=int, default=2, help="layers of the base model without --model")
    parser.add_argument("--pretrain-steps", type=int, default=600, help="steps of the base model without --model")
    parser.add_argument("--execution", choices=["auto", "sequential", "vectorized"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("LBGM_DATA"), help="folder of shakespeare/input.txt"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/llm"))
    args = parser.parse_args(arguments)
    if args.data is None:
        parser.error("name the folder that holds shakespeare/input.txt by --data or LBGM_DATA")
    if args.model is not None and args.model.startswith(("/", ".", "~")) and not Path(args.model).is_dir():
        parser.error(f"--model {args.model}: there is no such folder")
    args.output.mkdir(parents=True, exist_ok=True)
    tracking_uri = f"sqlite:///{args.output / 'mlflow.db'}"

    texts, public = part_roles(read_roles(args.data / "shakespeare" / "input.txt"), args.clients, args.min_characters)
    data = Texts(texts, tokens_of(args.model), args.block_size, args.batch_size)
    pl.seed_everything(args.seed, verbose=False)
    base = make_base(public, args) if args.model is None else args.model
    before, num_parameters = untrained(base, data)
    full = 4 * num_parameters * args.clients * args.rounds
    print(f"{args.clients} clients, {args.rounds} rounds. Perplexity before: {before:.3f}")
    print(f"FedAvg of all {num_parameters:,} parameters takes {full:,} bytes in each direction.\n")
    columns = ("perplexity", "mean client", "worst client", "uplink bytes", "downlink bytes", "of full", "seconds")
    print(f"{'method':<14}" + "".join(f"{column:>15}" for column in columns))
    results = {}
    for name in args.method:
        begin = time.perf_counter()
        result = results[name] = run(name, base, data, args, tracking_uri)
        gc.collect()  # of the model before the next one is loaded
        row = [f"{value:.3f}" for value in result[:3]] + [f"{value:,}" for value in result[3:5]]
        row += [f"{sum(result[3:5]) / (2 * full):.2%}", f"{time.perf_counter() - begin:.0f}"]
        print(f"{name:<14}" + "".join(f"{cell:>15}" for cell in row), flush=True)

    figure = args.output / "llm.png"
    curves = {name: result.curve for name, result in results.items() if "personal" not in METHODS[name].settings}
    draw_metric_against_total(curves, "val/perplexity", log_scale=True).savefig(figure)
    print(f"\nFigure:   {figure}")
    print(f"Adapters: {args.output / 'adapters'}")
    print(f"Runs:     mlflow ui --backend-store-uri {tracking_uri}   (experiment 'llm')")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    for source in ("lightning", "peft", "transformers"):
        warnings.filterwarnings("ignore", module=source)
    disable_progress_bar()
    for logged in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "alembic", "mlflow"):
        logging.getLogger(logged).setLevel(logging.ERROR)
    main()
