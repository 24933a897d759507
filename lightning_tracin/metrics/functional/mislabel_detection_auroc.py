"""Are mislabelled examples ranked above others? By the area below the ROC curve."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_tracin.metrics.functional.checks import check_finite, check_length, check_mask
from lightning_tracin.metrics.functional.correlations import precise, ranks


def check_suspicion(values: Tensor, mislabelled: Tensor) -> None:
    """Refuses values that are not one finite number for each training example of the mask.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: the lengths differ, or a value is not finite.
    """
    check_finite("values", values, "(n_train,)", (1,))
    check_mask("mislabelled", mislabelled, "(n_train,)", (1,))
    check_length("mislabelled", len(mislabelled), len(values), "training examples of `values`")


def check_tells(values: Tensor, mislabelled: Tensor) -> None:
    """Refuses a training set that is mislabelled as a whole, or not at all; warns where all values are the same.

    Raises:
        ValueError: it is.
    """
    if mislabelled.all() or not mislabelled.any():
        raise ValueError(
            f"Argument `mislabelled` expected to name some of the {len(mislabelled)} training examples, but got "
            f"{int(mislabelled.sum())} of them. Of batches, of which some may hold none, call `update`, and `compute` "
            "at the end."
        )
    if (values == values[0]).all():
        rank_zero_warn(
            f"Argument `values` expected to vary over the training examples, but got {float(values[0]):.4g} for all "
            f"{len(values)}: they find mislabelled examples by chance alone.",
            UserWarning,
        )


def _mislabel_detection_auroc_compute(values: Tensor, mislabelled: Tensor) -> Tensor:
    check_tells(values, mislabelled)
    mislabelled = mislabelled.bool()
    noisy, n = int(mislabelled.sum()), len(values)
    sum_of_ranks = ranks(values.unsqueeze(1))[mislabelled].sum()
    return ((sum_of_ranks - noisy * (noisy + 1) / 2) / (noisy * (n - noisy))).float()


def mislabel_detection_auroc(values: Tensor, mislabelled: Tensor) -> Tensor:
    """The chance that a mislabelled example has a higher value than one that is labelled well; a tie counts half.

    This is dattri's area; the other one in use is `mislabel_detection_curve`'s.

    Args:
        values: (n_train,) how suspicious each training example is: its self-influence, or its influence on clean
            validation examples with the sign turned.
        mislabelled: (n_train,) bool.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: the lengths differ, a value is not finite, or all or none are mislabelled.

    Returns:
        A scalar from 0 to 1; 0.5 by chance, also where all values are the same.

    Example:
        >>> import torch
        >>> values = torch.tensor([0.9, 0.2, 0.8, 0.1, 0.3])
        >>> mislabel_detection_auroc(values, torch.tensor([True, False, False, False, True]))
        tensor(0.8333)
    """
    check_suspicion(values, mislabelled)
    return _mislabel_detection_auroc_compute(precise(values), mislabelled)
