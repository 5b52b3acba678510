"""The recipe of language models: adapters of transformers and peft, federated, and what the package makes of them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from conftest import Recorder, build_trainer, flat_params
from torch.utils.data import DataLoader, default_collate

from lightning_lbgm import LBGMFederated, LookBack, NaturalPartitioner

pytest.importorskip("peft", reason="needs the extra `llm`: pip install lightning-lbgm[llm]")
pytest.importorskip("transformers", reason="needs the extra `llm`: pip install lightning-lbgm[llm]")

from peft import PeftModel
from transformers import BatchEncoding

from recipes.llm.__main__ import character_tokens, main
from recipes.llm.data import Texts, part_roles, read_roles
from recipes.llm.model import LanguageModel, load_model, small_model, with_adapters

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, which change with their versions

BLOCK, WIDTH, LAYERS, RANK = 16, 16, 2, 2
LINES = ["the cat sat on the mat and ate ", "a dog is not a cat but it is as good ", "to be or not to be that is the "]
TEXTS = {f"ROLE {k}": LINES[k] * 12 for k in range(3)}
ADAPTERS = LAYERS * RANK * 20 * WIDTH  # of 4 layers d x d and 3 of d x 3 d, r (in + out) numbers each


def make_data(batch_size=4):
    return Texts(TEXTS, character_tokens, BLOCK, batch_size)


def make_module(lr=0.02):
    torch.manual_seed(0)
    return LanguageModel(with_adapters(small_model(96, BLOCK, WIDTH, LAYERS), RANK), lr)


def strategy(**settings):
    data = make_data()
    settings = {"uplink": [], "local_steps": 2, "seed": 0, **settings}
    return LBGMFederated(num_clients=3, partitioner=NaturalPartitioner(data.owners), **settings)


@torch.no_grad()
def perplexity(model, texts):
    """Compute it by hand: of each character that has others before it in its block, the last 15 % of each text."""
    losses = []
    for text in texts.values():
        tokens = character_tokens(text[len(text) - int(0.15 * len(text)) :])
        for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = torch.tensor([tokens[begin : begin + BLOCK]])
            scores = model(input_ids=block).logits[0].log_softmax(-1)
            losses += [-scores[i, block[0, i + 1]] for i in range(BLOCK - 1)]
    return float(torch.stack(losses).mean().exp())


def test_the_recipe_end_to_end(tmp_path):
    root = os.environ.get("LBGM_DATA")
    if not root or not (Path(root) / "shakespeare" / "input.txt").is_file():
        pytest.skip("needs shakespeare/input.txt in the folder that LBGM_DATA names")
    sizes = [
        "--clients=3",
        "--rounds=2",
        "--local-steps=3",
        f"--block-size={BLOCK}",
        "--rank=2",
        "--lr=0.01",
        "--width=32",
    ]
    sizes.append("--execution=sequential")  # what vectorized adapters come to is another test's
    results = main(
        [*sizes, "--pretrain-steps=40", "--method", "fedavg", "ternary-both", f"--data={root}", f"--output={tmp_path}"]
    )
    texts, _ = part_roles(read_roles(Path(root) / "shakespeare" / "input.txt"), 3, 1000)
    before = perplexity(load_model(tmp_path / "base"), texts)
    adapted = PeftModel.from_pretrained(load_model(tmp_path / "base"), results["fedavg"].adapter)
    assert results["fedavg"].perplexity == pytest.approx(perplexity(adapted, texts), rel=1e-4)
    assert results["fedavg"].perplexity < 0.99 * before
    assert results["ternary-both"].perplexity < before
    adapters = 2 * 2 * 20 * 32  # as above, 2 layers of width 32
    assert results["fedavg"].uplink_bytes == results["fedavg"].downlink_bytes == 4 * adapters * 3 * 2
    assert results["ternary-both"].uplink_bytes < 0.2 * results["fedavg"].uplink_bytes
    assert results["ternary-both"].downlink_bytes < 0.6 * results["fedavg"].downlink_bytes  # round 1 has it in full
    assert (tmp_path / "llm.png").stat().st_size > 0
    assert (tmp_path / "mlflow.db").exists()


def test_roles_are_parted_into_clients_and_public_text(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("A:\nlong enough\n\nB:\nno\n\nA:\nmore\n\nC:\nalso long\n\nD:\nlong as well\n")
    roles = read_roles(path)
    assert roles == {"A": "long enough\nmore\n", "B": "no\n", "C": "also long\n", "D": "long as well\n"}
    assert part_roles(roles, 2, 5) == ({"C": roles["C"], "D": roles["D"]}, roles["A"] + roles["B"])
    with pytest.raises(ValueError, match="num_clients=4: 3 roles have 5 characters"):
        part_roles(roles, 4, 5)
    with pytest.raises(FileNotFoundError, match="LBGM_DATA"):
        read_roles(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="'B' has 3 tokens to train with, fewer than block_size=16"):
        Texts({"B": "no\n"}, character_tokens, 16)


def test_only_adapters_are_trained_sent_and_kept_of_a_client(tmp_path):
    module, recorder = make_module(), Recorder()
    before = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    trainer = build_trainer(tmp_path, strategy(uplink=[LookBack(0.2)]), max_epochs=2, callbacks=[recorder])
    trainer.fit(module, make_data().train_dataloader())
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert recorder.reports[0].uplink_bits == recorder.reports[0].downlink_bits == 3 * 32 * ADAPTERS
    states = trainer.strategy._federation.clients
    sizes = [t.numel() for state in map(states.__getitem__, range(3)) for t in tensors(state)]
    assert max(sizes) == ADAPTERS
    assert sum(sizes) < 3 * ADAPTERS + 100  # a look-back gradient each, and a few numbers


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_vectorized_adapters_come_to_the_same(tmp_path, caplog):
    results = []
    for execution in ("sequential", "vectorized"):
        module = make_module()
        trainer = build_trainer(tmp_path, strategy(execution=execution), max_epochs=2)
        with caplog.at_level(logging.INFO):
            trainer.fit(module, make_data().train_dataloader())
        assert ("up to 20 are trained at once" in caplog.text) == (execution == "vectorized")
        results.append(flat_params(module))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


class Encoded(LanguageModel):
    """Takes what a tokenizer returns, and returns what a model of transformers returns."""

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, BatchEncoding)
        return self.model(**batch)


def encoding(examples):
    return BatchEncoding(default_collate(examples))


@pytest.mark.parametrize("loaders", [False, True], ids=["dealt", "a loader for each client"])
def test_batch_encodings_and_model_outputs(tmp_path, loaders):
    data = make_data()
    dataset = data.train_dataloader().dataset
    parts = [[i for i, owner in enumerate(data.owners) if owner == role] for role in TEXTS]
    results = []
    for cls, collate in ((LanguageModel, default_collate), (Encoded, encoding)):
        module = make_module()
        module.__class__ = cls
        if loaders:
            settings = LBGMFederated(num_clients=None, uplink=[], seed=0)
            loader = [DataLoader(torch.utils.data.Subset(dataset, p), batch_size=4, collate_fn=collate) for p in parts]
        else:
            settings = strategy(local_steps=None)
            loader = DataLoader(dataset, batch_size=4, collate_fn=collate)
        recorder = Recorder()
        build_trainer(tmp_path, settings, max_epochs=1, callbacks=[recorder]).fit(module, loader)
        assert [client.num_examples for client in recorder.reports[0].clients] == list(map(len, parts))
        results.append(flat_params(module))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
