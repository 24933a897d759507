"""How good scores are: metrics of data attribution, as torchmetrics has them.

Each metric exists twice: a class with a state, which is updated by batches and gathered over processes, and a function
in ``functional``. They know tensors and torchmetrics, and nothing of the rest of this package. Scores are (n_test,
n_train), positive for proponents; what models say is higher where it is better.
"""

from lightning_tracin.metrics import functional
from lightning_tracin.metrics.brittleness import Brittleness
from lightning_tracin.metrics.cancellation_effect import CancellationEffect
from lightning_tracin.metrics.class_detection import ClassDetection
from lightning_tracin.metrics.common_word_share import CommonWordShare
from lightning_tracin.metrics.deletion_curve import DeletionCurve
from lightning_tracin.metrics.leave_one_out_correlation import LeaveOneOutCorrelation
from lightning_tracin.metrics.linear_datamodeling_score import LinearDatamodelingScore
from lightning_tracin.metrics.mislabel_detection_auroc import MislabelDetectionAUROC
from lightning_tracin.metrics.mislabel_detection_curve import MislabelDetectionCurve
from lightning_tracin.metrics.model_randomization import ModelRandomization
from lightning_tracin.metrics.noise_detection_rate import NoiseDetectionRate
from lightning_tracin.metrics.recall_at_k import RecallAtK
from lightning_tracin.metrics.tail_patch import TailPatch
from lightning_tracin.metrics.top_k_cardinality import TopKCardinality

__all__ = [
    "Brittleness",
    "CancellationEffect",
    "ClassDetection",
    "CommonWordShare",
    "DeletionCurve",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetectionAUROC",
    "MislabelDetectionCurve",
    "ModelRandomization",
    "NoiseDetectionRate",
    "RecallAtK",
    "TailPatch",
    "TopKCardinality",
    "functional",
]
