"""How much of the noise lies among the least helpful training examples?"""

from __future__ import annotations

from torch import Tensor

from lightning_tracin.checked_numbers import real_number
from lightning_tracin.metrics.functional.mislabel_detection_auroc import check_suspicion, check_tells
from lightning_tracin.metrics.functional.mislabel_detection_curve import found_by_inspecting


def _noise_detection_rate_compute(values: Tensor, mislabelled: Tensor, at: float) -> Tensor:
    check_tells(values, mislabelled)
    return found_by_inspecting(-values, mislabelled)[max(round(at * len(values)), 1) - 1].float()


def noise_detection_rate(values: Tensor, mislabelled: Tensor, at: float = 0.2) -> Tensor:
    """The share of mislabelled examples that are among the lowest values (NDR@q; arXiv 2511.04715).

    Args:
        values: (n_train,) influence on clean validation examples, aggregated over them by mean, rank or vote: **low is
            suspicious**. Where several have one value, as votes often do, the mean over their orders counts.
        mislabelled: (n_train,) bool.
        at: the share of the training set that is looked at.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: the lengths differ, a value is not finite, all or none are mislabelled, or ``at`` is no share.

    Returns:
        A scalar from 0 to 1; ``at`` by chance.

    Example:
        >>> import torch
        >>> values = torch.tensor([0.9, -0.2, 0.8, -0.1, 0.3])
        >>> noise_detection_rate(values, torch.tensor([False, True, False, False, True]), at=0.4)
        tensor(0.5000)
    """
    at = real_number("at", at, above=0, below=1)
    check_suspicion(values, mislabelled)
    return _noise_detection_rate_compute(values, mislabelled, at)
