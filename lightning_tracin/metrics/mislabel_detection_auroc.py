"""Are mislabelled examples ranked above others? By the area below the ROC curve."""

from __future__ import annotations

from torch import Tensor

from lightning_tracin.metrics.functional.mislabel_detection_auroc import _mislabel_detection_auroc_compute
from lightning_tracin.metrics.suspicion import Suspicion


class MislabelDetectionAUROC(Suspicion):
    """The chance that a mislabelled example has a higher value than one that is labelled well.

    See `functional.mislabel_detection_auroc` for what it means. ``update`` takes ``values`` (n,) and ``mislabelled``
    (n,) bool of a batch of training examples; ``compute`` returns a scalar.

    torchmetrics' own ``BinaryAUROC`` takes values outside of 0 to 1 for logits, whose sigmoid makes large ones equal:
    its areas of self-influence can be wrong.

    Args:
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = MislabelDetectionAUROC()
        >>> metric.update(torch.tensor([0.9, 0.2, 0.8]), torch.tensor([True, False, False]))
        >>> metric.update(torch.tensor([0.1, 0.3]), torch.tensor([False, True]))
        >>> metric.compute()
        tensor(0.8333)
    """

    def compute(self) -> Tensor:
        """The area for all training examples so far."""
        return _mislabel_detection_auroc_compute(*self._seen())
