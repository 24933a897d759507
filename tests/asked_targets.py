"""Families after a fit, and the dense gradients of any loss of their test examples: what targets are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, untie
from families import N_TRAIN, Family, Module
from torch.utils.data import DataLoader

from lightning_tracin import Trace, TracInCallback, Trainer

#: From a module, a batch of one test example, and that example's number to the loss of its target.
Loss = Callable[[Module, Any, int], torch.Tensor]


@dataclass
class AskedFamily:
    """A family after a fit of two epochs."""

    family: Family
    path: Path
    module: Module = field(init=False)
    trainer: Trainer = field(init=False)
    _trained: dict[str, list[torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.module = self.family.build()
        methods = ("tracin-we", "tracin-last")
        callback = TracInCallback(self.path, dtype="float32", methods=methods)
        self.trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        pl.seed_everything(3, verbose=False)
        self.trainer.fit(self.module, self.family.train_loader())

    @property
    def singles(self) -> DataLoader:
        """The test examples, each a batch of its own."""
        return self.family.singles(self.family.test_loader())

    def influence(self, loader: DataLoader | None = None, **asked: Any):
        return self.trainer.influence(loader or self.family.test_loader(), **asked)

    def scores(self, method: str, loss: Loss, **options: Any) -> torch.Tensor:
        """(n_test, n_train) by the definition, for the losses of the test examples' targets, and a method's options."""
        name = self.module.embedding if method == "tracin-we" else self.module.last
        if name not in self._trained:
            train = self.family.singles(self.family.train_loader())
            self._trained[name] = [
                dense_gradients(module, module.get_submodule(name), train, module.loss) for module in self._modules
            ]
        test = [self._of_tests(module, name, loss) for module in self._modules]
        return BruteForce(self._rates(name), test, self._trained[name]).scores(**options)

    def last_module(self) -> Module:
        """The module at the last checkpoint, in eval mode."""
        return self._modules[-1].eval()

    def _of_tests(self, module: Module, name: str, loss: Loss) -> torch.Tensor:
        numbers = iter(range(len(self.singles)))
        layer = module.get_submodule(name)
        return dense_gradients(module, layer, self.singles, lambda batch: loss(module, batch, next(numbers)))

    def _rates(self, name: str) -> list[float]:
        is_words = name == self.module.embedding
        named = "tracin-we" if is_words else "tracin-last"
        checkpoints = Trace(self.path).checkpoints
        (site,) = (site for site in checkpoints[0].sites if site.name == named)
        return [each.learning_rate_of(site) for each in checkpoints]

    @cached_property
    def _modules(self) -> list[Module]:
        modules = []
        for checkpoint in Trace(self.path).checkpoints:
            module = self.family.build()
            module.load_state_dict(checkpoint.weights())
            untie(module, module.get_submodule(module.embedding))
            modules.append(module)
        assert len(modules) == 2
        assert len(self.family.train_loader().dataset) == N_TRAIN
        return modules
