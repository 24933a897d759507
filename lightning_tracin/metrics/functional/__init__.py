"""The metrics as pure functions of tensors.

Each file has one metric: its function, and the two halves (``_update``, ``_compute``) between which the class of the
same name in the folder above keeps a state.
"""

from lightning_tracin.metrics.functional.brittleness import brittleness
from lightning_tracin.metrics.functional.cancellation_effect import cancellation_effect
from lightning_tracin.metrics.functional.class_detection import class_detection
from lightning_tracin.metrics.functional.common_word_share import common_word_share
from lightning_tracin.metrics.functional.deletion_curve import deletion_curve
from lightning_tracin.metrics.functional.leave_one_out_correlation import leave_one_out_correlation
from lightning_tracin.metrics.functional.linear_datamodeling_score import (
    linear_datamodeling_difference,
    linear_datamodeling_score,
)
from lightning_tracin.metrics.functional.mislabel_detection_auroc import mislabel_detection_auroc
from lightning_tracin.metrics.functional.mislabel_detection_curve import mislabel_detection_curve
from lightning_tracin.metrics.functional.model_randomization import model_randomization
from lightning_tracin.metrics.functional.noise_detection_rate import noise_detection_rate
from lightning_tracin.metrics.functional.recall_at_k import recall_at_k
from lightning_tracin.metrics.functional.tail_patch import tail_patch
from lightning_tracin.metrics.functional.top_k_cardinality import top_k_cardinality

__all__ = [
    "brittleness",
    "cancellation_effect",
    "class_detection",
    "common_word_share",
    "deletion_curve",
    "leave_one_out_correlation",
    "linear_datamodeling_difference",
    "linear_datamodeling_score",
    "mislabel_detection_auroc",
    "mislabel_detection_curve",
    "model_randomization",
    "noise_detection_rate",
    "recall_at_k",
    "tail_patch",
    "top_k_cardinality",
]
