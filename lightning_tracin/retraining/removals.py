"""Which training examples are left out: proponents, and what they must be better than."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.folder import Retraining
from lightning_tracin.retraining.subsets import without
from lightning_tracin.retraining.targets import target_classes
from lightning_tracin.retraining.tf_idf import tf_idf_cosines
from lightning_tracin.storage.trace import Trace, training_labels

#: What proponents are compared with.
Baseline: TypeAlias = Literal["random", "same label", "tf-idf"]

BASELINES: tuple[Baseline, ...] = ("random", "same label", "tf-idf")

PROPONENTS = "proponents"


class Removals:
    """Chooses k training examples for each test example and seed.

    Args:
        result: has the proponents.
        rows: of the result, of the test examples that count.
        k: how many are left out.
        n_seeds: random ones are others for each seed.
        against: what else is left out.

    Attributes:
        drawn: (n_train,) bool, the examples that training drew.
        notes: what is not compared with, and why.
    """

    def __init__(
        self, result: InfluenceResult, rows: Tensor, k: int, n_seeds: int, against: Sequence[Baseline]
    ) -> None:
        self._result, self._rows, self._k, self._n_seeds = result, rows, k, n_seeds
        self.drawn = without(result.n_train, result.undrawn)
        self.notes: list[str] = []
        ways: dict[str, Callable[[], Tensor | None]] = {
            PROPONENTS: self._proponents,
            "random": self._random,
            "same label": self._same_label,
            "tf-idf": self._tf_idf,
        }
        found = {name: ways[name]() for name in (PROPONENTS, *against)}
        #: By name, (n, n_seeds, k) int64; -1 for a test example that there are not enough for.
        self.chosen = {name: chosen for name, chosen in found.items() if chosen is not None}

    def without(self, chosen: Tensor, seed: int) -> Retraining | None:
        """The retraining without some training examples, (k,); None where there are not enough of them (-1)."""
        if int(chosen[0]) < 0:
            return None
        kept = self.drawn.clone()
        kept[chosen] = False
        return Retraining(kept, seed)

    def _proponents(self) -> Tensor:
        indices = self._result.proponents(self._k).indices[self._rows]
        return indices[:, None].expand(-1, self._n_seeds, -1)

    def _random(self) -> Tensor:
        """The same for all test examples, which saves fits."""
        among = self.drawn.nonzero().flatten()
        chosen = torch.stack([self._drawn_from(among, seed, 0) for seed in range(self._n_seeds)])
        return chosen.expand(len(self._rows), -1, -1)

    def _same_label(self) -> Tensor | None:
        """Of the test example's label, or of the class that is explained; the same for all test examples of one."""
        trace = self._trace("same label")
        if trace is None:
            return None
        of_train = training_labels(trace)
        of_test = self._result.test_texts.labels[self._rows]
        if self._result.target != "label":
            of_test = target_classes(self._result, self._rows)[:, 0].double()
        chosen = torch.full((len(self._rows), self._n_seeds, self._k), -1)
        for label in torch.unique(of_test[~of_test.isnan()]).tolist():
            among = (self.drawn & (of_train == label)).nonzero().flatten()
            if len(among) < self._k:
                continue
            of_label = [self._drawn_from(among, seed, 1 + int(label)) for seed in range(self._n_seeds)]
            chosen[of_test == label] = torch.stack(of_label)
        lacking = int((chosen[:, 0, 0] < 0).sum())
        if lacking:
            self.notes.append(
                f"{lacking} test examples have no label, or fewer than {self._k} training examples share it: nothing "
                "of the same label was removed for them."
            )
        return None if lacking == len(chosen) else chosen

    def _tf_idf(self) -> Tensor | None:
        trace = self._trace("tf-idf")
        if trace is None:
            return None
        cosines = tf_idf_cosines(self._result.test_texts, trace.texts(range(trace.n_train)))[self._rows]
        nearest = cosines.masked_fill(~self.drawn, -1).topk(self._k).indices
        return nearest[:, None].expand(-1, self._n_seeds, -1)

    def _drawn_from(self, among: Tensor, seed: int, stream: int) -> Tensor:
        """K of some training examples at random; others for another seed, and for another stream."""
        generator = torch.Generator().manual_seed(seed + 1_000_003 * stream)
        return among[torch.randperm(len(among), generator=generator)[: self._k]]

    def _trace(self, needed_for: str) -> Any:
        """The trace, which has the texts and labels of the training examples; None, with a note, without."""
        trace: Trace | None = self._result.trace
        if trace is not None and trace.has_texts:
            return trace
        self.notes.append(
            f"There is no comparison with {needed_for!r}: the trace, which has the texts and labels of the training "
            "examples, is not there."
        )
        return None
