"""What speaks against a training example's label: its influence on itself, and what the model said of it meanwhile.

A trace that has the gradients of a classifier's head as factors has the head's input for every training example at
every checkpoint, and the head's weights. So it has what the model said of each, without a forward pass. Networks learn
what labels have in common before they learn wrong ones by heart (Liu et al. 2020, early-learning regularization): the
mean over the first half of an example's checkpoints tells more of its label than the last one. From these means follows
which labels are probably wrong, by a threshold for each class that the data set, and whether they can be told at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.outputs import tell_classes
from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.gradients.sites import Site, last_site
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.ridge_scores import self_influence_of
from lightning_tracin.storage.checkpoint import WEIGHTS, Checkpoint, undrawn
from lightning_tracin.storage.shards import Shards
from lightning_tracin.storage.trace import Trace, training_labels

_EPSILON = 1e-6  # probabilities, sums of float32, are no nearer to 0 and 1


@dataclass(frozen=True)
class LabelReview:
    """What is known of the label of each training example.

    Attributes:
        self_influence: (n_train,) float32, each example's influence on itself.
        given: (n_train,) float64, its label; NaN without one.
        predicted: (n_train,) float64, the likeliest class by the mean over its early checkpoints; NaN where it is not
            known.
        scores: (n_train,) float32, from 0 to 1, lower is worse: the mean probability of its label, cleanlab's
            self-confidence; where no probabilities are known at all, the share of the training examples that influence
            themselves at least as much. NaN for examples that training never drew, or whose probabilities are missing.
        is_issue: (n_train,) bool, whether its label is probably wrong (:func:`probably_wrong`); false where that is not
            known.
        order: (n_drawn,) int64, the examples that training drew, highest self-influence first.
    """

    self_influence: Tensor
    given: Tensor
    predicted: Tensor
    scores: Tensor
    is_issue: Tensor
    order: Tensor

    @property
    def knows_predictions(self) -> bool:
        """Whether it is known what the model said of training examples."""
        return not bool(self.predicted.isnan().all())

    @property
    def agreement(self) -> float | None:
        """The share of training examples of which the model says the label; None where it is not known of any."""
        is_known = ~(self.predicted.isnan() | self.given.isnan())
        return float((self.predicted == self.given)[is_known].double().mean()) if bool(is_known.any()) else None

    def ranks_in_class(self) -> Tensor:
        """(n_drawn,) int64, the place, from 1, of each example of the order among those of its label; 0 without one."""
        given = self.given[self.order]
        ranks = torch.zeros(len(given), dtype=torch.int64)
        for label in torch.unique(given[~given.isnan()]):
            of_class = given == label
            ranks[of_class] = torch.arange(1, int(of_class.sum()) + 1)
        return ranks


def reviewed_labels(
    trace: Trace, checkpoints: Sequence[Checkpoint], method: Method, processes: Processes = ALONE
) -> LabelReview:
    """Review the labels of a trace's training examples.

    Args:
        trace: has their labels.
        checkpoints: that have the method's gradients, at least one.
        method: measures self-influence.
        processes: those that share the shards; every one of them must call it.

    Raises:
        ValueError: if the fit did not record what the method needs, or a file of the trace is damaged.
    """
    influence = self_influence_of(checkpoints, method, processes)
    order = order_of(influence, undrawn(checkpoints))
    given = training_labels(trace)
    probabilities = _mean_probabilities(checkpoints, given, processes)
    if probabilities is None:
        scores = torch.full_like(influence, math.nan)
        scores[order] = torch.arange(1, len(order) + 1) / max(len(order), 1)
        unknown = torch.full_like(given, math.nan)
        return LabelReview(influence, given, unknown, scores, torch.zeros(len(given), dtype=torch.bool), order)
    is_known = ~probabilities[:, 0].isnan()
    known, labels = probabilities[is_known], given[is_known].long()
    predicted, scores = torch.full_like(given, math.nan), torch.full_like(influence, math.nan)
    predicted[is_known] = known.argmax(1).double()
    scores[is_known] = known.gather(1, labels[:, None])[:, 0].clamp(0, 1)
    is_issue = torch.zeros(len(given), dtype=torch.bool)
    is_issue[is_known] = probably_wrong(known, labels)
    return LabelReview(influence, given, predicted, scores, is_issue, order)


def order_of(self_influence: Tensor, undrawn: Tensor) -> Tensor:
    """The training examples that training drew, highest self-influence first, of equal ones the first.

    Args:
        self_influence: (n_train,) of all.
        undrawn: the indices of those that it never drew.
    """
    order = self_influence.argsort(descending=True, stable=True)
    return order[~torch.isin(order, undrawn)]


def probably_wrong(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Which labels are probably wrong: the model says another class, and speaks of the label as of a stranger's.

    Of each class, the examples that have its label and those that have another are given certain probabilities of it on
    the mean. A label is suspected if its own is nearer to that of the others than to that of its own kind, and the
    likeliest class is another. As in confident learning (Northcutt et al. 2021), each class has a threshold that
    follows from the data, here the one halfway.

    Where a model fits badly, right labels are suspected, too. So nothing is said of a class whose examples it hardly
    tells from others (:func:`_standings`). Else what it is not sure about scatters to both sides: as many right labels
    as are suspected are as far above the median of their class. Labels are called wrong from where those above are at
    most half as many as those suspected, plus one (Barber and Candès 2015): more of them are wrong than right.

    Args:
        probabilities: (n, n_classes) of each class.
        labels: (n,) int64, those given.

    Returns:
        (n,) bool.

    Example:
        >>> of_label = torch.tensor([0.9, 0.8, 0.7, 0.8, 0.2, 0.9, 0.7, 0.8, 0.7, 0.1])
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> probabilities = torch.where(labels[:, None] == torch.arange(2), of_label[:, None], 1 - of_label[:, None])
        >>> probably_wrong(probabilities, labels).nonzero()[:, 0]
        tensor([4, 9])
    """
    standings = _standings(probabilities.double(), labels)
    is_suspected = (standings < -1) & (probabilities.argmax(1) != labels)
    suspected, mirrored = (-standings[is_suspected]).sort().values, standings[standings > 1].sort().values
    n_from = torch.arange(len(suspected), 0, -1)
    n_mirrored = len(mirrored) - torch.searchsorted(mirrored, suspected)
    is_enough = 2 * (n_mirrored + 1) <= n_from
    if not bool(is_enough.any()):
        return torch.zeros_like(is_suspected)
    return is_suspected & (standings <= -suspected[is_enough][0])


