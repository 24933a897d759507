"""The Trainer with ``influence`` and ``self_influence``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_tracin.querying.influence import influence, self_influence
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.methods import Method
from lightning_tracin.storage.trace import Trace


class InfluenceTrainerMixin:
    """``trainer.influence`` and ``trainer.self_influence`` for a subclass of any Lightning trainer.

    Example::

        import lightning.pytorch as L

        class Trainer(InfluenceTrainerMixin, L.Trainer):
            pass
    """

    def influence(
        self,
        dataloaders: Any = None,
        model: pl.LightningModule | None = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
        train_dataloaders: Any = None,
        trace: str | Path | Trace | None = None,
        method: str | Method = "tracin-we",
        k: int | None = None,
    ) -> InfluenceResult:
        """Score every training example's influence on every test example; see :func:`influence`.

        Args:
            dataloaders: the test examples: loaders, a data set, rows, texts, or a datamodule.
            model: the trained module; by default that of the last fit in this process.
            datamodule: gives ``test_dataloader`` and ``train_dataloader`` where loaders are not passed.
            train_dataloaders: one loader of the training set, where gradients are not stored yet.
            trace: what the fit recorded, or its folder; by default that of the last fit in this process.
            method: "tracin-we", "tracin-last", or a method with options.
            k: keep only the k strongest proponents and opponents of each test example.
        """
        return influence(
            self,  # type: ignore[arg-type]
            dataloaders,
            model,
            datamodule=datamodule,
            train_dataloaders=train_dataloaders,
            trace=trace,
            method=method,
            k=k,
        )

    def self_influence(
        self,
        model: pl.LightningModule | None = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
        train_dataloaders: Any = None,
        trace: str | Path | Trace | None = None,
        method: str | Method = "tracin-we",
    ) -> Tensor:
        """Every training example's influence on itself, (n_train,); see :func:`self_influence`.

        Args:
            model: the trained module, where gradients are not stored yet.
            datamodule: gives ``train_dataloader`` where no loader is passed.
            train_dataloaders: one loader of the training set, where gradients are not stored yet.
            trace: what the fit recorded, or its folder; by default that of the last fit in this process.
            method: "tracin-we", "tracin-last", or a method with options.
        """
        return self_influence(
            self,  # type: ignore[arg-type]
            model,
            datamodule=datamodule,
            train_dataloaders=train_dataloaders,
            trace=trace,
            method=method,
        )


class Trainer(InfluenceTrainerMixin, pl.Trainer):
    """``pytorch_lightning.Trainer`` with two more methods, :meth:`influence` and :meth:`self_influence`.

    It overrides nothing. For ``lightning.pytorch``, put :class:`InfluenceTrainerMixin` before
    ``lightning.pytorch.Trainer``, or call :func:`lightning_tracin.influence` with a trainer of either package.
    """
