"""RankedResult: what the scores say by themselves, without a trace and without words."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_tracin.results.stored_result import StoredResult
from lightning_tracin.scoring.strongest import TopK, clipped_k, strongest


class RankedResult(StoredResult):
    """A result whose training examples are ranked for each test example, and over all of them."""

    def proponents(self, k: int) -> TopK:
        """The k training examples of largest score for each test example, whatever its sign.

        Where fewer than k examples have a positive score, others fill the place. What is printed or tabulated leaves
        those out, and lists equal texts once.

        Args:
            k: how many; clipped, with a warning, to the number of training examples.

        Returns:
            Values and indices in the training data set, each (n_test, k), largest first.

        Raises:
            ValueError: if fewer than k were kept.
        """
        return self._strongest(k, self.strongest_proponents, largest=True)

    def opponents(self, k: int) -> TopK:
        """The k training examples of smallest (most negative) score for each test example, whatever its sign.

        Where fewer than k examples have a negative score, others fill the place. What is printed or tabulated leaves
        those out, and lists equal texts once.

        Args:
            k: how many; clipped, with a warning, to the number of training examples.

        Returns:
            Values and indices in the training data set, each (n_test, k), smallest first.

        Raises:
            ValueError: if fewer than k were kept.
        """
        return self._strongest(k, self.strongest_opponents, largest=False)

    def aggregate(self, how: Literal["mean", "rank", "vote"] = "mean", k: int | None = None) -> Tensor:
        """One value for each training example over all test examples; high for those that help most.

        Args:
            how: "mean" of the scores; mean "rank" (0 for a test example's strongest opponent, n_train - 1 for its
                strongest proponent; equal scores share the mean of their ranks, as those of 0 do that share no word);
                or "vote", -Σ max(k - rank, 0): only a test example's k strongest opponents get negative votes
                (arXiv 2511.04715), and none whose score is not negative. An example that training never drew counts
                with scores of zero.
            k: for "vote" only, 10 by default.

        Returns:
            (n_train,) float32.

        Raises:
            ValueError: if it needs all scores and only the k strongest were kept.
        """
        if how not in ("mean", "rank", "vote"):
            raise ValueError(f"how must be 'mean', 'rank' or 'vote', but got {how!r}.")
        if how != "vote":
            if k is not None:
                raise ValueError(f'k goes with aggregate("vote"), not with {how!r}.')
            if self.scores is None:
                raise ValueError(f"aggregate({how!r}) needs all scores: call influence without k.")
            if how == "mean":
                return self.scores.mean(0)
            return _mean_ranks(self.scores)
        opponents = self.opponents(min(10, self._n_drawn) if k is None else k)
        n_votes = opponents.indices.shape[1]
        votes = torch.arange(n_votes, 0, -1).float() * (opponents.values < 0)
        return -torch.zeros(self.n_train, dtype=torch.float32).index_add_(
            0, opponents.indices.flatten(), votes.flatten()
        )

    @property
    def _n_drawn(self) -> int:
        """How many training examples training has drawn."""
        return self.n_train - len(self.undrawn)

    @property
    def _n_kept(self) -> int:
        """How many proponents and how many opponents of each test example are known."""
        return self._n_drawn if self.strongest_proponents is None else self.strongest_proponents.values.shape[1]

    def _loader_of(self, row: int) -> str | None:
        """The name of the loader that a test example came in; None where there was one."""
        return None if self.test_loaders is None else self.test_loader_names[int(self.test_loaders[row])]

    def _strongest(self, k: int, kept: TopK | None, *, largest: bool) -> TopK:
        """The k strongest of one side: of all scores, or of those that were kept."""
        k = clipped_k(k, self._n_drawn)
        if self.scores is not None:
            top = strongest(self._drawn(self.scores), k, largest=largest)
            return TopK(top.values, self._drawn(torch.arange(self.n_train))[top.indices])
        assert kept is not None
        if k > kept.values.shape[1]:
            raise ValueError(f"Only the {kept.values.shape[1]} strongest were kept: call influence with k={k} or more.")
        return TopK(kept.values[:, :k], kept.indices[:, :k])

    def _pushing(self, row: int, n: int, *, proponents: bool) -> list[tuple[int, float]]:
        """The n strongest proponents or opponents of a test example, and their scores, as far as they are known.

        An example of the other sign, or that does not push at all, is neither.
        """
        kept = self.strongest_proponents if proponents else self.strongest_opponents
        if self.scores is not None:
            top = strongest(self._drawn(self.scores[row : row + 1]), min(n, self._n_drawn), largest=proponents)
            values, indices = top.values[0], self._drawn(torch.arange(self.n_train))[top.indices[0]]
        else:
            assert kept is not None
            values, indices = kept.values[row, :n], kept.indices[row, :n]
        sign = 1 if proponents else -1
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        return [(index, score) for index, score in pairs if score * sign > 0]

    def _drawn(self, values: Tensor) -> Tensor:
        """Values of all training examples, (..., n_train), without those that training never drew."""
        if not len(self.undrawn):
            return values
        is_drawn = torch.ones(self.n_train, dtype=torch.bool)
        is_drawn[self.undrawn] = False
        return values[..., is_drawn]

    def _share(self, row: int, score: float) -> float | None:
        """A score as a part of all scores of its sign that a test example has; None where all are zero."""
        if self.totals is None:
            return None
        total = float(self.totals[row, 0 if score >= 0 else 1])
        return score / total if total else None

    def _known_scores(self, row: int | None) -> Tensor:
        """The scores of one test example, or of all (None), as one row of numbers.

        Where only the strongest were kept it is those. A training example may then be among both the proponents and
        the opponents of a small training set, and still counts once.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        if self.scores is not None:
            return self._drawn(self.scores[rows]).flatten()
        sides = (self.proponents(self._n_kept), self.opponents(self._n_kept))
        values, indices = (torch.cat([side[column][rows] for side in sides], dim=1) for column in (0, 1))
        order = indices.argsort(dim=1, stable=True)
        values, indices = values.gather(1, order), indices.gather(1, order)
        is_first = torch.cat([torch.ones_like(indices[:, :1], dtype=torch.bool), indices.diff(dim=1) > 0], dim=1)
        return values[is_first]


def _mean_ranks(scores: Tensor) -> Tensor:
    """The mean over rows of each column's rank in its row, (n_train,); equal scores share the mean of their ranks."""
    total = torch.zeros(scores.shape[1], dtype=torch.float64)
    for row in scores:
        _, place, counts = torch.unique(row, return_inverse=True, return_counts=True)
        total += (counts.cumsum(0) - (counts + 1) / 2).double()[place]
    return (total / len(scores)).float()
