"""How logged validations are explained: by which method, and with which raw texts; checked before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_tracin.bridge.mixin import has_own_words, tokenizer_of
from lightning_tracin.gradients.sites import Site
from lightning_tracin.results.excluded_words import require_words
from lightning_tracin.results.reader import RawText
from lightning_tracin.scoring.kernels import require_memory
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.scoring.terms import stored_site, training_sites_of


@dataclass(frozen=True)
class LogPlan:
    """The method and the raw texts of logged validations.

    Attributes:
        method: what scores are; None for the default of the first site that is recorded.
        train: the text of each training example, or a pair of texts, by index in the data set; None without.
        val: the same of the only validation loader.
    """

    method: Method | None = None
    train: Sequence[RawText] | None = None
    val: Sequence[RawText] | None = None

    @classmethod
    def of(cls, method: str | Method | None, texts: Any) -> LogPlan:
        """The arguments ``log_method`` and ``log_texts`` of the callback.

        Raises:
            ValueError: if they are no method, or no texts.
        """
        named = texts if isinstance(texts, Mapping) else {"train": texts}
        sequences = all(
            each is None or (isinstance(each, Sequence) and not isinstance(each, str)) for each in named.values()
        )
        if not sequences or named.keys() - {"train", "val"}:
            raise ValueError(
                "log_texts must be the texts of the training set, or a dict with those of 'train' and of 'val', each a "
                f"list by index in the data set, but got {_shortened(texts)}."
            )
        return cls(None if method is None else method_of(method), named.get("train"), named.get("val"))

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self.method is None and self.train is None and self.val is None

    def check(
        self, sites: Sequence[Site], module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], n_train: int
    ) -> None:
        """Check that a fit can log so, before it begins.

        Args:
            sites: where it records gradients.
            module: the module in training.
            optimizers: those of the fit.
            n_train: number of training examples.

        Raises:
            ValueError: if it records too little for the method, or if the texts are not those of its examples.
        """
        tokenizer = tokenizer_of(module)
        if self.method is not None:
            for summand in self.method.summands:
                stored_site(summand.method, sites)
                is_adam = any("betas" in group for optimizer in optimizers for group in optimizer.param_groups)
                if summand.method.precondition == "adam" and not is_adam:
                    raise ValueError(
                        'log_method has precondition="adam", but no optimizer of the fit is of the Adam family.'
                    )
            training_sites_of(self.method, sites)
            if isinstance(self.method, TracInRidge):
                require_memory(self.method, n_train)
            if not has_own_words(module):
                require_words(self.method, tokenizer)
        if self.train is None and self.val is None:
            return
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "log_texts needs the fast tokenizer that makes the token ids as self.tokenizer of the module or its "
                f"datamodule, to find the tokens in the texts, but found {type(tokenizer).__name__}."
            )
        if self.train is not None and len(self.train) != n_train:
            raise ValueError(
                f"log_texts must have a text for each of {n_train} training examples, but has {len(self.train)}."
            )


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
