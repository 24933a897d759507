"""The Trainer with ``influence``, ``self_influence`` and ``label_issues``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_tracin.gradients.targets import Asked, Positions
from lightning_tracin.querying.chosen_checkpoints import CheckpointChoice
from lightning_tracin.querying.influence import influence, self_influence
from lightning_tracin.querying.label_review import label_issues
from lightning_tracin.report.label_issues import LabelIssues
from lightning_tracin.results.reader import RawText
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.methods import Method
from lightning_tracin.storage.trace import Trace


class InfluenceTrainerMixin:
    """``influence``, ``self_influence`` and ``label_issues`` for a subclass of any Lightning trainer.

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
        checkpoints: CheckpointChoice = None,
        target: Asked = "label",
        positions: Positions | None = None,
    ) -> InfluenceResult:
        """Score every training example's influence on every test example; see :func:`influence`.

        Args:
            dataloaders: the test examples: loaders, a data set, rows, texts, or a datamodule.
            model: the trained module, or a Hugging Face model; by default that of the last fit in this process.
            datamodule: gives ``test_dataloader`` and ``train_dataloader`` where loaders are not passed.
            train_dataloaders: one loader of the training set, where gradients are not stored yet.
            trace: what the fit recorded, or its folder; by default that of the last fit in this process.
            method: "tracin-we", "tracin-last", or a method with options.
            k: keep only the k strongest proponents and opponents of each test example.
            checkpoints: which of the trace's count: all by default, "last", a step, several, or a slice of their list.
            target: what is explained: "label", "prediction", a class by its number or name, or a pair of classes, the
                first against the second.
            positions: of the tokens that are explained; all by default.
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
            checkpoints=checkpoints,
            target=target,
            positions=positions,
        )

    def self_influence(
        self,
        model: pl.LightningModule | None = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
        train_dataloaders: Any = None,
        trace: str | Path | Trace | None = None,
        method: str | Method = "tracin-we",
        checkpoints: CheckpointChoice = None,
        within_class: bool = False,
    ) -> Tensor:
        """Every training example's influence on itself, (n_train,); see :func:`self_influence`.

        Args:
            model: the trained module, where gradients are not stored yet.
            datamodule: gives ``train_dataloader`` where no loader is passed.
            train_dataloaders: one loader of the training set, where gradients are not stored yet.
            trace: what the fit recorded, or its folder; by default that of the last fit in this process.
            method: "tracin-we", "tracin-last", or a method with options.
            checkpoints: which of the trace's count: all by default, "last", a step, several, or a slice of their list.
            within_class: compare with examples of the same label, in standard deviations.
        """
        return self_influence(
            self,  # type: ignore[arg-type]
            model,
            datamodule=datamodule,
            train_dataloaders=train_dataloaders,
            trace=trace,
            method=method,
            checkpoints=checkpoints,
            within_class=within_class,
        )

    def label_issues(
        self,
        model: pl.LightningModule | None = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
        train_dataloaders: Any = None,
        trace: str | Path | Trace | None = None,
        method: str | Method = "tracin-last",
        checkpoints: CheckpointChoice = None,
        n: int | None = None,
        texts: Sequence[RawText] | None = None,
    ) -> LabelIssues:
        """Training examples whose labels may be wrong, highest self-influence first; see :func:`label_issues`.

        Args:
            model: names labels, and is needed where gradients are not stored yet.
            datamodule: gives ``train_dataloader`` where no loader is passed.
            train_dataloaders: one loader of the training set, where gradients are not stored yet.
            trace: what the fit recorded, or its folder; by default that of the last fit in this process.
            method: measures self-influence.
            checkpoints: which of the trace's count: all by default, "last", a step, several, or a slice of their list.
            n: list only so many; None for all.
            texts: the training examples' texts as they were written.
        """
        return label_issues(
            self,  # type: ignore[arg-type]
            model,
            datamodule=datamodule,
            train_dataloaders=train_dataloaders,
            trace=trace,
            method=method,
            checkpoints=checkpoints,
            n=n,
            texts=texts,
        )


class Trainer(InfluenceTrainerMixin, pl.Trainer):
    """``pytorch_lightning.Trainer`` with more methods: :meth:`influence`, :meth:`self_influence`, :meth:`label_issues`.

    It overrides nothing. For ``lightning.pytorch``, put :class:`InfluenceTrainerMixin` before
    ``lightning.pytorch.Trainer``, or call :func:`lightning_tracin.influence` with a trainer of either package.
    """
