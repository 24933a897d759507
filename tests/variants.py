"""Modules, fits and data sets beside the toy's own, that several tests use."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from toy import N_TRAIN, Toy, loader, quiet, texts

from lightning_tracin import TracInCallback


class Plain(pl.LightningModule):
    """No mixin; logs and measures in training_step, and keeps a part in eval mode."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.dropout = nn.Dropout(0.3)
        self.frozen_dropout = nn.Dropout(0.5).eval()
        self.head = nn.Linear(8, 3)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        logits = self.head(self.frozen_dropout(self.dropout(self.embedding(ids).mean(1))))
        self.accuracy(logits.softmax(-1), labels)
        loss = functional.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Reproducible(Toy):
    """No dropout: a resumed fit draws other random numbers. Its predictions are nothing but a shape."""

    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def resumable(path, epochs, dtype="float32", **fit):
    pl.seed_everything(0, verbose=False)
    saver = ModelCheckpoint(path.parent / f"saved-{path.name}", save_top_k=-1, filename="{step}")
    trainer = quiet(callbacks=[TracInCallback(path, dtype=dtype), saver], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(Reproducible(), loader(), **fit)
    return trainer


class Failing(Dataset):
    """Raises at the n-th access after a folder is there."""

    def __init__(self, folder, after, error):
        self.folder, self.left, self.error = folder, after, error

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        self.left -= self.folder.exists()
        if self.left == 0:
            raise self.error
        return texts()[index]


class Stepping(Toy):
    """Optimizes by hand, and clips."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module
