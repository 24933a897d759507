"""How many of the mislabelled examples are found by inspecting the most suspicious ones?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tracin.metrics.functional.correlations import precise
from lightning_tracin.metrics.functional.mislabel_detection_auroc import check_suspicion, check_tells


class MislabelCurve(NamedTuple):
    """The share of mislabelled examples found against the share of examples inspected.

    Attributes:
        inspected: (n_train,) shares, 1 / n_train to 1.
        found: (n_train,) shares, up to 1.
        area: below the curve: 0.5 by chance, at best about 1 - p / 2 where a share p is mislabelled.
    """

    inspected: Tensor
    found: Tensor
    area: Tensor


def found_by_inspecting(values: Tensor, mislabelled: Tensor) -> Tensor:
    """The share (n_train,) of mislabelled examples among those of the highest values, for each number of these.

    Where several have one value, their order is left to chance, and the mean over all orders is taken.
    """
    in_order = values.sort(descending=True)
    is_found = precise(mislabelled)[in_order.indices]
    group: Tensor
    _, group, sizes = torch.unique_consecutive(in_order.values, return_inverse=True, return_counts=True)
    per_group: Tensor = torch.zeros_like(sizes, dtype=is_found.dtype).index_add_(0, group, is_found) / sizes
    return per_group[group].cumsum(0) / is_found.sum()


def _mislabel_detection_curve_compute(values: Tensor, mislabelled: Tensor) -> MislabelCurve:
    check_tells(values, mislabelled)
    found, n = found_by_inspecting(values, mislabelled), len(values)
    inspected = torch.arange(1, n + 1, device=values.device) / n
    return MislabelCurve(inspected, found.float(), (torch.trapezoid(found) / n).float())


def mislabel_detection_curve(values: Tensor, mislabelled: Tensor) -> MislabelCurve:
    """The share of mislabelled examples found against the share inspected, and its area (Kwon et al. 2024, DataInf).

    The area is quanda's. It depends on how many are mislabelled: compare it on one training set only.

    Args:
        values: (n_train,) how suspicious each training example is: its self-influence, or its influence on clean
            validation examples with the sign turned.
        mislabelled: (n_train,) bool.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: the lengths differ, a value is not finite, or all or none are mislabelled.

    Example:
        >>> values = torch.tensor([0.9, 0.2, 0.8, 0.1, 0.3])
        >>> curve = mislabel_detection_curve(values, torch.tensor([True, False, False, False, True]))
        >>> curve.found, curve.area
        (tensor([0.5000, 0.5000, 1.0000, 1.0000, 1.0000]), tensor(0.6500))
    """
    check_suspicion(values, mislabelled)
    return _mislabel_detection_curve_compute(values, mislabelled)