def _standings(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Where each label stands among those of its class, by the log odds of its probability.

    A class is told from others if the share of its own examples that are above its threshold, less the share of others
    that are, is nearer to 1 than to 0, which is chance (Youden 1950).

    Args:
        probabilities: (n, n_classes) float64.
        labels: (n,) int64.

    Returns:
        (n,) float64, 0 at the median of the class and -1 at its threshold; NaN in a class that is not told from others.
    """
    counts = torch.bincount(labels, minlength=probabilities.shape[1])

    def means(values: Tensor) -> tuple[Tensor, Tensor]:
        """(n_classes,) each, those of a column's own examples and of the others; NaN without any."""
        of_own = values.new_zeros(values.shape[1]).index_add(0, labels, values.gather(1, labels[:, None])[:, 0])
        return of_own / counts, (values.sum(0) - of_own) / (len(labels) - counts)

    own, others = means(probabilities)
    thresholds = (own + others) / 2
    own, others = means((probabilities >= thresholds).double())
    standings = torch.full((len(labels),), math.nan, dtype=torch.float64)
    for label in (own - others > 0.5).nonzero()[:, 0].tolist():
        odds = probabilities[labels == label, label].logit(_EPSILON)
        median = odds.median()
        standings[labels == label] = (odds - median) / (median - thresholds[label].logit(_EPSILON))
    return standings


def _mean_probabilities(checkpoints: Sequence[Checkpoint], given: Tensor, processes: Processes) -> Tensor | None:
    """The probability that the model gave each class, on the mean over the first half of an example's checkpoints.

    An example's checkpoints are those that training drew it before; of an odd number, the one in the middle counts.

    Args:
        checkpoints: of the trace.
        given: (n_train,) the labels.
        processes: those that share the shards.

    Returns:
        (n_train, n_classes) float32, NaN for an example without any; None if the head's inputs are not there, or are
        not one for each text, or if labels are no classes of it, or its losses not those of classes. A single output is
        that of the second of two classes.
    """
    site = last_site(checkpoints[0].sites)
    if site is None or site.shape != "factors" or not all(each.has_gradients(site) for each in checkpoints):
        return None
    heads = [_head(checkpoint, site) for checkpoint in checkpoints]
    known = given[~given.isnan()]
    if heads[0] is None or not len(known):
        return None
    n_classes = max(len(heads[0]), 2)
    if bool(((known != known.round()) | (known < 0) | (known >= n_classes)).any()):
        return None
    shards = [checkpoint.gradients(site) for checkpoint in checkpoints]
    if not _is_of_classes(shards[0], heads[0], given):
        return None
    own = [_of_shard(shards, heads, shard, given) for shard in processes.share(len(shards[0]))]
    parts = [part for of_process in processes.gather(own) for part in of_process]
    return None if any(part is None for part in parts) else torch.cat(parts)


def _head(checkpoint: Checkpoint, site: Site) -> Tensor | None:
    """(n_classes, n_inputs) the head's weight at a checkpoint, its bias as a last column; None if it has more parts."""
    if WEIGHTS not in checkpoint.checksums:
        return None
    prefix = f"{site.layer}."
    parts = {name.removeprefix(prefix): each for name, each in checkpoint.weights().items() if name.startswith(prefix)}
    if parts.keys() not in ({"weight"}, {"weight", "bias"}) or parts["weight"].dim() != 2:
        return None
    weight = parts["weight"].float()
    return torch.cat([weight, parts["bias"].float()[:, None]], 1) if "bias" in parts else weight


def _is_of_classes(shards: Shards, head: Tensor, given: Tensor) -> bool:
    """Whether the head's outputs are logits of the classes, by the gradients of the first examples' losses there.

    They may be a projection, thresholds of ordered classes, or a mean and a variance.
    """
    held = next((shard for shard in range(len(shards)) if shards.holds(shard)), None)
    block = None if held is None else shards.read(held)
    if held is None or not isinstance(block, FactorGradients) or block.widths != head.shape[::-1]:
        return False
    start, stop = shards.bounds(held)
    labels, outputs = given[start:stop][block.examples], _outputs(block, head)
    if len(head) == 1:
        return _are_of_two_classes(outputs[:, 0], block.scaled_deltas[:, 0], labels)
    rounding = 1 / 127 if shards.dtype == "int8" else 0.0
    return tell_classes(outputs, block.scaled_deltas, labels, rounding) is not False


def _are_of_two_classes(outputs: Tensor, gradients: Tensor, labels: Tensor) -> bool:
    """Whether single outputs, whose labels are 0 and 1, are those of two classes, and not values.

    The gradient at an output z is σ(z) - y by a cross-entropy, z - y by a squared error; times a constant, which may be
    another for each label y. It tells to which it is nearer.
    """
    outputs, gradients = outputs.double(), gradients.double()

    def explained(said: Tensor) -> float:
        """How much of the gradients' squares such differences explain."""
        found = 0.0
        for label in (0, 1):
            differences, wanted = said[labels == label] - label, gradients[labels == label]
            square = float(differences.square().sum())
            found += max(0.0, float((differences * wanted).sum())) ** 2 / square if square else 0.0
        return found

    return explained(outputs.sigmoid()) >= explained(outputs)


@full_precision()
def _outputs(block: FactorGradients, head: Tensor) -> Tensor:
    """(R, n_outputs) what the head says at each position."""
    return block.scaled_inputs @ head.T


def _probabilities(outputs: Tensor) -> Tensor:
    """(R, n_classes) those of each class, of a single output those of two."""
    return torch.cat([-outputs, outputs], 1).sigmoid() if outputs.shape[1] == 1 else outputs.softmax(1)


def _of_shard(shards: Sequence[Shards], heads: Sequence[Tensor | None], shard: int, given: Tensor) -> Tensor | None:
    """What :func:`_mean_probabilities` returns, of one shard, given each checkpoint's gradients and head."""
    assert heads[0] is not None
    start, stop = shards[0].bounds(shard)
    held = [(stored.read(shard), head) for stored, head in zip(shards, heads, strict=True) if stored.holds(shard)]
    for block, head in held:
        if not isinstance(block, FactorGradients) or head is None or block.widths != head.shape[::-1]:
            return None
        if int(block.rows_by_example().max()) > 1:
            return None  # several positions: tokens, not texts, are classified
    # An example has no row where training did not draw it, or its gradient was not finite.
    n_rows = sum((block.rows_by_example() for block, _ in held), torch.zeros(stop - start, dtype=torch.int64))
    sums, counts = torch.zeros(stop - start, max(len(heads[0]), 2)), torch.zeros(stop - start)
    for block, head in held:
        assert head is not None
        is_early = 2 * counts[block.examples] < n_rows[block.examples]
        examples = block.examples[is_early]
        sums[examples] += _probabilities(_outputs(block, head)[is_early])
        counts[examples] += 1
    is_known = (counts > 0) & ~given[start:stop].isnan()
    return sums / torch.where(is_known, counts, math.nan)[:, None]
