"""The two networks of the study: a convolutional one over word embeddings, and the first layers of MiniLM."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from benchmarks.evidence.examples import Vocabulary
from benchmarks.evidence.maxima import maxima
from examples.classifier import be_quiet
from examples.data import packaged_minilm
from lightning_tracin import TracInMixin


class Network(TracInMixin, pl.LightningModule):
    """What both have in common; batches are those of ``examples.trimmed``.

    Args:
        vocabulary: names the tokens.
        label_names: in the order of the labels.
    """

    def __init__(self, vocabulary: Vocabulary, label_names: tuple[str, ...]) -> None:
        super().__init__()
        self.tokenizer = vocabulary
        self.label_names = label_names

    def influence_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each example."""
        return functional.cross_entropy(self(batch), batch["labels"], reduction="none")

    def influence_label_names(self) -> dict[int, str]:
        """The names of the classes."""
        return dict(enumerate(self.label_names))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        return self.influence_loss(batch).mean()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The probability of each class, (B, C)."""
        probabilities: Tensor = self(batch).float().softmax(-1)
        return probabilities


class Convolutional(Network):
    """MiniLM's word embeddings, convolutions of width 3 and 5, maxima over positions, a hidden layer; dropout .2."""

    def __init__(self, vocabulary: Vocabulary, label_names: tuple[str, ...]) -> None:
        super().__init__(vocabulary, label_names)
        rows = word_embeddings()[vocabulary.kept]
        rows[0] = 0
        self.embedding = nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=0)  # type: ignore[no-untyped-call]
        self.convolutions = nn.ModuleList(nn.Conv1d(rows.shape[1], 100, width, padding=width // 2) for width in (3, 5))
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(200, 100)
        self.head = nn.Linear(100, len(label_names))

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """What the last layer is given, (B, 100)."""
        words = self.embedding(batch["input_ids"])
        padded = batch["attention_mask"] == 0
        pooled = [self.pooled(each, words, padded) for each in self.convolutions]
        hidden: Tensor = self.dropout(self.hidden(self.dropout(torch.cat(pooled, 1))).relu())
        return hidden

    def pooled(self, convolution: nn.Module, words: Tensor, padded: Tensor) -> Tensor:
        """The largest output of each filter, (B, 100), of words (B, T, 384)."""
        # A ReLU's output is at least 0, so that a padded position never is the largest.
        outputs: Tensor = convolution(words.transpose(1, 2))
        return outputs.relu().masked_fill(padded[:, None], 0).amax(2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits, (B, C)."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)


class UnrecordedConvolutional(Convolutional):
    """The same, fitted in little more than half the time; its convolutions are not called, so that none is recorded."""

    def pooled(self, convolution: nn.Module, words: Tensor, padded: Tensor) -> Tensor:
        """The same, with a sparse backward."""
        assert isinstance(convolution, nn.Conv1d)
        return maxima(convolution, words, padded)


class MiniLM(Network):
    """The first two layers of MiniLM-L6, the mean over positions as MiniLM pools them, and a new last layer."""

    learning_rate = 5e-4
    has_pooler = False

    def __init__(self, vocabulary: Vocabulary, label_names: tuple[str, ...]) -> None:
        super().__init__(vocabulary, label_names)
        self.bert = deepcopy(_pretrained().bert)
        pooler, self.bert.pooler = self.bert.pooler, None
        self.pooler = pooler if self.has_pooler else None
        rows = word_embeddings()[vocabulary.kept]
        words = nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=0)  # type: ignore[no-untyped-call]
        self.bert.set_input_embeddings(words)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(rows.shape[1], len(label_names))
        nn.init.normal_(self.head.weight, std=0.02)  # as BERT's classifiers begin
        nn.init.zeros_(self.head.bias)

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """One vector for each text, (B, 384), of its states, (B, T, 384)."""
        return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """What the last layer is given, (B, 384)."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        states = self.bert(**{name: batch[name] for name in names}).last_hidden_state
        dropped: Tensor = self.dropout(self.pooled(states, batch["attention_mask"]))
        return dropped

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits, (B, C)."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def configure_optimizers(self) -> Any:
        """AdamW with a linear decay to 5 %."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PooledMiniLM(MiniLM):
    """The same as Hugging Face's classifier: the first position's state through MiniLM's pooler."""

    learning_rate = 2e-4
    has_pooler = True

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """The pooler's output for the first position."""
        assert self.pooler is not None
        pooled: Tensor = self.pooler(states)
        return pooled


def word_embeddings() -> Tensor:
    """MiniLM's word embeddings, (30522, 384)."""
    rows: Tensor = _pretrained().get_input_embeddings().weight.detach()
    return rows.clone()


@cache
def _pretrained() -> Any:
    be_quiet()
    with torch.random.fork_rng(devices=[]):  # the first network of a process would differ from the next of its seed
        model = AutoModelForSequenceClassification.from_pretrained(packaged_minilm(), num_hidden_layers=2)
    return model.train()  # from_pretrained returns it in eval mode, without dropout
