"""A causal language model of transformers in a LightningModule, with LoRA adapters from peft."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


class LanguageModel(pl.LightningModule):
    """An ordinary LightningModule around a model of transformers or peft: nothing in it knows of clients.

    Args:
        model: The model. Parameters that do not require gradients are left alone.
        lr: Learning rate.
        characters_per_token: Of the text, for the perplexity per character.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, lr: float, characters_per_token: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.characters_per_token = characters_per_token
        self.val_loss = MeanMetric()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_loss(self.model(**batch).loss, weight=len(batch["input_ids"]))
        self.log("val/loss", self.val_loss)

    def on_validation_epoch_end(self) -> None:
        self.log("val/perplexity", torch.exp(self.val_loss.compute() / self.characters_per_token))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)


def small_model(vocab_size: int, block_size: int, width: int, layers: int) -> PreTrainedModel:
    """Return a small decoder with random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=block_size,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


def with_adapters(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze a model and put LoRA adapters into all its linear layers but the head."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def load_model(name_or_path: str | Path) -> PreTrainedModel:
    """Load a causal language model from a folder, or from Hugging Face's hub by its name."""
    return AutoModelForCausalLM.from_pretrained(str(name_or_path), use_cache=False)
