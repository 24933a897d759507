"""The metrics as pure functions of tensors.

Each file has one metric: its function, and the two halves (``_update``, ``_compute``) between which the class of the
same name in the folder above keeps a state.
"""

from lightning_tracin.metrics.functional.deletion_curve import deletion_curve
from lightning_tracin.metrics.functional.linear_datamodeling_score import (
    linear_datamodeling_difference,
    linear_datamodeling_score,
)

__all__ = [
    "deletion_curve",
    "linear_datamodeling_difference",
    "linear_datamodeling_score",
]
