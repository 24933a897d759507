"""A task of the study: examples, a network, and how it is fitted to any part of them."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.evidence.examples import Examples, Rows, Vocabulary, trimmed
from benchmarks.evidence.networks import Network
from benchmarks.workload import quiet
from lightning_tracin import Trainer


@dataclass(frozen=True)
class Recipe:
    """How a task's network is made and fitted.

    Attributes:
        network: its class.
        epochs: of the fit; a checkpoint at the end of each.
        batch_size: of the fit.
        precision: of the fit, as Lightning names it.
        layers: the linear layers and convolutions that are recorded beside words and last layer.
        unrecorded: a class of the same network that is fitted faster, but cannot be recorded.
    """

    network: type[Network]
    epochs: int
    batch_size: int
    precision: Any = "32-true"
    layers: tuple[str, ...] = ()
    unrecorded: type[Network] | None = None


@dataclass(frozen=True)
class Task:
    """Examples, and how a network is fitted to some of them.

    Attributes:
        name: of its folder and its results.
        title: for people.
        train: the training examples.
        test: the test examples.
        label_names: in the order of the labels.
        vocabulary: of both.
        recipe: of the fits.
    """

    name: str
    title: str
    train: Examples
    test: Examples
    label_names: tuple[str, ...]
    vocabulary: Vocabulary
    recipe: Recipe

    def build(self, indices: Sequence[int], seed: int) -> tuple[Network, DataLoader[Any]]:
        """A new network, and the loader of the training examples that it is fitted to.

        Args:
            indices: of the training examples.
            seed: of the network's first weights and of the order of the examples.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.recipe.network(self.vocabulary, self.label_names)
        order = torch.Generator().manual_seed(seed)
        rows = Rows(self.train, indices)
        return module, DataLoader(
            rows, batch_size=self.recipe.batch_size, shuffle=True, collate_fn=trimmed, generator=order
        )

    def rebuild(self, indices: Sequence[int], seed: int) -> tuple[Network, DataLoader[Any]]:
        """The same, of a network that is only asked what it says."""
        recipe = replace(self.recipe, network=self.recipe.unrecorded or self.recipe.network)
        return replace(self, recipe=recipe).build(indices, seed)

    def test_loader(self) -> DataLoader[Any]:
        """The test examples in order."""
        return DataLoader(Rows(self.test, range(len(self.test))), batch_size=64, collate_fn=trimmed)

    def trainer(self, **options: Any) -> Trainer:
        """A trainer for one fit, which says nothing."""
        gc.collect()  # A module and its trainer refer to each other, and are large: those of the fit before go now.
        settings = {"max_epochs": self.recipe.epochs, "accelerator": "cpu", "precision": self.recipe.precision}
        return quiet(**{**settings, **options})

    def fingerprint(self) -> str:
        """What tells its examples from others."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(repr((part.texts, part.labels.tolist())).encode())
        return digest.hexdigest()[:16]

    def with_train_labels(self, labels: torch.Tensor) -> Task:
        """The same task with other training labels, (n_train,)."""
        return replace(self, train=self.train.with_labels(labels))
