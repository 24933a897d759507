"""``label_issues``: a Trainer is asked which training labels may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_tracin.bridge.mixin import label_names_of
from lightning_tracin.checked_numbers import whole_number_or_none
from lightning_tracin.querying.chosen_checkpoints import CheckpointChoice
from lightning_tracin.querying.training import Training, ready_training
from lightning_tracin.querying.undisturbed import left_as_found
from lightning_tracin.report.explanation import Example
from lightning_tracin.report.label_issues import LabelIssues
from lightning_tracin.results.label_table import label_issues_of
from lightning_tracin.results.reader import RawText, Reader, require_texts
from lightning_tracin.results.train_examples import train_examples
from lightning_tracin.results.words import spans_of
from lightning_tracin.scoring.label_review import reviewed_labels
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of, require_not_constant
from lightning_tracin.storage.trace import Trace

_COMPARED = 64  # texts, with the tokens of their examples: each is tokenized for that


def label_issues(
    trainer: pl.Trainer,
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
    """Training examples whose labels may be wrong, highest self-influence first.

    What the model said of each training example follows from the inputs of the classifier's head, which are stored with
    its gradients, and the head's weights: nothing is run. Networks learn what labels have in common before they learn
    wrong ones by heart, so its mean over the first half of the checkpoints counts; it is no prediction of a model that
    has not seen the example. ``label_score`` is the mean probability of the given label. ``is_label_issue`` says that
    the model says another class, that the label's probability is nearer to what examples of other labels are given than
    to what its own are, on the mean, and that more of such labels are wrong than right, as far as the model tells: see
    :func:`~lightning_tracin.scoring.label_review.probably_wrong`. It names none where the model hardly fits, few where
    labels are learned by heart from the first epoch on, and never all: look at the first of the table, too.

    Where no such head was recorded (regression, several labels, tokens, or a last layer whose outputs are not the
    logits of the classes, as the gradients there tell), ``predicted_label`` and ``is_label_issue`` are empty, and
    ``label_score`` is the share of the training examples that influence themselves at least as much. With
    ``cache="training"`` the inputs are those of training, with dropout.

    Args:
        trainer: as for :func:`influence`, like the four that follow.
        model: names labels, and is needed where gradients are not stored yet; by default that of the last fit.
        datamodule: see :func:`influence`.
        train_dataloaders: see :func:`influence`.
        trace: see :func:`influence`.
        method: measures self-influence.
        checkpoints: which of the trace's count, as for :func:`influence`; what the model said counts at the first half
            of these.
        n: list only so many, those of highest self-influence; None for all.
        texts: the text of each training example as it was written, or a pair of texts, by index in the training data
            set; without them texts are put together from tokens.

    Returns:
        A table to print, to write as CSV and to hand back, corrected, to :func:`apply_corrections`.

    Raises:
        ValueError: see :func:`influence`; or if self-influence is the same for every example, as with
            ``normalize="cosine"``, if there is not a text for each example, or if ``n`` is under 0.
        BlockingIOError: see :func:`influence`.

    Warns:
        UserWarning: texts are not what the module's tokenizer made the token ids of.
    """
    chosen, n = method_of(method), whole_number_or_none("n", n, at_least=0)
    require_not_constant(chosen)
    with left_as_found(trainer):
        training = Training(model, datamodule, train_dataloaders, trace, checkpoints)
        query, ready = ready_training(trainer, chosen, training)
        if texts is not None:
            require_texts("texts", texts, query.trace.n_train)
        with query.processes.synchronized():
            review = reviewed_labels(query.trace, ready, query.method, query.processes)
            names = {} if query.module is None else label_names_of(query.module)
            reader = Reader(query.trace.vocabulary, names, query.tokenizer)

            def examples(indices: Sequence[int]) -> dict[int, Example]:
                if texts is not None:
                    _warn_of_other_texts(query.trace, indices[:_COMPARED], texts, reader.tokenizer)
                    return {index: Example(index, (), None, unread=_in_one(texts[index])) for index in indices}
                return train_examples(query.trace, indices, reader)

            return label_issues_of(review, query.method, reader, examples, n)


def _warn_of_other_texts(trace: Trace, indices: Sequence[int], texts: Sequence[RawText], tokenizer: Any) -> None:
    """Warn where texts that are to be listed are not what their examples' tokens were made of, as in another order."""
    if not getattr(tokenizer, "is_fast", False) or not indices:
        return
    ids = trace.texts(indices).ids_by_example()
    compared = [(index, of_index) for index, of_index in zip(indices, ids, strict=True) if of_index]
    others = [index for index, of_index in compared if spans_of(tokenizer, texts[index], of_index) is None]
    if others:
        rank_zero_warn(
            f"Of the first {len(compared)} texts that are listed, {len(others)} are not what their token ids were made "
            f"of, such as that of training example {others[0]}: texts must be in the order of the training data set."
        )


def _in_one(text: RawText) -> str:
    return text if isinstance(text, str) else "\n".join(text)
