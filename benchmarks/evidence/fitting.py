"""The one fit of a task whose trace is asked, kept in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.evidence.networks import Network
from benchmarks.evidence.task import Task
from lightning_tracin import Trace, TracInCallback, Trainer
from lightning_tracin.scoring.methods import Method

COMPONENTS = (128, 32)  # of inputs and of output gradients, for K-FAC


@dataclass(frozen=True)
class Fitted:
    """A task's network after its fit to all training examples.

    Attributes:
        task: the task.
        module: the network, with the weights of the last checkpoint, in eval mode.
        trace: its checkpoints, one at the end of each epoch, and what gradients have been asked for.
        trainer: what asks them.
    """

    task: Task
    module: Network
    trace: Trace
    trainer: Trainer

    def scores(self, method: str | Method, checkpoints: Any = None) -> Tensor:
        """Scores of a method, (n_test, n_train), by the product's public API.

        Args:
            method: its name, or the method.
            checkpoints: which count; all by default.
        """
        result = self.trainer.influence(
            self.task.test_loader(),
            self.module,
            train_dataloaders=self.train_loader(),
            trace=self.trace.path,
            method=method,
            checkpoints=checkpoints,
        )
        assert result.scores is not None
        return result.scores

    def in_components(self) -> Fitted:
        """The same checkpoints with gradients stored in K-FAC's leading components, which take much less time."""
        path = self.trace.path.with_name(f"{self.trace.path.name}-components")
        if not (path / "trace.json").exists():
            methods = ("tracin-we", "tracin-last", *self.task.recipe.layers)
            Trace.from_checkpoints(path, self.trace, self.module, self.train_loader(), methods=methods, rank=COMPONENTS)
        return replace(self, trace=Trace(path))

    def self_influence(self, method: str | Method) -> Tensor:
        """Every training example's influence on itself, (n_train,)."""
        return self.trainer.self_influence(
            self.module, train_dataloaders=self.train_loader(), trace=self.trace.path, method=method
        )

    def train_loader(self) -> DataLoader[Any]:
        """The training examples, as the fit had them."""
        return self.task.build(range(len(self.task.train)), 0)[1]

    def probabilities(self) -> Tensor:
        """What the network says of each test example, (n_test, n_classes)."""
        return torch.cat(self.trainer.predict(self.module, self.task.test_loader()))  # type: ignore[arg-type]

    def accuracy(self) -> float:
        """The share of test examples that it is right about."""
        return float((self.probabilities().argmax(1) == self.task.test.labels).float().mean())


def fitted(task: Task, folder: Path, seed: int = 0) -> Fitted:
    """Fit to all training examples, or take up the fit that a folder keeps.

    Args:
        task: what is fitted.
        folder: of the whole study; a task has a folder there.
        seed: of the fit.
    """
    path = folder / task.name / ("trace" if seed == 0 else f"trace-{seed}")
    pl.seed_everything(seed, verbose=False)
    module, loader = task.build(range(len(task.train)), seed)
    if not (path / "trace.json").exists():
        methods = ("tracin-we", "tracin-last", *task.recipe.layers)
        callback = TracInCallback(path, methods=methods, cache="on_demand", on_error="raise", overwrite=True)
        task.trainer(callbacks=[callback]).fit(module, loader)
    trace = Trace(path)
    module.load_state_dict(dict(trace.checkpoints[-1].weights()))
    return Fitted(task, module.eval(), trace, task.trainer())


def topk(scores: Tensor, k: int) -> Tensor:
    """The k strongest proponents of each test example, (n_test, k)."""
    return scores.topk(k, dim=1).indices


def right_and_balanced(probabilities: Tensor, labels: Sequence[int] | Tensor, n: int) -> list[int]:
    """Test examples that the network is right about: random ones, of each class in turn.

    Args:
        probabilities: what the network says, (n_test, n_classes).
        labels: (n_test,).
        n: how many.

    Returns:
        Their places, ascending.
    """
    labels = torch.as_tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    right = [int(each) for each in order if probabilities[each].argmax() == labels[each]]
    by_class = [[each for each in right if labels[each] == label] for label in torch.unique(labels)]
    turns = [group[turn] for turn in range(len(labels)) for group in by_class if turn < len(group)]
    return sorted(turns[:n])
